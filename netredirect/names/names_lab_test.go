//go:build lab

package names

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const (
	reverseOld = "5.0.10.10.in-addr.arpa"
	reverseNew = "9.0.20.10.in-addr.arpa"
)

func (s *site) find(t *testing.T, names ...string) []Record {
	t.Helper()
	recs, err := s.Find(t.Context(), names, []netip.Addr{vm4, vm6})
	if err != nil {
		t.Fatal(err)
	}
	return recs
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fails checks the error's kind, and that it tells the operator these things.
func fails(t *testing.T, err, kind error, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want %v", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not tell %q", err, w)
		}
	}
}

// everywhere fails the test unless each row is as moved says.
func (s *site) everywhere(t *testing.T, recs []Record, moved bool) {
	t.Helper()
	eventually(t, fmt.Sprintf("every server has moved: %v", moved), func() bool {
		rows, err := s.Status(t.Context(), recs, moves)
		must(t, err)
		return len(rows) > 0 && !slices.ContainsFunc(rows, func(r ServerStatus) bool { return r.Moved != moved || r.Problem != "" })
	})
}

func TestMoveAndBack(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "VM.example.test")
	if len(recs) != 2 || recs[0].TTL != 300 || recs[0].Zone != "example.test." || recs[0].Pointer == nil || recs[1].Pointer == nil {
		t.Fatalf("found %+v", recs)
	}
	// The caller keeps them in its journal.
	b, err := json.Marshal(recs)
	must(t, err)
	recs = nil
	must(t, json.Unmarshal(b, &recs))

	for range 2 { // a repetition changes nothing
		must(t, s.Move(t.Context(), recs, moves))
		has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.20.0.9")
		has(t, primaryAddr, "vm.example.test", dns.TypeAAAA, "300 fd10:20::9")
		has(t, primaryAddr, reverseNew, dns.TypePTR, "300 vm.example.test.")
		has(t, primaryAddr, reverseOld, dns.TypePTR, "300 alias.example.test.", "300 away.example.net.")
		s.everywhere(t, recs, true)
		if n := serial(t, primaryAddr, "example.test"); n != 2 {
			t.Errorf("serial %d, want one update", n)
		}
	}
	has(t, secondaryAddr, "vm.example.test", dns.TypeA, "300 10.20.0.9")
	has(t, secondaryAddr, "vm.example.test", dns.TypeAAAA, "300 fd10:20::9")

	for range 2 {
		must(t, s.MoveBack(t.Context(), recs, moves))
		s.everywhere(t, recs, false)
	}
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.10.0.5")
	has(t, primaryAddr, "vm.example.test", dns.TypeAAAA, "300 fd10:10::5")
	has(t, primaryAddr, reverseNew, dns.TypePTR)
	has(t, primaryAddr, reverseOld, dns.TypePTR, "300 alias.example.test.", "300 away.example.net.", "300 vm.example.test.")
}

// Without names the PTR records give them: those of aliases and of zones of
// others are passed over.
func TestFindByAddress(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t)
	if len(recs) != 2 || recs[0].Name != "vm.example.test." || recs[0].Address != vm4 || recs[1].Address != vm6 {
		t.Fatalf("found %+v", recs)
	}
	recs, err := s.Find(t.Context(), nil, []netip.Addr{new4})
	if err != nil || len(recs) != 0 {
		t.Fatalf("found %+v, %v for an address without a name", recs, err)
	}
}

func TestFindRefuses(t *testing.T) {
	s := newSite(t, false)
	addrs := []netip.Addr{vm4}
	_, err := s.Find(t.Context(), []string{"alias.example.test"}, addrs)
	fails(t, err, ErrAlias, "alias.example.test.", "vm.example.test.")
	_, err = s.Find(t.Context(), []string{"www.example.net"}, addrs)
	fails(t, err, ErrNotServed, "www.example.net.", primaryAddr, secondaryAddr)
	_, err = s.Find(t.Context(), []string{"ns1.example.test"}, addrs)
	fails(t, err, errElsewhere, "ns1.example.test.", primaryAddr, "10.10.0.5")
	_, err = s.Find(t.Context(), []string{"nothing.example.test"}, addrs)
	fails(t, err, errElsewhere, "nothing.example.test. has nothing")

	c, err := New(Config{Servers: []string{primaryAddr}, KeyFile: s.keyFile, Zones: []string{"Unwritable.test"}})
	must(t, err)
	_, err = c.Find(t.Context(), []string{"vm.example.test"}, addrs)
	fails(t, err, ErrNotServed, "example.test.", "unwritable.test.")
	recs, err := c.Find(t.Context(), []string{"vm.unwritable.test"}, addrs)
	if err != nil || len(recs) != 1 || recs[0].Pointer != nil {
		t.Fatalf("found %+v, %v: want a record without its PTR, whose zone is not listed", recs, err)
	}
}

