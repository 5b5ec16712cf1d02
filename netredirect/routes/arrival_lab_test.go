//go:build lab

package routes

import (
	"errors"
	"net/netip"
	"testing"
	"time"
)

// awaitArrived waits, told by Changed, until Arrived says what is wanted.
func awaitArrived(t *testing.T, s *Speaker, p netip.Prefix, ours, wanted bool) {
	t.Helper()
	timeout := time.After(40 * time.Second)
	for {
		changed := s.Changed()
		got, err := s.Arrived(p, ours)
		if err != nil {
			t.Fatal(err)
		}
		if got == wanted {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			seen, err := s.Seen(p)
			t.Fatalf("%s arrived (ours: %v): %v; seen %+v, %v", p, ours, got, seen, err)
		}
	}
}

// arrived is what Arrived says now.
func arrived(t *testing.T, s *Speaker, p netip.Prefix, ours, wanted bool) {
	t.Helper()
	if got, err := s.Arrived(p, ours); err != nil || got != wanted {
		seen, _ := s.Seen(p)
		t.Errorf("%s arrived (ours: %v): %v, %v; seen %+v", p, ours, got, err, seen)
	}
}

// TestArrivedByPeers has a router that never sends a route back.
func TestArrivedByPeers(t *testing.T) {
	t.Parallel()
	c := newCable(t)
	r := c.start(ebgp4 + "protocol static elsewhere { disabled; ipv4; route " + vm4.String() + " blackhole; }\n")
	s := speak(t, Config{ASN: 65010, RouterID: c.v4(2), Peers: []Peer{{Address: c.v4(1), ASN: 65001, Local: c.v4(2)}}})
	state(t, s, true, "")
	arrived(t, s, vm4, true, false) // not announced
	if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
		t.Fatal(err)
	}
	r.has(vm4)
	awaitArrived(t, s, vm4, true, true)
	arrived(t, s, vm4, false, false)
	// Another's route that the router prefers.
	r.birdc("enable elsewhere")
	awaitArrived(t, s, vm4, true, false)
	arrived(t, s, vm4, false, true)
	r.birdc("disable elsewhere")
	awaitArrived(t, s, vm4, true, true)
	r.kill()
	awaitArrived(t, s, vm4, true, false)
}

// TestArrivedBySight has a session that only listens, by which the router sends
// a host its own route, too.
func TestArrivedBySight(t *testing.T) {
	t.Parallel()
	for name, hop := range map[string]string{"own next hop": "", "the router's next hop": "next hop self; next hop address R4;"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCable(t)
			r := c.start(ebgp4 + "protocol bgp host6 { local R6 as 65001; neighbor H6 as 65010; ipv4 { import all; export all; " + hop + " }; }\n" +
				"protocol bgp host3 { local R4 as 65001; neighbor S4 as 65020; " + channels + " }\n")
			s := speak(t, Config{ASN: 65010, RouterID: c.v4(2), Peers: []Peer{
				{Address: c.v4(1), ASN: 65001, Local: c.v4(2)}, {Address: c.v6(1), ASN: 65001, Local: c.v6(2), Watch: true}}})
			for _, ours := range []bool{true, false} {
				arrived(t, s, vm4, ours, false)
			}
			if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
				t.Fatal(err)
			}
			seen := awaitSeen(t, s, vm4, true)[0]
			if want := map[bool]netip.Addr{true: c.v4(2), false: c.v4(1)}[hop == ""]; seen.NextHop != want || seen.Peer != c.v6(1) {
				t.Fatalf("the router sends %+v", seen)
			}
			arrived(t, s, vm4, true, true)
			arrived(t, s, vm4, false, false)
			if err := s.Withdraw(ctx, []netip.Prefix{vm4}); err != nil {
				t.Fatal(err)
			}
			r.lacks(vm4)
			awaitSeen(t, s, vm4, false)

			// The lab's hosts are one: of the other site is a next hop that is nobody's.
			other := speakElsewhere(t, speakerArgs{Config: Config{ASN: 65020, RouterID: c.v4(3), NextHop4: c.v4(7),
				Peers: []Peer{{Address: c.v4(1), ASN: 65001, Local: c.v4(3)}}}})
			other.tell("announce", vm4)
			awaitArrived(t, s, vm4, false, true)
			arrived(t, s, vm4, true, false)
			other.tell("withdraw", vm4)
			awaitArrived(t, s, vm4, false, false)
		})
	}
}

// TestNotArrivedAtAClosedSpeaker tells an error from "not yet".
func TestNotArrivedAtAClosedSpeaker(t *testing.T) {
	t.Parallel()
	s := speak(t, Config{ASN: 65010, RouterID: netip.MustParseAddr("10.0.0.1"), Peers: []Peer{{Address: netip.MustParseAddr("10.0.0.2"), ASN: 65001}}})
	s.Close()
	for _, ours := range []bool{true, false} {
		if got, err := s.Arrived(vm4, ours); got || !errors.Is(err, ErrClosed) {
			t.Errorf("ours %v: %v, %v", ours, got, err)
		}
	}
}
