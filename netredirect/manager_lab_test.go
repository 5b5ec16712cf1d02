//go:build lab

package netredirect

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPlaceRefusesWhatIsNotTheVMs gives a peer that asks to redirect addresses of
// the host itself, or the tunnel's own ends, nothing.
func TestPlaceRefusesWhatIsNotTheVMs(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	from := addr("203.0.113.2")
	nics := []NIC{{MAC: "52:54:00:00:00:01", Bridge: "br0", Tap: "v0"}}
	for address, own := range map[string]bool{
		"192.0.2.1": true, "2001:db8:1::1": true, "198.51.100.1": true, // of any device
		"203.0.113.1": true, "203.0.113.2": true, // the tunnel's ends
		"192.0.2.10": false, "2001:db8:1::10": false, "10.1.2.3": false, "2001:db8:77::1": false,
	} {
		ask := Ask{Options: Options{Kind: QUIC}, Outer: from, NICs: []NIC{{MAC: "52:54:00:00:00:01", Addresses: []netip.Addr{addr(address)}}}}
		s.must(func() error {
			offer, err := m.Answer(ask, nics, from)
			if err != nil {
				return err
			}
			if refused := len(offer.Steps) == 0; refused != own {
				t.Errorf("%s is refused: %v, with %v", address, refused, offer.Findings)
			}
			return nil
		})
	}
}

// TestPoolLeavesOutTheHostsOwn chooses new addresses on a network where the
// host has one, and knows its neighbours.
func TestPoolLeavesOutTheHostsOwn(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	m.Pool = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:1::/64")}
	s.sh("ip neigh add 192.0.2.2 lladdr 52:54:00:00:00:99 dev br0 nud stale")
	n := only(web(false), "10.0.0.1", "10.0.0.2", "2001:db8:77::1")
	s.must(func() error {
		mapped, err := m.map1to1([]hostNIC{n})
		for own, want := range map[string]string{"10.0.0.1": "192.0.2.3", "10.0.0.2": "192.0.2.4", "2001:db8:77::1": "2001:db8:1::2"} {
			if mapped[addr(own)] != addr(want) {
				t.Errorf("%s is mapped to %v, not %s", own, mapped[addr(own)], want)
			}
		}
		return err
	})
}

// TestNewAddressesAreOfTheNICsNetwork chooses new addresses for a VM on two
// bridges, of which only one has IPv6 addresses in the pool.
func TestNewAddressesAreOfTheNICsNetwork(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	m.Pool = nets("192.0.2.96/27", "198.51.100.96/27", "2001:db8:1::60/124")
	ask := []NIC{{MAC: "52:54:00:00:00:01", Addresses: addrs("10.0.0.1", "2001:db8:77::1")}, {MAC: "52:54:00:00:00:02", Addresses: addrs("10.1.0.1", "2001:db8:78::1")}}
	here := []NIC{{MAC: "52:54:00:00:00:02", Bridge: "br1", Tap: "w0"}, {MAC: "52:54:00:00:00:01", Bridge: "br0", Tap: "v0"}}
	s.must(func() error {
		nics, err := m.place("u", ask, here)
		if err != nil {
			return err
		}
		mapped, err := m.map1to1(nics)
		r := &record{}
		r.setNICs(nics) // as the journal keeps them
		added := map[string]string{}
		for _, step := range planDestination(destinationNeeds{device: "wmqtest", nics: r.hostNICs(), mapped: mapped}).Stay {
			if step.Address != nil {
				added[step.Address.Prefix.Addr().String()] = step.Address.Dev
			}
		}
		want := map[string]string{"192.0.2.97": "br0", "198.51.100.97": "br1", "2001:db8:1::61": "br0", "2001:db8:1::62": "br0"}
		if !maps.Equal(added, want) || mapped[addr("10.1.0.1")] != addr("198.51.100.97") {
			t.Errorf("the new addresses are at %v, not %v: %v", added, want, mapped)
		}
		return err
	})
}