func TestOtherAddressesStay(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "pool.example.test", "other.example.test")
	must(t, s.Move(t.Context(), recs, moves))
	has(t, primaryAddr, "pool.example.test", dns.TypeA, "300 10.10.0.6", "300 10.10.0.7", "300 10.20.0.9")
	has(t, primaryAddr, "other.example.test", dns.TypeA, "300 10.20.0.9")
	if n := serial(t, primaryAddr, "example.test"); n != 2 {
		t.Errorf("serial %d: the zone's records did not move in one update", n)
	}
	// Another's change of the same RRset is kept.
	s.change(t, "update add pool.example.test 300 A 10.10.0.8", "update delete pool.example.test A 10.10.0.6")
	must(t, s.MoveBack(t.Context(), recs, moves))
	has(t, primaryAddr, "pool.example.test", dns.TypeA, "300 10.10.0.5", "300 10.10.0.7", "300 10.10.0.8")
}

// Two addresses of the VM at one name move together, and what one update makes
// of them does not depend on their order.
func TestTwoAddressesOfOneName(t *testing.T) {
	s := newSite(t, false)
	second, newSecond := netip.MustParseAddr("10.10.0.6"), netip.MustParseAddr("10.20.0.10")
	recs, err := s.Find(t.Context(), []string{"pool.example.test"}, []netip.Addr{second, vm4})
	must(t, err)
	to := map[netip.Addr]netip.Addr{vm4: new4, second: newSecond}
	must(t, s.Move(t.Context(), recs, to))
	has(t, primaryAddr, "pool.example.test", dns.TypeA, "300 10.10.0.7", "300 10.20.0.10", "300 10.20.0.9")
	rows, err := s.Status(t.Context(), recs, to)
	must(t, err)
	if len(rows) == 0 || !rows[0].Moved || rows[0].Name != "pool.example.test." {
		t.Errorf("status %+v", rows)
	}
}

func TestChangedBySomeoneElse(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test")
	s.change(t, "update delete vm.example.test A", "update add vm.example.test 300 A 10.99.0.1")
	untouched := func(t *testing.T) {
		t.Helper()
		has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.99.0.1")
		has(t, primaryAddr, "vm.example.test", dns.TypeAAAA, "300 fd10:10::5")
		has(t, primaryAddr, reverseNew, dns.TypePTR)
		if n := serial(t, primaryAddr, "example.test"); n != 2 {
			t.Errorf("serial %d, want only the other's update", n)
		}
	}
	fails(t, s.Move(t.Context(), recs, moves), ErrChanged, "example.test.", primaryAddr, "vm.example.test. A", "10.10.0.5", "10.99.0.1")
	untouched(t)
	fails(t, s.MoveBack(t.Context(), recs, moves), ErrChanged, "10.99.0.1")
	untouched(t)
	fails(t, s.LowerTTL(t.Context(), recs), ErrChanged, "10.99.0.1")
	untouched(t)
	must(t, s.RestoreTTL(t.Context(), recs))
	untouched(t)

	s.change(t, "update delete vm.example.test A")
	fails(t, s.Move(t.Context(), recs, moves), ErrChanged, "is nothing")
	has(t, primaryAddr, "vm.example.test", dns.TypeA)
	s.change(t, "update delete vm.example.test AAAA", "update add vm.example.test 300 CNAME pool.example.test.")
	fails(t, s.Move(t.Context(), recs, moves), ErrChanged, "pool.example.test.")
	fails(t, s.Move(t.Context(), recs, moves), ErrAlias)
	has(t, primaryAddr, "vm.example.test", dns.TypeCNAME, "300 pool.example.test.")
}

