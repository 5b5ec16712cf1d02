//go:build lab

package routes

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	vm4 = netip.MustParsePrefix("192.0.2.10/32")
	vm6 = netip.MustParsePrefix("2001:db8::10/128")
	vm  = []netip.Prefix{vm4, vm6}
	ctx = context.Background()
)

// channels are what a session of BIRD carries.
const channels = "ipv4 { import all; export all; }; ipv6 { import all; export all; };"

// ebgp4 and the like are BIRD's sessions with a host.
const (
	ebgp4 = "protocol bgp host4 { local R4 as 65001; neighbor H4 as 65010; " + channels + " }\n"
	ebgp6 = "protocol bgp host6 { local R6 as 65001; neighbor H6 as 65010; " + channels + " }\n"
)

func TestAnnounce(t *testing.T) {
	t.Parallel()
	both := func(c *cable, asn uint32) []Peer {
		return []Peer{{Address: c.v4(1), ASN: asn, Local: c.v4(2)}, {Address: c.v6(1), ASN: asn, Local: c.v6(2)}}
	}
	communities := []string{"65020:100", "65020:1:2"}
	sent := []string{"BGP.community: (65020,100)", "BGP.large_community: (65020, 1, 2)", "BGP.origin: IGP"}
	for _, test := range []struct {
		name           string
		bird           string
		config         func(c *cable) Config
		wanted4        func(c *cable) []string
		wanted6        func(c *cable) []string
		passwordNeeded bool
	}{{
		name: "eBGP, a session of each family",
		bird: ebgp4 + ebgp6,
		config: func(c *cable) Config {
			return Config{Peers: both(c, 65001), LocalPref: 250}
		},
		wanted4: func(c *cable) []string {
			return []string{"BGP.next_hop: " + c.v4(2).String(), "BGP.as_path: 65010\n", "BGP.local_pref: 100"}
		},
		wanted6: func(c *cable) []string {
			return []string{"BGP.next_hop: " + c.v6(2).String(), "BGP.as_path: 65010\n", "BGP.local_pref: 100"}
		},
	}, {
		name: "eBGP, next hops configured, one IPv4 session",
		bird: ebgp4,
		config: func(c *cable) Config {
			return Config{Peers: both(c, 65001)[:1], NextHop4: c.v4(3), NextHop6: c.v6(3)}
		},
		wanted4: func(c *cable) []string { return []string{"BGP.next_hop: " + c.v4(3).String()} },
		wanted6: func(c *cable) []string { return []string{"BGP.next_hop: " + c.v6(3).String()} },
	}, {
		name: "eBGP, next hops configured, one IPv6 session",
		bird: ebgp6,
		config: func(c *cable) Config {
			return Config{Peers: both(c, 65001)[1:], NextHop4: c.v4(3), NextHop6: c.v6(3)}
		},
		wanted4: func(c *cable) []string { return []string{"BGP.next_hop: " + c.v4(3).String()} },
		wanted6: func(c *cable) []string { return []string{"BGP.next_hop: " + c.v6(3).String()} },
	}, {
		name: "iBGP, password, other port",
		bird: `protocol bgp host4 { local R4 port 1179 as 65010; neighbor H4 as 65010; password "s3 cret"; ` + channels + ` }
			protocol bgp host6 { local R6 port 1179 as 65010; neighbor H6 as 65010; password "s3 cret"; ` + channels + ` }`,
		config: func(c *cable) Config {
			peers := both(c, 65010)
			for i := range peers {
				peers[i].Port = 1179
				peers[i].PasswordFile = passwordFile(c.t, "s3 cret\n")
			}
			return Config{Peers: peers, LocalPref: 250}
		},
		wanted4: func(c *cable) []string {
			return []string{"BGP.next_hop: " + c.v4(2).String(), "BGP.as_path: \n", "BGP.local_pref: 250"}
		},
		wanted6: func(c *cable) []string {
			return []string{"BGP.next_hop: " + c.v6(2).String(), "BGP.as_path: \n", "BGP.local_pref: 250"}
		},
	}, {
		name: "eBGP multihop",
		bird: "protocol bgp host4 { multihop 5; local R4 as 65001; neighbor H4 as 65010; " + channels + " }\n",
		config: func(c *cable) Config {
			peers := both(c, 65001)[:1]
			peers[0].Multihop = 5
			return Config{Peers: peers, NextHop6: c.v6(2)}
		},
		wanted4: func(c *cable) []string { return []string{"BGP.next_hop: " + c.v4(2).String()} },
		wanted6: func(c *cable) []string { return []string{"BGP.next_hop: " + c.v6(2).String()} },
	}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newCable(t)
			r := c.start(test.bird)
			config := test.config(c)
			config.ASN, config.RouterID, config.Communities = 65010, c.v4(2), communities
			s := speak(t, config)
			if err := s.Announce(ctx, vm); err != nil {
				t.Fatal(err)
			}
			if err := s.Announce(ctx, vm); err != nil {
				t.Fatal("again:", err)
			}
			r.has(vm4, append(test.wanted4(c), sent...)...)
			r.has(vm6, append(test.wanted6(c), sent...)...)
			for _, p := range s.Peers() {
				if !p.Up || p.Problem != "" || p.State != "established" {
					t.Errorf("peer: %+v", p)
				}
			}
			if err := s.Withdraw(ctx, vm[:1]); err != nil {
				t.Fatal(err)
			}
			r.lacks(vm4)
			r.has(vm6)
			if err := s.Withdraw(ctx, vm); err != nil {
				t.Fatal(err)
			}
			r.lacks(vm6)
			if err := s.Announce(ctx, vm); err != nil {
				t.Fatal(err)
			}
			r.has(vm4)
			r.has(vm6)
		})
	}
}

