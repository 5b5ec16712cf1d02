package names

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func (s rrset) equal(o rrset) bool { return s.ttl == o.ttl && slices.Equal(s.data, o.data) }

func TestReverseName(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"10.1.2.3", "3.2.1.10.in-addr.arpa."},
		{"::ffff:10.1.2.3", "3.2.1.10.in-addr.arpa."},
		{"2001:db8::567:89ab", "b.a.9.8.7.6.5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa."}, // RFC 3596 has the like
	} {
		if got, err := reverseName(netip.MustParseAddr(tt.in)); err != nil || got != tt.want {
			t.Errorf("%s: %s, %v, want %s", tt.in, got, err, tt.want)
		}
	}
	if _, err := reverseName(netip.Addr{}); err == nil {
		t.Error("no address has a reverse name")
	}
}

// lines are the records of a section, each as text with single spaces.
func lines(section []dns.RR) []string {
	var out []string
	for _, rr := range section {
		out = append(out, strings.Join(strings.Fields(rr.String()), " "))
	}
	return out
}

func TestUpdateMessage(t *testing.T) {
	const name = "vm.example.test."
	for _, tt := range []struct {
		about           string
		step            step
		prereqs, update []string
	}{
		{"replaced, others stay",
			step{name, dns.TypeA, rrset{300, []string{"10.0.0.1", "10.0.0.2"}}, rrset{300, []string{"10.0.0.2", "10.0.0.9"}}},
			[]string{name + " 0 IN A 10.0.0.1", name + " 0 IN A 10.0.0.2"},
			[]string{name + " 0 NONE A 10.0.0.1", name + " 300 IN A 10.0.0.9"}},
		{"as it was",
			step{name, dns.TypeAAAA, rrset{300, []string{"fd00::1"}}, rrset{300, []string{"fd00::1"}}},
			[]string{name + " 0 IN AAAA fd00::1"}, nil},
		{"other TTL",
			step{name, dns.TypeAAAA, rrset{300, []string{"::ffff:10.0.0.1", "fd00::1"}}, rrset{5, []string{"::ffff:10.0.0.1", "fd00::1"}}},
			[]string{name + " 0 IN AAAA ::ffff:10.0.0.1", name + " 0 IN AAAA fd00::1"},
			[]string{name + " 5 IN AAAA ::ffff:10.0.0.1", name + " 5 IN AAAA fd00::1"}},
		{"first",
			step{"9.0.0.10.in-addr.arpa.", dns.TypePTR, rrset{}, rrset{60, []string{name}}},
			[]string{"9.0.0.10.in-addr.arpa. 0 NONE PTR"},
			[]string{"9.0.0.10.in-addr.arpa. 60 IN PTR " + name}},
		{"last",
			step{"9.0.0.10.in-addr.arpa.", dns.TypePTR, rrset{60, []string{name}}, rrset{60, nil}},
			[]string{"9.0.0.10.in-addr.arpa. 0 IN PTR " + name},
			[]string{"9.0.0.10.in-addr.arpa. 0 NONE PTR " + name}},
	} {
		m := updateMessage("example.test.", []step{tt.step})
		p, err := m.Pack()
		if err != nil {
			t.Fatalf("%s: %v", tt.about, err)
		}
		m = new(dns.Msg)
		if err := m.Unpack(p); err != nil {
			t.Fatalf("%s: %v", tt.about, err)
		}
		if m.Opcode != dns.OpcodeUpdate || m.Question[0] != (dns.Question{Name: "example.test.", Qtype: dns.TypeSOA, Qclass: dns.ClassINET}) {
			t.Errorf("%s: %v", tt.about, m)
		}
		var prereqs []string
		for _, l := range lines(m.Answer) {
			prereqs = append(prereqs, strings.TrimPrefix(l, "; "))
		}
		if !slices.Equal(prereqs, tt.prereqs) || !slices.Equal(lines(m.Ns), tt.update) {
			t.Errorf("%s: prerequisites %q, update %q", tt.about, prereqs, lines(m.Ns))
		}
	}
}

func TestEditsOfOneRRsetAreOne(t *testing.T) {
	var all edits
	all.add("a.", edit{"vm.a.", dns.TypeA, func(s rrset) (rrset, error) { return s.without("10.0.0.1").with("10.1.0.1"), nil }})
	all.add("b.", edit{"vm.b.", dns.TypeA, func(s rrset) (rrset, error) { return s, nil }})
	all.add("a.", edit{"vm.a.", dns.TypeAAAA, func(s rrset) (rrset, error) { return s, nil }})
	all.add("a.", edit{"vm.a.", dns.TypeA, func(s rrset) (rrset, error) { return s.without("10.0.0.2").with("10.1.0.2"), nil }})
	if !slices.Equal(all.zones, []string{"a.", "b."}) || len(all.inZone["a."]) != 2 || len(all.inZone["b."]) != 1 {
		t.Fatalf("edits %+v", all)
	}
	before := rrset{300, []string{"10.0.0.1", "10.0.0.2"}}
	after, err := all.inZone["a."][0].change(before)
	if err != nil || !after.equal(rrset{300, []string{"10.1.0.1", "10.1.0.2"}}) {
		t.Errorf("%v, %v", after, err)
	}
	if !before.equal(rrset{300, []string{"10.0.0.1", "10.0.0.2"}}) {
		t.Errorf("the records before became %v", before)
	}

	all.add("b.", edit{"vm.b.", dns.TypeA, func(s rrset) (rrset, error) { return s, ErrChanged }})
	all.add("b.", edit{"vm.b.", dns.TypeA, func(s rrset) (rrset, error) { return s.with("10.0.0.3"), nil }})
	if _, err := all.inZone["b."][0].change(before); !errors.Is(err, ErrChanged) {
		t.Errorf("error %v of the edit between is lost", err)
	}
}

func TestCheckMove(t *testing.T) {
	old4, old6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	for _, tt := range []struct {
		from, to netip.Addr
		ok       bool
	}{
		{old4, netip.MustParseAddr("10.1.0.1"), true},
		{old6, netip.MustParseAddr("fd01::1"), true},
		{old4, netip.Addr{}, false},
		{netip.Addr{}, netip.MustParseAddr("10.1.0.1"), false},
		{old4, netip.MustParseAddr("fd01::1"), false},
		{old6, netip.MustParseAddr("10.1.0.1"), false},
		{old6, netip.MustParseAddr("::ffff:10.1.0.1"), false},
		{old6, netip.MustParseAddr("fe80::1%eth0"), false},
	} {
		recs := []Record{{Name: "vm.example.test.", Address: tt.from}}
		err := checkMove(recs, map[netip.Addr]netip.Addr{tt.from: tt.to})
		if (err == nil) != tt.ok {
			t.Errorf("%v to %v: %v", tt.from, tt.to, err)
		}
	}
	if err := checkMove([]Record{{Name: "vm.example.test.", Address: old4}}, nil); err == nil || !strings.Contains(err.Error(), "vm.example.test. has 10.0.0.1") {
		t.Errorf("error %v", err)
	}
}