// TestTwoRedirectsGetAddressesApart gives no address of the pool twice.
func TestTwoRedirectsGetAddressesApart(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	m.Pool = []netip.Prefix{netip.MustParsePrefix("203.0.113.96/31")}
	n := only(web(false), "10.0.0.1")
	seen := map[netip.Addr]bool{}
	for i := range 3 {
		s.must(func() error {
			mapped, err := m.map1to1([]hostNIC{n})
			if (err != nil) != (i == 2) {
				t.Errorf("redirect %d: %v, %v", i, mapped, err)
			}
			if to := mapped[addr("10.0.0.1")]; i < 2 && seen[to] {
				t.Errorf("%s is given twice", to)
			} else {
				seen[to] = true
			}
			m.redirects[fmt.Sprint(i)] = m.newRedirect(&record{Move: fmt.Sprint(i), Mapped: mapped})
			return nil
		})
	}
}

// TestSourceAsksFirst has the source of a VM ask how its tunnel stands before
// this host was told that the VM has come.
func TestSourceAsksFirst(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	x := m.newRedirect(&record{Move: "a", Peer: "p", Role: Destination, State: Standing, Mode: Keep, Kind: QUIC, Device: "wmqtest",
		Options: Options{Kind: QUIC, Max: time.Hour, Quiet: time.Minute}})
	x.setNICs([]hostNIC{web(true)})
	m.redirects["a"] = x
	ask := func() (reply syncReply) {
		s.must(func() error {
			answer, err := m.Inquire(t.Context(), Peer{ID: "p"}, "a", opSync, []byte(`{}`))
			if err == nil {
				reply = answer.(syncReply)
			}
			return err
		})
		return reply
	}
	if reply := ask(); reply.Remove || len(reply.Waits) != 1 {
		t.Errorf("a tunnel that has just come into use: %+v", reply)
	}
	x.Deadline = time.Now().Add(-time.Second)
	if reply := ask(); !reply.Remove {
		t.Errorf("after its longest time: %+v", reply)
	}
}

// TestResizeIsForAllThatShare changes the size of a tunnel that two redirects
// use, as the second is made ready.
func TestResizeIsForAllThatShare(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	var all []*redirect
	for _, move := range []string{"a", "b"} {
		x := m.newRedirect(&record{Move: move, Peer: "p", Role: Destination, State: Standing, Kind: QUIC, Device: "wmqtest",
			Local: addr("203.0.113.1"), Remote: addr("203.0.113.2"), MTU: 1400})
		x.Plan.Tunnel = planTunnel(tunnelFacts{kind: QUIC, device: x.Device, local: x.Local, remote: x.Remote, mtu: x.MTU})
		m.redirects[move] = x
		all = append(all, x)
	}
	s.must(func() error {
		_, err := m.Serve(context.Background(), Arrival{VM: VM{Move: "b"}, Peer: Peer{ID: "p"}}, opResize, []byte(`{"mtu":1300}`))
		return err
	})
	for _, x := range all {
		if x.MTU != 1300 || x.Plan.Tunnel[0].Device.MTU != 1300 {
			t.Errorf("%s: %d, planned %d", x.Move, x.MTU, x.Plan.Tunnel[0].Device.MTU)
		}
	}
	for _, mtu := range []string{"-1", "0", "575", "9217", "1e9", "null"} {
		s.must(func() error {
			_, err := m.Serve(context.Background(), Arrival{VM: VM{Move: "b"}, Peer: Peer{ID: "p"}}, opResize, []byte(`{"mtu":`+mtu+`}`))
			if err == nil || errors.Is(err, ErrUnknown) {
				t.Errorf("MTU %s: %v", mtu, err)
			}
			return nil
		})
	}
}