func TestAnnounceRefusesWhatNobodyTakes(t *testing.T) {
	t.Parallel()
	c := newCable(t)
	c.start(ebgp4)
	s := speak(t, Config{ASN: 65010, RouterID: c.v4(2), Peers: []Peer{{Address: c.v4(1), ASN: 65001}}})
	if err := s.Announce(ctx, []netip.Prefix{vm6}); !errors.Is(err, ErrNoPeer) {
		t.Errorf("IPv6 over IPv4 without a next hop: %v", err)
	}
	for _, text := range []string{"192.0.2.0/24", "0.0.0.0/0", "2001:db8::/127", "224.0.0.1/32", "127.0.0.1/32", "fe80::1/128", "::/128"} {
		if err := s.Announce(ctx, []netip.Prefix{vm4, netip.MustParsePrefix(text)}); !errors.Is(err, ErrNotHostRoute) {
			t.Errorf("%s: %v", text, err)
		}
	}
	state(t, s, true, "")
	c.rt.lacks(vm4) // nothing of a refused list is announced
}

// TestSeen is the source's view of a destination's route, through BIRD.
func TestSeen(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		bird string
		asns [3]uint32 // router, destination, source
		path []uint32
	}{{
		name: "eBGP",
		bird: ebgp4 + "protocol bgp host3 { local R4 as 65001; neighbor S4 as 65020; " + mayRestart + channels + " }\n",
		asns: [3]uint32{65001, 65010, 65020},
		path: []uint32{65001, 65010},
	}, {
		name: "eBGP, sites of one AS",
		bird: ebgp4 + "protocol bgp host3 { local R4 as 65001; neighbor S4 as 65010; " + channels + " }\n",
		asns: [3]uint32{65001, 65010, 65010},
		path: []uint32{65001, 65010},
	}, {
		name: "iBGP, route reflector",
		bird: "protocol bgp host4 { local R4 as 65010; neighbor H4 as 65010; rr client; " + channels + " }\n" +
			"protocol bgp host3 { local R4 as 65010; neighbor S4 as 65010; rr client; " + channels + " }\n",
		asns: [3]uint32{65010, 65010, 65010},
	}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newCable(t)
			c.start(test.bird)
			source := speak(t, Config{ASN: test.asns[2], RouterID: c.v4(3), Peers: []Peer{
				{Address: c.v4(1), ASN: test.asns[0], Local: c.v4(3), Watch: true},
			}})
			dest := speakElsewhere(t, speakerArgs{Config: Config{
				ASN: test.asns[1], RouterID: c.v4(2), NextHop6: c.v6(2), Communities: []string{"65020:1:2", "65020:100"},
				Peers: []Peer{{Address: c.v4(1), ASN: test.asns[0], Local: c.v4(2)}},
			}})
			state(t, source, true, "")
			for _, p := range vm {
				if seen, err := source.Seen(p); err != nil || len(seen) != 0 {
					t.Errorf("before: %v, %v", seen, err)
				}
			}
			dest.tell("announce", vm...)
			// The next hop stays the destination's also across eBGP, in one network.
			hops := map[netip.Prefix]netip.Addr{vm4: c.v4(2), vm6: c.v6(2)}
			for _, p := range vm {
				seen := awaitSeen(t, source, p, true)[0]
				if seen.Peer != c.v4(1) || seen.NextHop != hops[p] || !slices.Equal(seen.Path, test.path) ||
					!slices.Equal(seen.Communities, []string{"65020:100", "65020:1:2"}) {
					t.Errorf("%s: %+v", p, seen)
				}
			}
			dest.tell("withdraw", vm...)
			for _, p := range vm {
				awaitSeen(t, source, p, false)
			}
			// A router that is gone advertises nothing, even if it may come back.
			dest.tell("announce", vm...)
			awaitSeen(t, source, vm4, true)
			c.rt.kill()
			awaitSeen(t, source, vm4, false)
		})
	}
}

