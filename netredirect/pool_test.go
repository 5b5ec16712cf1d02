package netredirect

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestFree(t *testing.T) {
	pool := func(list string) []netip.Prefix { return nets(strings.Fields(list)...) }
	v4, v6 := true, false
	for _, c := range []struct {
		pool  string
		v4    bool
		taken string
		want  string // "": none
	}{
		{"", v4, "", ""},
		{"192.0.2.7/32", v4, "", "192.0.2.7"},
		{"192.0.2.7/32", v4, "192.0.2.7", ""},
		{"192.0.2.6/31", v4, "", "192.0.2.6"},
		{"192.0.2.6/31", v4, "192.0.2.6", "192.0.2.7"},
		{"192.0.2.6/31", v4, "192.0.2.6 192.0.2.7", ""},
		{"192.0.2.4/30", v4, "", "192.0.2.5"},
		{"192.0.2.4/30", v4, "192.0.2.5", "192.0.2.6"},
		{"192.0.2.4/30", v4, "192.0.2.5 192.0.2.6", ""}, // .7 is the broadcast address
		{"192.0.2.0/24", v4, "", "192.0.2.1"},
		{"192.0.2.0/24", v4, "192.0.2.1 192.0.2.3", "192.0.2.2"},
		{"192.0.2.0/24", v4, "1-254", ""},
		{"192.0.2.0/24", v4, "1-253", "192.0.2.254"},
		{"192.0.2.0/24 198.51.100.9/32", v4, "1-254", "198.51.100.9"},
		{"10.0.0.0/8", v4, "", "10.0.0.1"},
		{"0.0.0.0/0", v4, "", "0.0.0.1"},
		{"255.255.255.252/30", v4, "", "255.255.255.253"},
		{"255.255.255.252/30", v4, "255.255.255.253 255.255.255.254", ""},
		{"255.255.255.255/32", v4, "255.255.255.255", ""},
		{"2001:db8::/64", v4, "", ""},
		{"192.0.2.0/24", v6, "", ""},
		{"192.0.2.0/24 2001:db8::/64", v6, "", "2001:db8::1"}, // :: is the routers' anycast address (RFC 4291)
		{"2001:db8::/64", v6, "2001:db8::1", "2001:db8::2"},
		{"2001:db8::7/128", v6, "", "2001:db8::7"},
		{"2001:db8::7/128", v6, "2001:db8::7", ""},
		{"2001:db8::6/127", v6, "", "2001:db8::6"},
		{"2001:db8::6/127", v6, "2001:db8::6", "2001:db8::7"},
		{"2001:db8::4/126", v6, "2001:db8::5 2001:db8::6", "2001:db8::7"}, // IPv6 has no broadcast address
		{"2001:db8::4/126", v6, "2001:db8::5 2001:db8::6 2001:db8::7", ""},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", v6, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", ""},
		{"2001:db8::/32", v6, "", "2001:db8::1"},
	} {
		taken := map[netip.Addr]bool{}
		switch last := strings.TrimPrefix(c.taken, "1-"); {
		case last != c.taken: // of 192.0.2.0/24
			for a := addr("192.0.2.1"); a.Compare(addr("192.0.2."+last)) <= 0; a = a.Next() {
				taken[a] = true
			}
		default:
			for _, s := range strings.Fields(c.taken) {
				taken[addr(s)] = true
			}
		}
		got, ok := free(pool(c.pool), c.v4, taken)
		if ok != (c.want != "") || ok && got != addr(c.want) {
			t.Errorf("pool %q without %q: %v, %v, not %q", c.pool, c.taken, got, ok, c.want)
		}
	}
}

func TestWithin(t *testing.T) {
	pool := nets("192.0.2.64/28", "198.51.100.64/28", "203.0.113.0/24", "2001:db8:1::/120", "2001:db8:2::/120")
	for _, c := range []struct{ networks, want []netip.Prefix }{
		{nil, nil},
		{nets("198.51.100.1/24", "2001:db8:1::1/64"), nets("198.51.100.64/28", "2001:db8:1::/120")},
		{nets("203.0.113.1/24"), nets("203.0.113.0/24")},
		{nets("203.0.113.1/25", "0.0.0.0/32"), nil}, // a pool may be larger than the network
		{nets("2001:db8::1/32"), nets("2001:db8:1::/120", "2001:db8:2::/120")},
	} {
		if got := within(pool, c.networks); !slices.Equal(got, c.want) {
			t.Errorf("within %v: %v, not %v", c.networks, got, c.want)
		}
	}
	if len(pool) != 5 || pool[1] != nets("198.51.100.64/28")[0] {
		t.Errorf("the pool itself is changed: %v", pool)
	}
}

// TestFreeGivesEachOnce takes a pool until it is exhausted.
func TestFreeGivesEachOnce(t *testing.T) {
	for prefix, want := range map[string]int{"192.0.2.0/24": 254, "192.0.2.0/31": 2, "192.0.2.0/32": 1, "2001:db8::/120": 255, "2001:db8::/127": 2} {
		pool := []netip.Prefix{netip.MustParsePrefix(prefix)}
		taken := map[netip.Addr]bool{}
		for {
			a, ok := free(pool, pool[0].Addr().Is4(), taken)
			if !ok {
				break
			}
			if taken[a] || !pool[0].Contains(a) {
				t.Fatalf("%s gives %s, again or not its own", prefix, a)
			}
			taken[a] = true
		}
		if len(taken) != want {
			t.Errorf("%s has given %d addresses, not %d", prefix, len(taken), want)
		}
	}
}
