//go:build lab

package hostnet

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

const vmMAC = "52:54:00:00:00:01"

const redirectBody = `	chain prerouting {
		type filter hook prerouting priority -300; policy accept;
		ether daddr 52:54:00:00:00:01 ether daddr set 02:00:00:00:00:01 meta pkttype set host
	}`

const clampBody = `	counter out { }
	chain forward {
		type filter hook forward priority mangle; policy accept;
		oifname "up0" counter name out
		oifname "up0" tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
	}`

// plan has steps of each kind that this kernel can make, for bridgeSite.
func plan() []Step {
	return []Step{
		{Device: &Device{Name: "wm0", Kind: KindTUN}},
		{Sysctl: &Sysctl{Key: "net/ipv4/conf/br0/rp_filter", Value: "2", Was: "0"}},
		{Sysctl: &Sysctl{Key: "net/ipv6/conf/br0/proxy_ndp", Value: "1", Was: "0"}},
		{Address: &Address{Dev: "br0", Prefix: prefix("203.0.113.7/32")}},
		{Address: &Address{Dev: "br0", Prefix: prefix("2001:db8:7::7/128")}},
		{Route: &Route{Table: 11901, Dst: prefix("192.0.2.5/32"), Dev: "up0", Source: addr("198.51.100.1"), MTU: 1400}},
		{Route: &Route{Table: 11901, Dst: prefix("2001:db8:1::5/128"), Dev: "up0", MTU: 1400}},
		{Route: &Route{Table: 200, Dst: prefix("0.0.0.0/0"), Dev: "up0", Via: addr("198.51.100.254")}},
		{Route: &Route{Table: 200, Dst: prefix("::/0"), Dev: "up0", Via: addr("2001:db8:2::fe")}},
		{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.5/32"), Table: 11901}},
		{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.6/32"), Table: 11901}},
		{Rule: &Rule{Priority: 1190, From: prefix("192.0.2.5/32"), Mark: 0x100, Mask: 0xff00, Table: 200}},
		{Rule: &Rule{Priority: 1190, To: prefix("2001:db8:1::5/128"), IIf: "wm0", Table: 11901}},
		{Rule: &Rule{Priority: 1191, From: prefix("::/0"), Mark: 0x100, Mask: 0x100, Table: 200}},
		{Neighbour: &Neighbour{Dev: "br0", IP: addr("192.0.2.5"), MAC: vmMAC}},
		{Neighbour: &Neighbour{Dev: "br0", IP: addr("2001:db8:1::5"), MAC: vmMAC}},
		{Neighbour: &Neighbour{Dev: "br0", IP: addr("192.0.2.6"), Proxy: true}},
		{Neighbour: &Neighbour{Dev: "br0", IP: addr("2001:db8:1::6"), Proxy: true}},
		{FDB: &FDB{Dev: "v0", MAC: vmMAC}},
		{Table: &Table{Family: "bridge", Name: "wanmig_0", Body: redirectBody}},
		{Table: &Table{Family: "inet", Name: "wanmig_0", Body: clampBody}},
	}
}

func TestEachStepTwiceAndBack(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	before := s.settled()
	for _, step := range plan() {
		for range 2 {
			s.Must(func() error { return h.Apply(context.Background(), step) })
		}
		if applied := s.dump(); applied == before && step.Device == nil {
			t.Errorf("%s changes nothing", step)
		}
		for range 2 {
			s.Must(func() error { return h.Revert(context.Background(), step) })
		}
		testnet.Same(t, step.String(), before, s.dump())
	}
}

// TestTypedCommandsDoTheSame types what a plan shows.
func TestTypedCommandsDoTheSame(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	before := s.settled()
	for _, step := range plan() {
		if step.Device != nil {
			continue // shown, not made
		}
		s.apply(h, step)
		applied := s.settled()
		s.revert(h, step)
		s.Sh(step.String())
		testnet.Same(t, "typed: "+step.String(), applied, s.settled())
		s.Must(func() error { return h.Apply(context.Background(), step) }) // knows it for its own
		s.Sh(step.UndoString())
		testnet.Same(t, "typed: "+step.UndoString(), before, s.settled())
	}
}

func TestPlanAppliedAndReverted(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	before := s.settled()
	steps := plan()
	for range 2 {
		s.Must(func() error {
			done, err := h.ApplyAll(context.Background(), steps)
			if err == nil && done != len(steps) {
				t.Errorf("%d of %d steps are applied", done, len(steps))
			}
			return err
		})
	}
	leftovers := func() (found []string) {
		s.Must(func() (err error) {
			found, err = h.Leftovers(context.Background())
			return err
		})
		return found
	}
	// All but the TUN, the sysctls and the FDB entry bear a mark.
	if found := leftovers(); len(found) != len(steps)-4 {
		t.Errorf("%d steps have left %d: %q", len(steps), len(found), found)
	}
	for range 2 {
		s.revert(h, steps...)
	}
	if found := leftovers(); len(found) != 0 {
		t.Errorf("left over: %q", found)
	}
	testnet.Same(t, "reverted", before, s.dump())
}

// TestHalfAppliedPlanIsReverted fails in the midst of a plan, at each step.
func TestHalfAppliedPlanIsReverted(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	before := s.settled()
	for n := range plan() {
		steps := plan()
		steps[n] = Step{Route: &Route{Table: 100, Dst: prefix("192.0.2.9/32"), Dev: "nowhere"}}
		s.Must(func() error {
			done, err := h.ApplyAll(context.Background(), steps)
			if !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "nowhere") || done != n {
				t.Errorf("step %d does not exist: %d done, %v", n, done, err)
			}
			return h.RevertAll(context.Background(), steps)
		})
	}
	testnet.Same(t, "reverted", before, s.dump())
	s.Must(func() error {
		done, err := h.ApplyAll(context.Background(), append(plan(), Step{}))
		if !errors.Is(err, ErrInvalid) || done != 0 {
			t.Errorf("a plan with an invalid step: %d done, %v", done, err)
		}
		return nil
	})
	testnet.Same(t, "invalid plan", before, s.dump())
}

// TestForeignThingsStay puts something else in the place of each step.
func TestForeignThingsStay(t *testing.T) {
	for name, c := range map[string]struct {
		foreign string
		step    Step
		names   string // part of the error
	}{
		"device of another kind":      {"ip link add wm0 type bridge", Step{Device: &Device{Name: "wm0", Kind: KindTUN}}, "bridge"},
		"tap":                         {"ip tuntap add dev wm0 mode tap", Step{Device: &Device{Name: "wm0", Kind: KindTUN}}, "wm0"},
		"device in a tunnel's place":  {"ip link add wm0 type bridge", Step{Device: &Device{Name: "wm0", Kind: KindIPIP, Local: addr("192.0.2.1"), Remote: addr("192.0.2.2")}}, "bridge"},
		"same address":                {"ip addr add 203.0.113.7/32 dev br0", Step{Address: &Address{Dev: "br0", Prefix: prefix("203.0.113.7/32")}}, "br0"},
		"address elsewhere":           {"ip addr add 203.0.113.7/24 dev up0", Step{Address: &Address{Dev: "br0", Prefix: prefix("203.0.113.7/32")}}, "up0"},
		"IPv6 address":                {"ip addr add 2001:db8:7::7/64 dev up0 nodad", Step{Address: &Address{Dev: "br0", Prefix: prefix("2001:db8:7::7/128")}}, "up0"},
		"rule of another protocol":    {"ip rule add pref 1190 to 192.0.2.5 lookup 11901", Step{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.5/32"), Table: 11901}}, "protocol 0"},
		"rule to another table":       {"ip rule add pref 1190 to 192.0.2.5 lookup 7", Step{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.5/32"), Table: 11901}}, "table 7"},
		"narrower rule of ours":       {"ip rule add pref 1190 to 192.0.2.5 iif up0 lookup 11901 protocol 119", Step{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.5/32"), Table: 11901}}, "iif up0"},
		"route of another protocol":   {"ip route add 192.0.2.5 dev up0 table 11901", Step{Route: &Route{Table: 11901, Dst: prefix("192.0.2.5/32"), Dev: "up0"}}, "proto 3"},
		"route elsewhere":             {"ip route add 192.0.2.5 dev br0 table 11901 proto 119", Step{Route: &Route{Table: 11901, Dst: prefix("192.0.2.5/32"), Dev: "up0"}}, "dev br0"},
		"blackhole":                   {"ip route add blackhole 192.0.2.5 table 11901 proto 119", Step{Route: &Route{Table: 11901, Dst: prefix("192.0.2.5/32"), Dev: "up0"}}, "192.0.2.5"},
		"IPv6 route":                  {"ip route add 2001:db8:1::5 dev up0 table 11901 proto 119 mtu 1300", Step{Route: &Route{Table: 11901, Dst: prefix("2001:db8:1::5/128"), Dev: "up0"}}, "2001:db8:1::5"},
		"neighbour set by hand":       {"ip neigh add 192.0.2.5 lladdr 52:54:00:00:00:01 dev br0 nud permanent", Step{Neighbour: &Neighbour{Dev: "br0", IP: addr("192.0.2.5"), MAC: vmMAC}}, vmMAC},
		"neighbour elsewhere":         {"ip neigh add 192.0.2.5 lladdr 52:54:00:00:00:02 dev br0 nud permanent proto 119", Step{Neighbour: &Neighbour{Dev: "br0", IP: addr("192.0.2.5"), MAC: vmMAC}}, "52:54:00:00:00:02"},
		"address answered for":        {"ip neigh add proxy 2001:db8:1::5 dev br0", Step{Neighbour: &Neighbour{Dev: "br0", IP: addr("2001:db8:1::5"), Proxy: true}}, "br0"},
		"FDB entry at another port":   {"bridge fdb add 52:54:00:00:00:01 dev w0 master static", Step{FDB: &FDB{Dev: "v0", MAC: vmMAC}}, "w0"},
		"FDB entry of the bridge":     {"true", Step{FDB: &FDB{Dev: "v0", MAC: "02:00:00:00:00:01"}}, "br0"},
		"step for a device not there": {"true", Step{Neighbour: &Neighbour{Dev: "nowhere", IP: addr("192.0.2.5"), Proxy: true}}, "nowhere"},
		"FDB entry at no bridge":      {"true", Step{FDB: &FDB{Dev: "up0", MAC: vmMAC}}, "up0"},
	} {
		t.Run(name, func(t *testing.T) {
			s := bridgeSite(t)
			h := s.host()
			s.Sh(c.foreign)
			before := s.settled()
			s.Must(func() error {
				err := h.Apply(context.Background(), c.step)
				if !errors.Is(err, ErrTaken) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENXIO) {
					t.Errorf("Apply: %v", err)
				} else if !strings.Contains(err.Error(), c.names) {
					t.Errorf("%v does not name %q", err, c.names)
				}
				return h.Revert(context.Background(), c.step)
			})
			testnet.Same(t, "after", before, s.settled())
		})
	}
}

// TestTunnelsShareTheirAddress has two devices with one address of RFC 7335.
func TestTunnelsShareTheirAddress(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	s.Sh(`for i in 0 1 2; do ip tuntap add dev wm$i mode tun; ip link set wm$i addrgenmode none; ip link set wm$i up; done`)
	on := func(dev, a string) Step { return Step{Address: &Address{Dev: dev, Prefix: prefix(a)}} }
	before := s.settled()
	for _, a := range []string{"192.0.0.1/32", "192.0.0.2/32"} {
		first, second := on("wm0", a), on("wm1", a)
		s.apply(h, first)
		alone := s.settled()
		for range 2 {
			s.apply(h, second, first)
		}
		for _, dev := range []string{"wm0", "wm1"} {
			if text := s.Sh("ip addr show dev " + dev); strings.Count(text, a) != 1 {
				t.Errorf("%s is not once on %s: %s", a, dev, text)
			}
		}
		s.revert(h, second)
		testnet.Same(t, "without the second", alone, s.settled())
		s.apply(h, second)
		s.revert(h, first)
		if text := s.Sh("ip addr show dev wm1"); !strings.Contains(text, a) {
			t.Errorf("with the first went %s of the second: %s", a, text)
		}
		if text := s.Sh("ip route show table local dev wm1"); !strings.Contains(text, strings.TrimSuffix(a, "/32")) {
			t.Errorf("with the first went the route to %s of the second: %s", a, text)
		}
		s.revert(h, second)
		testnet.Same(t, "without both", before, s.settled())
	}
	// One of someone else, and one of another kind, are refused as before.
	s.Sh("ip addr add 192.0.0.1/32 dev wm2")
	s.apply(h, on("wm0", "203.0.113.7/32"))
	for _, step := range []Step{on("wm1", "192.0.0.1/32"), on("wm1", "203.0.113.7/32")} {
		s.Must(func() error {
			if err := h.Apply(context.Background(), step); !errors.Is(err, ErrTaken) {
				t.Errorf("%s: %v", step, err)
			}
			return nil
		})
	}
}

func TestGateways(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	s.Sh(`ip route add 203.0.113.0/25 nexthop via 198.51.100.7 dev up0 nexthop via 192.0.2.7 dev br0
		ip route add 203.0.113.128/25 via inet6 2001:db8:2::8 dev up0
		ip -6 route add 2001:db8:9::/64 nexthop via 2001:db8:2::9 dev up0 nexthop via 2001:db8:1::9 dev br0
		ip route add default via 198.51.100.66 dev up0 table 66`)
	want := []netip.Addr{addr("192.0.2.7"), addr("198.51.100.7"), addr("198.51.100.254"),
		addr("2001:db8:1::9"), addr("2001:db8:2::8"), addr("2001:db8:2::9"), addr("2001:db8:2::fe")}
	s.Must(func() error {
		got, err := h.Gateways()
		if !slices.Equal(got, want) {
			t.Errorf("%v, not %v", got, want)
		}
		return err
	})
}

// TestWhatTheKernelLearnedGivesWay replaces entries that no one has set.
func TestWhatTheKernelLearnedGivesWay(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	s.Sh(`ip neigh add 192.0.2.5 lladdr 52:54:00:00:00:02 dev br0 nud stale
		bridge fdb add 52:54:00:00:00:01 dev w0 master dynamic`)
	steps := []Step{
		{Neighbour: &Neighbour{Dev: "br0", IP: addr("192.0.2.5"), MAC: vmMAC}},
		{FDB: &FDB{Dev: "v0", MAC: vmMAC}},
	}
	s.apply(h, steps...)
	if text := s.Sh("ip neigh show 192.0.2.5 dev br0"); !strings.Contains(text, vmMAC+" PERMANENT") {
		t.Errorf("neighbour: %s", text)
	}
	if text := s.Sh("bridge fdb show | grep " + vmMAC); !strings.Contains(text, "dev v0") || strings.Contains(text, "w0") {
		t.Errorf("FDB: %s", text)
	}
	s.revert(h, steps...)
	if text := s.Sh("ip neigh; bridge fdb show"); strings.Contains(text, vmMAC) {
		t.Errorf("left: %s", text)
	}
}

// TestEntryOfLibvirtServes keeps an FDB entry that says what the step would.
func TestEntryOfLibvirtServes(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	s.Sh("bridge fdb add 52:54:00:00:00:01 dev v0 master static")
	before := s.settled()
	step := Step{FDB: &FDB{Dev: "v0", MAC: vmMAC}}
	s.apply(h, step)
	testnet.Same(t, "applied", before, s.settled())
	s.revert(h, step)
	testnet.Same(t, "reverted", before, s.settled())
}

func TestSysctlGoesBackOnlyFromOurs(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	step := Step{Sysctl: &Sysctl{Key: "net/ipv4/conf/br0/rp_filter", Value: "2", Was: "0"}}
	value := func() (v string) {
		s.Must(func() (err error) {
			v, err = h.Sysctl(step.Sysctl.Key)
			return err
		})
		return v
	}
	s.apply(h, step)
	if v := value(); v != "2" {
		t.Fatalf("applied: %s", v)
	}
	s.Sh("sysctl -qw net.ipv4.conf.br0.rp_filter=1")
	s.revert(h, step)
	if v := value(); v != "1" {
		t.Errorf("someone's 1 has become %s", v)
	}
	s.apply(h, step)
	if v := value(); v != "2" {
		t.Errorf("applied: %s", v)
	}
	s.revert(h, step)
	if v := value(); v != "0" {
		t.Errorf("reverted: %s", v)
	}
	s.apply(h, step)
	s.Sh("ip link del br0")
	s.revert(h, step)
}

// TestDevicesGoneAreNoError reverts after the devices have gone.
func TestDevicesGoneAreNoError(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	s.apply(h, plan()...)
	s.Sh("ip link del br0; ip link del up0; ip link del v0; ip link del w0")
	s.revert(h, plan()...)
	s.Must(func() error {
		found, err := h.Leftovers(context.Background())
		if len(found) != 0 {
			t.Errorf("left over: %q", found)
		}
		return err
	})
}

func TestReplace(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	before := s.settled()
	for _, dst := range []netip.Prefix{prefix("192.0.2.5/32"), prefix("2001:db8:1::5/128")} {
		old := Step{Route: &Route{Table: 11901, Dst: dst, Dev: "up0"}}
		new := Step{Route: &Route{Table: 11901, Dst: dst, Dev: "v1", MTU: 1300}}
		replace := func() error { return h.Replace(context.Background(), old, new) }
		s.apply(h, old)
		for range 2 {
			s.Must(replace)
		}
		s.revert(h, old) // is gone, and no error
		if text := s.Sh("ip -4 route show table all; ip -6 route show table all"); strings.Count(text, "table 11901") != 1 ||
			!strings.Contains(text, "dev v1 table 11901") || !strings.Contains(text, "mtu 1300") {
			t.Errorf("%v: %s", dst, text)
		}
		s.revert(h, new)
		s.Must(replace) // though the old one is gone
		s.revert(h, new)
		testnet.Same(t, "reverted", before, s.settled())

		s.Sh("ip route add " + dst.String() + " dev w1 table 11901")
		if err := s.Run(replace); !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), "w1") {
			t.Errorf("replaced someone's route: %v", err)
		}
		s.Sh("ip route del " + dst.String() + " dev w1 table 11901")
	}

	old := Step{Table: &Table{Family: "inet", Name: "wanmig_0", Body: clampBody}}
	new := Step{Table: &Table{Family: "bridge", Name: "wanmig_1", Body: redirectBody}}
	s.apply(h, old)
	for range 2 {
		s.Must(func() error { return h.Replace(context.Background(), old, new) })
	}
	if text := s.Sh("nft list tables"); text != "table ip other\ntable bridge wanmig_1\n" {
		t.Errorf("tables:\n%s", text)
	}
	// What does not hold leaves the old one.
	broken := Step{Table: &Table{Family: "bridge", Name: "wanmig_1", Body: "chain c { jump nowhere }"}}
	if err := s.Run(func() error { return h.Replace(context.Background(), new, broken) }); err == nil {
		t.Error("a rule that leads nowhere is accepted")
	}
	if text := s.Sh("nft list tables"); text != "table ip other\ntable bridge wanmig_1\n" {
		t.Errorf("tables:\n%s", text)
	}
	s.revert(h, new)
	testnet.Same(t, "reverted", before, s.settled())

	if err := s.Run(func() error { return h.Replace(context.Background(), old, Step{Sysctl: plan()[1].Sysctl}) }); !errors.Is(err, ErrInvalid) {
		t.Errorf("replaced a table by a sysctl: %v", err)
	}
}

func TestWithoutNFT(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	// A mount namespace of its own would hide nft; no program by that name
	// does as well, once /usr/sbin is out of sight.
	s.Must(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", "/usr/sbin", "tmpfs", 0, ""); err != nil {
			return err
		}
		if _, err := h.ApplyAll(context.Background(), plan()[len(plan())-2:]); !errors.Is(err, ErrNoNFT) {
			t.Errorf("ApplyAll: %v", err)
		}
		if _, err := h.Leftovers(context.Background()); !errors.Is(err, ErrNoNFT) {
			t.Errorf("Leftovers: %v", err)
		}
		return nil
	})
}