// awaitSeen waits, told by Changed alone, until the prefix is seen or not.
func awaitSeen(t *testing.T, s *Speaker, p netip.Prefix, wanted bool) []Sighting {
	t.Helper()
	timeout := time.After(40 * time.Second)
	for {
		changed := s.Changed()
		seen, err := s.Seen(p)
		if err != nil {
			t.Fatal(err)
		}
		if (len(seen) > 0) == wanted {
			return seen
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("%s: seen %v, want some: %v", p, seen, wanted)
		}
	}
}

// TestNothingIsPassedOn has two routers: what one says never reaches the
// other, nor this host's own routes; and a watched one gets no announcement.
func TestNothingIsPassedOn(t *testing.T) {
	t.Parallel()
	a, b := newCable(t), newCable(t)
	foreign := netip.MustParsePrefix("198.51.100.7/32")
	static := "protocol static { ipv4; route " + foreign.String() + " via R4; route 203.0.113.0/24 via R4; }\n"
	ra := a.start(ebgp4 + static)
	rb := b.start(strings.Replace(ebgp4, "65001", "65002", 1)) // of another AS, or a loop would be seen
	s := speak(t, Config{ASN: 65010, RouterID: a.v4(2), Peers: []Peer{
		{Address: a.v4(1), ASN: 65001, Watch: true}, {Address: b.v4(1), ASN: 65002},
	}})
	if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
		t.Fatal(err)
	}
	awaitSeen(t, s, foreign, true)
	awaitSeen(t, s, netip.MustParsePrefix("203.0.113.0/24"), true)
	rb.has(vm4)
	for _, p := range s.Peers() {
		if !p.Up || p.Problem != "" {
			t.Errorf("peer: %+v", p)
		}
	}
	// What is sent to a router arrives in order: nothing is on its way any more.
	last := netip.MustParsePrefix("192.0.2.99/32")
	if err := s.Announce(ctx, []netip.Prefix{last}); err != nil {
		t.Fatal(err)
	}
	rb.has(last)
	rb.lacks(foreign)
	ra.lacks(vm4)
	if out := ra.birdc("show protocols all host4"); !strings.Contains(out, "Routes:         0 imported") {
		t.Errorf("a watched router was told something:\n%s", out)
	}
	inKernel, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil || len(inKernel) == 0 {
		t.Fatalf("kernel's routes: %v, %v", inKernel, err)
	}
	for _, route := range inKernel {
		if to := route.Dst.String(); to == foreign.String() || to == "203.0.113.0/24" || to == vm4.String() {
			t.Errorf("in the kernel: %s", route)
		}
	}
}

func TestPeerGoesAndComesBack(t *testing.T) {
	t.Parallel()
	c := newCable(t)
	r := c.start(ebgp4)
	s := speak(t, Config{ASN: 65010, RouterID: c.v4(2), Peers: []Peer{{Address: c.v4(1), ASN: 65001, Local: c.v4(2)}}})
	if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
		t.Fatal(err)
	}
	r.has(vm4)
	up := s.Peers()[0].Since

	r.birdc("disable host4")
	state(t, s, false, "closed by the peer: ")
	if now := s.Peers()[0]; !now.Since.After(up) {
		t.Errorf("went up at %v, down at %v", up, now.Since)
	}
	r.birdc("enable host4")
	state(t, s, true, "")
	r.has(vm4)

	r.kill()
	state(t, s, false, "the connection was lost")
	c.start(ebgp4).has(vm4)
	state(t, s, true, "")
}