// TestAnswer asks what a redirect to this host would be, where the VM is at home
// and where it is foreign.
func TestAnswer(t *testing.T) {
	s := planSite(t)
	s.sh("echo 1 > /proc/sys/net/ipv4/ip_forward")
	m := s.manager()
	m.Mode, m.Pool = New, []netip.Prefix{netip.MustParsePrefix("203.0.113.96/31")}
	from := addr("203.0.113.2")
	nics := []NIC{{MAC: "52:54:00:00:00:01", Bridge: "br0"}}
	kind := Auto
	answer := func(from netip.Addr, list ...string) (offer Offer) {
		ask := Ask{Options: Options{Kind: kind}, Outer: addr("203.0.113.2"), NICs: []NIC{{MAC: "52:54:00:00:00:01", Bridge: "no/such bridge", Tap: "\n", Addresses: addrs(list...)}}}
		s.must(func() (err error) {
			offer, err = m.Answer(ask, nics, from)
			return err
		})
		if err := offer.Validate(); err != nil {
			t.Errorf("its own answer is refused: %v", err)
		}
		for _, step := range offer.Steps {
			if strings.HasPrefix(step, "#") || strings.Contains(step, "no/such") {
				t.Errorf("it would type %q", step)
			}
		}
		return offer
	}
	if o := answer(from, "192.0.2.10", "2001:db8:1::10"); len(o.Findings) != 1 || !strings.Contains(o.Findings[0].Remedy, "net.ipv6.conf.all.forwarding") {
		t.Errorf("IPv6 is not forwarded here: %+v", o.Findings)
	}
	s.sh("echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
	if o := answer(from, "192.0.2.10", "2001:db8:1::10"); o.Mode != Keep || len(o.Mapped) != 0 || len(o.Steps) < 10 || len(o.Findings) != 0 || o.NAT || o.Outer != addr("203.0.113.1") {
		t.Errorf("at home: %+v", o)
	}
	if o := answer(from, "10.0.0.1"); o.Mode != New || o.Mapped[addr("10.0.0.1")] != addr("203.0.113.96") || len(o.Findings) == 0 {
		t.Errorf("foreign: %+v", o)
	}
	if o := answer(from, "10.0.0.1", "10.0.0.2", "10.0.0.3"); len(o.Steps) != 0 || len(o.Findings) != 1 || !o.Findings[0].Fatal {
		t.Errorf("more than the pool has: %+v", o)
	}
	if o := answer(addr("203.0.113.7"), "192.0.2.10"); !o.NAT || len(o.Findings) != 0 {
		t.Errorf("behind address translation: %+v", o)
	}
	kind = IPIPUser
	if o := answer(addr("203.0.113.7"), "192.0.2.10"); len(o.Findings) != 1 || !o.Findings[0].Fatal {
		t.Errorf("IP-in-IP by name behind address translation: %+v", o)
	}
	kind = Auto
	nics[0].MAC = "52:54:00:00:00:09"
	if o := answer(from, "192.0.2.10"); len(o.Steps) != 0 || len(o.Findings) != 1 {
		t.Errorf("no such interface here: %+v", o)
	}
	s.must(func() error {
		if _, err := m.Answer(Ask{Options: Options{Kind: Auto}, NICs: make([]NIC, 1000)}, nics, from); err == nil {
			t.Error("a thousand interfaces are accepted")
		}
		return nil
	})
}

// TestOpenRefusesBeforeItChanges asks for what can't be, and looks that nothing
// has come of it.
func TestOpenRefusesBeforeItChanges(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	s.sh("ip link add " + deviceName("p", IPIP) + " type bridge")
	before := s.dump()
	arrival := Arrival{VM: VM{Move: "a", UUID: "u"}, Peer: Peer{ID: "p", Address: addr("203.0.113.2")}, NICs: []NIC{{MAC: "52:54:00:00:00:01", Bridge: "br0", Tap: "v0"}}}
	open := func(mac, address, kind string) string {
		return `{"kind":"` + kind + `","mtu":1400,"options":{"kind":"auto"},"nics":[{"mac":"` + mac + `","bridge":"lo","tap":"lo","addresses":["` + address + `"]}]}`
	}
	for name, c := range map[string]struct{ op, body string }{
		"the host's address":   {opOpen, open("52:54:00:00:00:01", "192.0.2.1", "quic")},
		"the peer's address":   {opOpen, open("52:54:00:00:00:01", "203.0.113.2", "quic")},
		"loopback":             {opOpen, open("52:54:00:00:00:01", "127.0.0.1", "quic")},
		"IPv4 in IPv6":         {opOpen, open("52:54:00:00:00:01", "::ffff:192.0.2.10", "quic")},
		"an interface of none": {opOpen, open("52:54:00:00:00:09", "192.0.2.10", "quic")},
		"a device of others":   {opOpen, open("52:54:00:00:00:01", "192.0.2.10", "ipip")},
		"no kind":              {opOpen, open("52:54:00:00:00:01", "192.0.2.10", "gre")},
		"not opened":           {opArm, `{}`},
		"no size to change":    {opResize, `{"mtu":1400}`},
		"no operation":         {"reboot", `{}`},
		"no message":           {opOpen, `[`},
		"nothing":              {opOpen, ``},
	} {
		s.must(func() error {
			if _, err := m.Serve(context.Background(), arrival, c.op, []byte(c.body)); err == nil {
				t.Errorf("%s: accepted", name)
			}
			return nil
		})
		if len(m.redirects) != 0 {
			t.Errorf("%s: a redirect is left", name)
		}
	}
	sameDump(t, "after", before, s.dump())
	if records, err := m.journal.all(); err != nil || len(records) != 0 {
		t.Errorf("journal: %v, %v", records, err)
	}
	for _, peer := range []string{"p", ""} { // ends what is not there, and asks of it
		if _, err := m.Inquire(t.Context(), Peer{ID: peer}, "a", opSync, []byte(`{}`)); !errors.Is(err, ErrUnknown) {
			t.Errorf("asked by %q: %v", peer, err)
		}
		if _, err := m.Serve(context.Background(), arrival, opEnd, []byte(`[`)); err != nil {
			t.Errorf("ended: %v", err)
		}
	}
	m.redirects["a"] = m.newRedirect(&record{Move: "a", Peer: "p", Role: Destination, State: Standing})
	if _, err := m.Inquire(t.Context(), Peer{ID: "other"}, "a", opEnd, []byte(`{}`)); !errors.Is(err, ErrUnknown) {
		t.Errorf("another peer ends it: %v", err)
	}
}

// TestGuestClaimsAHostsAddress has a VM at its source say that it has the
// host's address, or the other host's.
func TestGuestClaimsAHostsAddress(t *testing.T) {
	s := planSite(t)
	s.sh("echo 1 > /proc/sys/net/ipv4/ip_forward")
	m := s.manager()
	peer := addr("203.0.113.2")
	for address, ok := range map[string]bool{"192.0.2.10": true, "192.0.2.1": false, "203.0.113.1": false, "203.0.113.2": false} {
		s.must(func() error {
			ask, findings := m.Ask(Options{Kind: Auto}, "", []NIC{{MAC: "52:54:00:00:00:01", Bridge: "br0", Tap: "v0", Addresses: addrs(address)}}, peer)
			if (len(ask.NICs) == 1) != ok || len(findings) == 0 != ok {
				t.Errorf("%s: %+v, %+v", address, ask.NICs, findings)
			}
			return nil
		})
	}
}

// TestKilledWhileItsTunnelEnds has the agent end at each point of a tunnel's
// removal: the next start goes on with it, and the VM is served as before.
func TestKilledWhileItsTunnelEnds(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	stand := func(move string) *redirect {
		x := m.newRedirect(&record{Move: move, VM: "web", Peer: "p", Role: Destination, State: Standing, Kind: QUIC, Device: "wmqtest", Slot: 0, Priority: topPriority,
			Options: Options{Kind: QUIC}})
		x.setNICs([]hostNIC{web(false)})
		m.redirects[move] = x
		x.Plan = planDestination(x.needs(EgressTunnel))
		x.Plan.Tunnel = planTunnel(tunnelFacts{kind: QUIC, device: x.Device, local: addr("203.0.113.1"), remote: addr("203.0.113.2"), mtu: 1380})
		s.must(func() (err error) {
			if x.Plan.Stay, err = m.rememberSysctls(x.Plan.Stay); err == nil {
				_, err = s.net.ApplyAll(context.Background(), x.Plan.steps())
			}
			return errors.Join(err, x.respond())
		})
		return x
	}
	before := s.dump()
	x := stand("a")
	during := s.dump()
	s.must(func() error { return x.endTunnel("it is not used") })
	served := s.dump()
	if served == during || served == before || x.Ending {
		t.Fatalf("the tunnel's end changed nothing, or too much:\n%s", served)
	}
	s.must(func() error { return m.removeLocked(x, "the test") })
	sameDump(t, "removed", before, s.dump())

	undo := len(x.Plan.Tunnel) + len(x.Plan.Arm)
	for _, undone := range []int{0, 1, undo / 2, undo - 1, undo} {
		x := stand("a")
		x.State, x.Ending = Resident, true
		x.silence() // as its agent is gone
		s.must(func() error {
			all := slices.Concat(x.Plan.Tunnel, x.Plan.Arm)
			return errors.Join(m.journal.put(&x.record), s.net.RevertAll(context.Background(), all[undo-undone:]))
		})
		records, err := m.journal.all()
		if err != nil || len(records) != 1 {
			t.Fatalf("journal: %v, %v", records, err)
		}
		again := m.newRedirect(records[0])
		m.redirects["a"] = again
		s.must(func() error { m.restore(again); return nil })
		sameDump(t, fmt.Sprintf("killed after %d of %d steps", undone, undo), served, s.dump())
		s.must(func() error { return m.removeLocked(again, "the test") })
		sameDump(t, "removed", before, s.dump())
	}
}

// TestFollowersAreVouchedFor asks for the packets of a VM that lives here.
func TestFollowersAreVouchedFor(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	m.NICs = func(context.Context, string) ([]NIC, error) {
		return []NIC{{MAC: web(false).MAC, Bridge: "br0", Tap: "v0"}}, nil
	}
	m.Present = func(ctx context.Context, _ string) (bool, error) { // what lives waits here
		<-ctx.Done()
		return true, ctx.Err()
	}
	x := m.newRedirect(&record{Move: "a", VM: "web", UUID: "u", Peer: "between", Role: Destination, State: Standing, Mode: Keep, Priority: topPriority, Vouched: []string{"first"}, Began: time.Now()})
	x.setNICs([]hostNIC{only(web(false), "10.0.0.1")})
	x.living = true
	m.redirects["a"] = x
	before := s.dump()
	open := func(uuid, address, kind string) string {
		return `{"uuid":"` + uuid + `","kind":"` + kind + `","mtu":1400,"options":{"kind":"auto"},"nics":[{"mac":"` + web(false).MAC + `","bridge":"lo","tap":"lo","addresses":["` + address + `"]}]}`
	}
	for name, c := range map[string]struct{ peer, move, body, want string }{
		"not vouched for":     {"other", "b", open("u", "10.0.0.1", "quic"), "did not name"},
		"the one in between":  {"between", "b", open("u", "10.0.0.1", "quic"), "did not name"},
		"another VM":          {"first", "b", open("v", "10.0.0.1", "quic"), "does not live here"},
		"another address":     {"first", "b", open("u", "10.0.0.2", "quic"), "10.0.0.2"},
		"the move of another": {"first", "a", open("u", "10.0.0.1", "quic"), "already"},
		"no kind":             {"first", "b", open("u", "10.0.0.1", "gre"), "gre"},
		"no message":          {"first", "b", `[`, "message"},
		"too many vouched":    {"first", "b", `{"kind":"quic","mtu":1400,"options":{"kind":"auto"},"vouched":[` + strings.Repeat(`"",`, maxVouched) + `""]}`, "out of bounds"},
	} {
		s.must(func() error {
			_, err := m.Inquire(context.Background(), Peer{ID: c.peer, Site: c.peer, Address: addr("203.0.113.2")}, c.move, opOpen, []byte(c.body))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", name, err)
			}
			return nil
		})
		if len(m.redirects) != 1 {
			t.Fatalf("%s: there are %d redirects", name, len(m.redirects))
		}
	}
	sameDump(t, "after", before, s.dump())

	first := Peer{ID: "first", Site: "first", Address: addr("203.0.113.2")}
	s.must(func() error {
		for range 2 { // the second as after an attempt that broke off
			if _, err := m.Inquire(context.Background(), first, "b", opOpen, []byte(open("u", "10.0.0.1", "quic"))); err != nil {
				return err
			}
		}
		for _, op := range []string{opArm, opStand} {
			if _, err := m.Inquire(context.Background(), first, "b", op, []byte(`{}`)); err != nil {
				return fmt.Errorf("%s: %w", op, err)
			}
		}
		return nil
	})
	if f := m.of("b", "first"); f == nil || f.Follows != "a" || f.state() != Standing || len(f.Plan.Stay) > 0 || !x.Direct {
		t.Errorf("it does not follow: %+v", f)
	}
	if _, err := m.Inquire(context.Background(), first, "b", opOpen, []byte(open("u", "10.0.0.1", "quic"))); err == nil {
		t.Error("one that stands is opened again")
	}
}

func TestOnwardIDs(t *testing.T) {
	for move, want := range map[string]string{
		"mv-gf6klyio": "mv-gf6klyio-2", "mv-gf6klyio-2": "mv-gf6klyio-3", "mv-2": "mv-3", "mv-999": "mv-1000", "mv-1000": "mv-1000-2",
		strings.Repeat("m", 64): strings.Repeat("m", 60) + "-2",
	} {
		if got := onwardID(move); got != want || !moveID.MatchString(got) {
			t.Errorf("%s is followed by %s, not %s", move, got, want)
		}
	}
}