// A change that comes between the reading and the update fails the
// prerequisite, not the one who made it.
func TestPrerequisiteHolds(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test")
	changes := 0
	racing := []edit{{recs[0].Name, dns.TypeA, func(r rrset) (rrset, error) {
		if changes++; changes == 1 {
			s.change(t, "update add vm.example.test 300 A 10.10.0.77")
		}
		return r.without("10.10.0.5").with("10.20.0.9"), nil
	}}}
	must(t, s.update(t.Context(), "example.test.", racing))
	if changes != 2 {
		t.Errorf("the records were read %d times, want 2", changes)
	}
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.10.0.77", "300 10.20.0.9")

	always := []edit{{recs[0].Name, dns.TypeA, func(r rrset) (rrset, error) {
		changes++
		s.change(t, fmt.Sprintf("update add vm.example.test 300 A 10.10.0.%d", 100+changes))
		return r.with("10.20.0.10"), nil
	}}}
	fails(t, s.update(t.Context(), "example.test.", always), ErrChanged, "example.test.", primaryAddr)
}

func TestWildcard(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "web.wild.example.test")
	fails(t, s.Move(t.Context(), recs, moves), ErrChanged, "wildcard")
	has(t, primaryAddr, "web.wild.example.test", dns.TypeA, "300 10.10.0.5")
}

func TestTTLLoweredAndRestored(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test", "pool.example.test")
	for range 2 {
		must(t, s.LowerTTL(t.Context(), recs))
		// It has returned, so all have it.
		for _, server := range []string{primaryAddr, secondaryAddr} {
			has(t, server, "vm.example.test", dns.TypeA, "5 10.10.0.5")
			has(t, server, "vm.example.test", dns.TypeAAAA, "5 fd10:10::5")
			has(t, server, "pool.example.test", dns.TypeA, "5 10.10.0.5", "5 10.10.0.6", "5 10.10.0.7")
		}
	}
	must(t, s.Move(t.Context(), recs, moves))
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "5 10.20.0.9")
	s.change(t, "update add vm.example.test 77 AAAA fd10:20::9") // someone wants another TTL
	for range 2 {
		must(t, s.RestoreTTL(t.Context(), recs))
		has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.20.0.9")
		has(t, primaryAddr, "vm.example.test", dns.TypeAAAA, "77 fd10:20::9")
		has(t, primaryAddr, "pool.example.test", dns.TypeA, "300 10.10.0.6", "300 10.10.0.7", "300 10.20.0.9")
	}
}

func TestLowerTTLWaitsForEveryServer(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test")
	s.secondary.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	err := s.LowerTTL(ctx, recs)
	fails(t, err, context.DeadlineExceeded, secondaryAddr+":53", "no answer")
	if strings.Contains(err.Error(), primaryAddr) {
		t.Errorf("error %q names the primary", err)
	}
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "5 10.10.0.5")
}

// Each server has its row, at each of its addresses, and says what it has.
func TestStatusOfEveryServer(t *testing.T) {
	s := newSite(t, false)
	s.Client.servers = s.Client.servers[:1] // the zone lists the secondary
	recs := s.find(t, "other.example.test")
	// Only the primary hears of the update.
	s.secondary.stop()
	must(t, s.Move(t.Context(), recs, moves))
	rows, err := s.Status(t.Context(), recs, moves)
	must(t, err)
	want := map[string]bool{
		"10.77.0.1:53 (ns1.example.test.)": true,
		"[fd77::1]:53 (ns1.example.test.)": true,
		"10.77.0.2:53 (ns2.example.test.)": false,
	}
	for _, r := range rows {
		moved, ok := want[r.Server]
		if r.Type != "A" || r.Name != "other.example.test." {
			t.Errorf("row %+v", r)
			continue
		}
		if strings.HasPrefix(r.Server, "[2001:db8::2]") {
			if !strings.Contains(r.Problem, "unreachable") {
				t.Errorf("row %+v", r)
			}
			continue
		}
		delete(want, r.Server)
		switch {
		case !ok || r.Moved != moved:
			t.Errorf("row %+v", r)
		case moved && (r.Serial != 2 || r.TTL != 300 || !slices.Equal(r.Answer, []string{"10.20.0.9"}) || r.Problem != ""):
			t.Errorf("row %+v", r)
		case !moved && !strings.Contains(r.Problem, "no answer"):
			t.Errorf("row %+v", r)
		}
	}
	if len(want) > 0 {
		t.Errorf("no row of %v", want)
	}
	s.secondary.start(t)
	s.change(t, "update add another.example.test 300 A 10.10.0.99") // notifies it
	s.everywhere(t, recs, true)
}