func TestProblems(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		bird   string
		change func(c *cable, config *Config)
		want   string
	}{{
		name:   "peer of another AS",
		bird:   ebgp4,
		change: func(_ *cable, config *Config) { config.Peers[0].ASN = 65002 },
		want:   "is not of AS 65002, as configured here",
	}, {
		name:   "peer expects another AS",
		bird:   ebgp4,
		change: func(_ *cable, config *Config) { config.ASN = 65011 },
		want:   "of AS 65011",
	}, {
		name: "not configured there",
		bird: "protocol bgp host3 { local R4 as 65001; neighbor S4 as 65010; " + channels + " }\n",
		want: "refuses the session: configure this host there",
	}, {
		name: "other password",
		bird: `protocol bgp host4 { local R4 as 65001; neighbor H4 as 65010; password "right"; ` + channels + " }\n",
		change: func(c *cable, config *Config) {
			config.Peers[0].PasswordFile = passwordFile(c.t, "wrong")
		},
		want: "another password",
	}, {
		name: "password only there",
		bird: `protocol bgp host4 { local R4 as 65001; neighbor H4 as 65010; password "right"; ` + channels + " }\n",
		want: "a password that only the peer wants",
	}, {
		name: "no BGP there",
		want: "refuses connections",
	}, {
		name:   "no such router",
		change: func(c *cable, config *Config) { config.Peers[0].Address = c.v4(9) },
		want:   "no answer from",
	}, {
		name: "no such network",
		change: func(c *cable, config *Config) {
			config.Peers[0].Address, config.Peers[0].Local = netip.MustParseAddr("203.0.113.1"), netip.Addr{}
		},
		want: "network is unreachable",
	}, {
		name:   "not this host's address",
		change: func(c *cable, config *Config) { config.Peers[0].Local = netip.MustParseAddr("203.0.113.1") },
		want:   "the local address 203.0.113.1 is not this host's",
	}, {
		name: "the router's own id",
		bird: "protocol bgp host4 { local R4 as 65010; neighbor H4 as 65010; " + channels + " }\n",
		change: func(c *cable, config *Config) {
			config.RouterID, config.Peers[0].ASN = c.v4(1), 65010
		},
		want: "router id",
	}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newCable(t)
			c.start(test.bird)
			config := Config{ASN: 65010, RouterID: c.v4(2), Peers: []Peer{{Address: c.v4(1), ASN: 65001, Local: c.v4(2)}}}
			if test.change != nil {
				test.change(c, &config)
			}
			s := speak(t, config)
			if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
				t.Fatal(err)
			}
			state(t, s, false, test.want)
			t.Log(s.Peers()[0].Problem)
			c.rt.lacks(vm4)
		})
	}
}

// TestFamilyMissing has a router without IPv6 on the session.
func TestFamilyMissing(t *testing.T) {
	t.Parallel()
	c := newCable(t)
	r := c.start("protocol bgp host4 { local R4 as 65001; neighbor H4 as 65010; ipv4 { import all; export all; }; }\n")
	s := speak(t, Config{ASN: 65010, RouterID: c.v4(2), NextHop6: c.v6(2), Peers: []Peer{{Address: c.v4(1), ASN: 65001}}})
	if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
		t.Fatal(err)
	}
	r.has(vm4)
	state(t, s, true, "")
	if err := s.Announce(ctx, []netip.Prefix{vm6}); err != nil {
		t.Fatal(err)
	}
	state(t, s, true, "the peer takes no IPv6 routes")
}

