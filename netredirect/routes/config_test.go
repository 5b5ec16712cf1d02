package routes

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

func addr(text string) netip.Addr { return netip.MustParseAddr(text) }

func good() Config {
	return Config{
		ASN:         65010,
		RouterID:    addr("10.0.0.2"),
		NextHop4:    addr("10.0.0.2"),
		NextHop6:    addr("2001:db8::2"),
		Communities: []string{"65020:100", "65020:1:2"},
		LocalPref:   200,
		Peers: []Peer{
			{Address: addr("10.0.0.1"), ASN: 65001, Local: addr("10.0.0.2"), Multihop: 3},
			{Address: addr("2001:db8::1"), ASN: 65010, Watch: true},
		},
	}
}

func TestValidate(t *testing.T) {
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		change func(c *Config)
		want   string
	}{
		{"no AS", func(c *Config) { c.ASN = 0 }, "asn 0"},
		{"AS_TRANS", func(c *Config) { c.ASN = 23456 }, "asn 23456"},
		{"reserved AS", func(c *Config) { c.Peers[0].ASN = 1<<32 - 1 }, "peer 10.0.0.1: asn 4294967295"},
		{"no router id", func(c *Config) { c.RouterID = netip.Addr{} }, "router id not set"},
		{"router id 0", func(c *Config) { c.RouterID = addr("0.0.0.0") }, "router id 0.0.0.0"},
		{"router id IPv6", func(c *Config) { c.RouterID = addr("2001:db8::1") }, "router id 2001:db8::1"},
		{"next hop of the other family", func(c *Config) { c.NextHop4 = addr("2001:db8::2") }, "want an IPv4 address"},
		{"IPv4 in IPv6", func(c *Config) { c.NextHop6 = addr("::ffff:10.0.0.2") }, "want an IPv6 address"},
		{"multicast next hop", func(c *Config) { c.NextHop4 = addr("224.0.0.5") }, "next hop 224.0.0.5"},
		{"next hop unspecified", func(c *Config) { c.NextHop6 = addr("::") }, "next hop ::"},
		{"no peers", func(c *Config) { c.Peers = nil }, "no BGP peers"},
		{"peer twice", func(c *Config) { c.Peers[1].Address = c.Peers[0].Address }, "named twice"},
		{"peer without address", func(c *Config) { c.Peers[0] = Peer{ASN: 65001} }, "peer not set"},
		{"link-local peer", func(c *Config) { c.Peers[1].Address = addr("fe80::1%eth0") }, "not link-local"},
		{"local of the other family", func(c *Config) { c.Peers[0].Local = addr("2001:db8::2") }, "of the peer's family"},
		{"multihop iBGP", func(c *Config) { c.Peers[1].Multihop = 2 }, "multihop is for eBGP"},
		{"community", func(c *Config) { c.Communities = []string{"65020"} }, `community "65020"`},
		{"many communities", func(c *Config) { c.Communities = make([]string, maxCommunities+1) }, "101 communities"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := good()
			test.change(&c)
			if err := c.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

func TestValidateTellsAll(t *testing.T) {
	err := Config{Peers: []Peer{{Address: addr("10.0.0.1")}}}.Validate()
	for _, want := range []string{"asn 0", "router id", "peer 10.0.0.1: asn 0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestParseCommunities(t *testing.T) {
	standard, large, err := parseCommunities([]string{"65020:100", "0:0", "65535:65281", "65020:100", "4294967295:0:1", "65020:1:2"})
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, c := range standard {
		texts = append(texts, communityText(c))
	}
	for _, c := range large {
		texts = append(texts, largeCommunityText(c))
	}
	if want := []string{"65020:100", "0:0", "65535:65281", "4294967295:0:1", "65020:1:2"}; !slices.Equal(texts, want) {
		t.Errorf("%v, want %v", texts, want)
	}
	for _, bad := range []string{
		"", ":", "::", "1", "1:", ":1", "65536:1", "1:65536", "-1:1", "+1:1", " 1:1", "1:2:", "1:2:3:4",
		"4294967296:1:1", "1:1:4294967296", "a:b", "0x1:1", "1_0:1", "1:2\n",
	} {
		if _, _, err := parseCommunities([]string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func FuzzParseCommunities(f *testing.F) {
	for _, seed := range []string{"65020:100", "65020:1:2", "1:", "4294967295:0:1", ":::", "65536:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		standard, large, err := parseCommunities([]string{text})
		if err != nil {
			return
		}
		var again string
		switch {
		case len(standard) == 1 && len(large) == 0:
			again = communityText(standard[0])
		case len(standard) == 0 && len(large) == 1:
			again = largeCommunityText(large[0])
		default:
			t.Fatalf("%q: %v and %v", text, standard, large)
		}
		standard2, large2, err := parseCommunities([]string{again})
		if err != nil || !slices.Equal(standard, standard2) || len(large) != len(large2) || (len(large) == 1 && *large[0] != *large2[0]) {
			t.Errorf("%q becomes %q: %v, %v, %v", text, again, standard2, large2, err)
		}
	})
}

func TestPassword(t *testing.T) {
	if got, err := (Peer{}).password(); got != "" || err != nil {
		t.Errorf("without a file: %q, %v", got, err)
	}
	name := filepath.Join(t.TempDir(), "password")
	if _, err := (Peer{PasswordFile: name}).password(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
	for content, want := range map[string]string{
		"secret":                   "secret",
		"s3 cret\n":                "s3 cret",
		"secret\r\n":               "secret",
		strings.Repeat("x", 80):    strings.Repeat("x", 80),
		strings.Repeat("x", 81):    "",
		"":                         "",
		"\n":                       "",
		"two\nlines\n":             "",
		"secret\x00":               "",
		strings.Repeat("x", 1<<16): "",
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := (Peer{Address: addr("10.0.0.1"), PasswordFile: name}).password()
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%.20q: %q, %v", content, got, err)
		}
		if err != nil && len(content) > 2 && strings.Contains(err.Error(), strings.TrimSpace(content)) {
			t.Errorf("the error tells the password: %v", err)
		}
	}
}

func TestCarries(t *testing.T) {
	v4, v6 := Peer{Address: addr("10.0.0.1")}, Peer{Address: addr("2001:db8::1")}
	watched := v4
	watched.Watch = true
	for _, test := range []struct {
		config Config
		peer   Peer
		family bgp.Family
		want   bool
	}{
		{Config{}, v4, bgp.RF_IPv4_UC, true},
		{Config{}, v4, bgp.RF_IPv6_UC, false},
		{Config{}, v6, bgp.RF_IPv4_UC, false},
		{Config{}, v6, bgp.RF_IPv6_UC, true},
		{good(), v4, bgp.RF_IPv6_UC, true},
		{good(), v6, bgp.RF_IPv4_UC, true},
		{good(), watched, bgp.RF_IPv4_UC, false},
	} {
		if got := test.config.carries(test.peer, test.family); got != test.want {
			t.Errorf("%s, %s, next hops %s and %s: %v", test.peer.Address, test.family, test.config.NextHop4, test.config.NextHop6, got)
		}
	}
}