func TestKeyRefused(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test")
	for _, tt := range []struct {
		name, key string
		kind      error
		words     []string
	}{
		{"wrong secret", generateKey(t, "wanmig.", "hmac-sha256"), ErrKey, []string{"BADSIG", "wanmig", primaryAddr, "example.test."}},
		{"wrong algorithm", generateKey(t, "wanmig.", "hmac-sha512"), ErrKey, []string{"BADKEY", "hmac-sha512"}},
		{"unknown", generateKey(t, "nobody.", "hmac-sha256"), ErrKey, []string{"BADKEY", "nobody"}},
		{"right", s.key, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := writeKey(t, tt.key)
			err := s.client(t, file, false).Move(t.Context(), recs, moves)
			if tt.kind == nil {
				must(t, err)
				return
			}
			fails(t, err, tt.kind, append(tt.words, file)...)
			has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.10.0.5")
		})
	}
}

func TestClockSkew(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test")
	s.Client.clock = func() time.Time { return time.Now().Add(-time.Hour) }
	fails(t, s.Move(t.Context(), recs, moves), ErrClock, "BADTIME", "NTP", time.Now().UTC().Format("2006-01-02 15:"))
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.10.0.5")
	s.Client.clock = func() time.Time { return time.Now().Add(time.Hour) }
	fails(t, s.Move(t.Context(), recs, moves), ErrClock)
	s.Client.clock = func() time.Time { return time.Now().Add(-time.Minute) }
	must(t, s.Move(t.Context(), recs, moves))
}

func TestUpdateRefused(t *testing.T) {
	s := newSite(t, false)
	for _, name := range []string{"vm.unwritable.test", "vm.other-key.test"} {
		recs := s.find(t, name)
		fails(t, s.Move(t.Context(), recs, moves), ErrRefused, "REFUSED", recs[0].Zone, primaryAddr, "allow-update", "wanmig")
		has(t, primaryAddr, name, dns.TypeA, "300 10.10.0.5")
	}
}

// A zone that refuses does not hold the others back.
func TestZonesAreApart(t *testing.T) {
	s := newSite(t, false)
	recs := append(s.find(t, "vm.unwritable.test"), s.find(t, "vm.example.test")...)
	err := s.Move(t.Context(), recs, moves)
	fails(t, err, ErrRefused, "unwritable.test.")
	if errors.Is(err, ErrReverse) {
		t.Errorf("error %q is said to be about PTR records only", err)
	}
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.20.0.9")
	has(t, primaryAddr, reverseNew, dns.TypePTR, "300 vm.example.test.")
}

func TestSecondaryListedFirst(t *testing.T) {
	s := newSite(t, true)
	recs := s.find(t, "vm.example.test")
	must(t, s.Move(t.Context(), recs, moves))
	s.everywhere(t, recs, true)
}

// A stale secondary is no witness: only the primary says that all is done, or
// that someone else has changed it.
func TestStaleSecondaryIsNoWitness(t *testing.T) {
	s := newSite(t, true)
	recs := s.find(t, "vm.example.test")
	must(t, s.Move(t.Context(), recs, moves))
	s.everywhere(t, recs, true)
	// With the primary away the secondary cannot follow; it still says "moved".
	s.primary.stop()
	err := s.Move(t.Context(), recs, moves)
	fails(t, err, ErrSilent, "update example.test. at "+primaryAddr+":53", "UDP", "TCP", "update example.test. at "+secondaryAddr+":53")
	if !errors.Is(err, ErrKey) && !errors.Is(err, ErrRefused) {
		t.Errorf("error %q does not tell that the secondary refused", err)
	}
}

func TestPrimaryDown(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test")
	s.primary.stop()
	if again := s.find(t, "vm.example.test"); len(again) != 2 {
		t.Errorf("the secondary gave %+v", again)
	}
	fails(t, s.Move(t.Context(), recs, moves), ErrSilent, primaryAddr+":53", secondaryAddr+":53")
	rows, err := s.Status(t.Context(), recs, moves)
	must(t, err)
	var down, up int
	for _, r := range rows {
		switch {
		case strings.HasPrefix(r.Server, primaryAddr):
			down++
			if !strings.Contains(r.Problem, "no answer") {
				t.Errorf("row %+v", r)
			}
		case strings.HasPrefix(r.Server, secondaryAddr):
			up++
			if r.Problem != "" || r.Moved || len(r.Answer) == 0 && r.Type != "PTR" {
				t.Errorf("row %+v", r)
			}
		}
	}
	if down == 0 || up == 0 {
		t.Errorf("%d rows of the primary, %d of the secondary: %+v", down, up, rows)
	}
	s.primary.start(t)
	must(t, s.Move(t.Context(), recs, moves))
	s.everywhere(t, recs, true)
}