// TestManyPrefixes floods a speaker. One that takes less must let go of the
// session, and come back when the router is filtered.
func TestManyPrefixes(t *testing.T) {
	t.Parallel()
	var static strings.Builder
	static.WriteString("protocol static { ipv4;\n")
	for i := range 5000 {
		fmt.Fprintf(&static, "route 100.64.%d.%d/32 via R4;\n", i/250, i%250)
	}
	static.WriteString("}\n")
	flood, last := static.String(), netip.MustParsePrefix("100.64.19.249/32")
	for _, test := range []struct {
		name   string
		limit  uint32
		closed bool
	}{{"few allowed", 1000, true}, {"one too many", 4999, true}, {"just enough", 5000, false}, {"as usual", 0, false}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newCable(t)
			r := c.start(ebgp4 + flood)
			s := speak(t, Config{ASN: 65010, RouterID: c.v4(2), Peers: []Peer{{Address: c.v4(1), ASN: 65001, MaxPrefixes: test.limit}}})
			if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
				t.Fatal(err)
			}
			if !test.closed {
				awaitSeen(t, s, last, true)
				state(t, s, true, "")
				r.has(vm4)
				return
			}
			state(t, s, false, fmt.Sprintf("sends more than %d prefixes", test.limit))
			if seen, err := s.Seen(last); err != nil || len(seen) != 0 {
				t.Errorf("seen beyond the limit: %v, %v", seen, err)
			}
			r.configure(c, strings.Replace(ebgp4, "export all", "export none", 1)+flood)
			r.birdc("configure")
			state(t, s, true, "")
			r.has(vm4)
		})
	}
}

// TestGracefulRestart kills a speaker's process: the route stays until the next
// process has announced it again.
func TestGracefulRestart(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		end  func(p *process)
		dead bool // a second router is down
	}{
		{"killed", (*process).kill, false},
		{"closed", (*process).end, false},
		{"killed, another router down", (*process).kill, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newCable(t)
			r := c.start(strings.ReplaceAll(ebgp4, "protocol bgp host4 {", "protocol bgp host4 { debug { routes };"))
			args := speakerArgs{
				Config: Config{ASN: 65010, RouterID: c.v4(2), NextHop6: c.v6(2), Peers: []Peer{
					{Address: c.v4(1), ASN: 65001, Local: c.v4(2)},
				}},
			}
			if test.dead {
				args.Config.Peers = append(args.Config.Peers, Peer{Address: c.v4(9), ASN: 65001, Local: c.v4(2)})
			}
			other := netip.MustParsePrefix("192.0.2.11/32")
			first := speakElsewhere(t, args)
			first.tell("announce", other, vm4, vm6)
			for _, p := range []netip.Prefix{other, vm4, vm6} {
				r.has(p)
			}
			test.end(first)
			eventually(t, "BIRD keeps stale routes", func() error {
				if out := r.birdc("show protocols all host4"); !strings.Contains(out, "Neighbor graceful restart active") {
					return errors.New(out)
				}
				return nil
			})

			// The next one knows of the VM, and no longer of the other.
			args.Resume = vm
			speakElsewhere(t, args)
			r.lacks(other)
			eventually(t, "BIRD has fresh routes", func() error {
				if out := r.birdc("show protocols all host4"); strings.Contains(out, "graceful restart active") || !strings.Contains(out, "Established") {
					return errors.New(out)
				}
				return nil
			})
			for _, p := range vm {
				r.has(p)
				if removed(r, p) {
					t.Errorf("%s was away", p)
				}
			}
			if !removed(r, other) {
				t.Errorf("%s went, and BIRD's log does not say so", other)
			}
		})
	}
}

// removed says whether BIRD had no route to the prefix at any time since one had
// come. The session traces its routes.
func removed(r *router, p netip.Prefix) bool {
	return strings.Contains(r.log(), "> removed [sole] "+p.String())
}

// TestCloseWithoutRoutes ends the session with a NOTIFICATION, so that a router
// keeps nothing.
func TestCloseWithoutRoutes(t *testing.T) {
	t.Parallel()
	c := newCable(t)
	r := c.start(ebgp4)
	s := speak(t, Config{ASN: 65010, RouterID: c.v4(2), Peers: []Peer{{Address: c.v4(1), ASN: 65001}}})
	if err := s.Announce(ctx, []netip.Prefix{vm4}); err != nil {
		t.Fatal(err)
	}
	r.has(vm4)
	if err := s.Withdraw(ctx, []netip.Prefix{vm4}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s.Close()
	r.lacks(vm4)
	if out := r.birdc("show protocols all host4"); strings.Contains(out, "graceful restart active") {
		t.Error(out)
	}
	if p := s.Peers()[0]; p.Up || p.Problem == "" {
		t.Errorf("after Close: %+v", p)
	}
	if err := s.Announce(ctx, []netip.Prefix{vm4}); !errors.Is(err, ErrClosed) {
		t.Errorf("announce after Close: %v", err)
	}
	if _, err := s.Seen(vm4); !errors.Is(err, ErrClosed) {
		t.Errorf("look after Close: %v", err)
	}
}

func passwordFile(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