func TestAllServersDown(t *testing.T) {
	s := newSite(t, false)
	recs := s.find(t, "vm.example.test")
	c, err := New(Config{Servers: []string{mutedAddr}, KeyFile: s.keyFile, Timeout: 300 * time.Millisecond})
	must(t, err)
	_, err = c.Find(t.Context(), []string{"vm.example.test"}, []netip.Addr{vm4})
	fails(t, err, ErrSilent, mutedAddr+":53", "UDP", "TCP", "refused")
	fails(t, c.Move(t.Context(), recs, moves), ErrSilent, mutedAddr+":53")
	rows, err := c.Status(t.Context(), recs, moves)
	must(t, err)
	if len(rows) == 0 || slices.ContainsFunc(rows, func(r ServerStatus) bool { return r.Problem == "" || r.Moved }) {
		t.Errorf("status %+v", rows)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	fails(t, s.Move(ctx, recs, moves), context.Canceled)
	_, err = s.Status(ctx, recs, moves)
	fails(t, err, context.Canceled)
}

// The reverse zone of the new address is somebody else's: the names move.
func TestReverseZoneNotServed(t *testing.T) {
	s := newSite(t, false)
	recs, err := s.Find(t.Context(), []string{"vm.example.test"}, []netip.Addr{vm4})
	must(t, err)
	to := map[netip.Addr]netip.Addr{vm4: netip.MustParseAddr("192.0.2.9")}
	fails(t, s.Move(t.Context(), recs, to), ErrReverse, "vm.example.test.", "9.2.0.192.in-addr.arpa.")
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 192.0.2.9")
	has(t, primaryAddr, reverseOld, dns.TypePTR, "300 alias.example.test.", "300 away.example.net.", "300 vm.example.test.")
	must(t, s.MoveBack(t.Context(), recs, to))
	has(t, primaryAddr, "vm.example.test", dns.TypeA, "300 10.10.0.5")
}

func TestClasslessReverseZone(t *testing.T) {
	s := newSite(t, false)
	recs, err := s.Find(t.Context(), []string{"vm.example.test"}, []netip.Addr{vm4})
	must(t, err)
	classless := netip.MustParseAddr("10.30.0.9")
	to := map[netip.Addr]netip.Addr{vm4: classless}
	must(t, s.Move(t.Context(), recs, to))
	has(t, primaryAddr, "9.0-127.0.30.10.in-addr.arpa", dns.TypePTR, "300 vm.example.test.")
	if n := serial(t, primaryAddr, "30.10.in-addr.arpa"); n != 1 {
		t.Errorf("the parent zone was changed: serial %d", n)
	}
	// From there it goes on: the record that Find makes has the alias's target.
	recs, err = s.Find(t.Context(), nil, []netip.Addr{classless})
	must(t, err)
	if len(recs) != 1 || recs[0].Pointer == nil || recs[0].Pointer.Name != "9.0-127.0.30.10.in-addr.arpa." {
		t.Fatalf("found %+v", recs)
	}
	must(t, s.Move(t.Context(), recs, map[netip.Addr]netip.Addr{classless: new4}))
	has(t, primaryAddr, "9.0-127.0.30.10.in-addr.arpa", dns.TypePTR)
	has(t, primaryAddr, reverseNew, dns.TypePTR, "300 vm.example.test.")
}

// 150 addresses do not fit into one datagram.
func TestLargeRRset(t *testing.T) {
	s := newSite(t, false)
	add := []string{"ttl 300"}
	for i := range 150 {
		add = append(add, fmt.Sprintf("update add pool.example.test A 10.50.0.%d", i))
	}
	s.change(t, add...)
	recs := s.find(t, "pool.example.test")
	must(t, s.LowerTTL(t.Context(), recs))
	must(t, s.Move(t.Context(), recs, moves))
	got := answers(t, primaryAddr, "pool.example.test", dns.TypeA)
	if len(got) != 153 || !slices.Contains(got, "5 10.20.0.9") || slices.Contains(got, "5 10.10.0.5") {
		t.Errorf("%d addresses: %v", len(got), got)
	}
	s.everywhere(t, recs, true)

	for i := range 150 {
		add[1+i] = fmt.Sprintf("update add pool.example.test A 10.51.0.%d", i)
	}
	s.change(t, add...)
	fails(t, s.Move(t.Context(), recs, moves), ErrAnswer, "256")
}
