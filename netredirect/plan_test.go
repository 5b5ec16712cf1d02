package netredirect

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/netredirect/hostnet"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the plans in testdata")

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrs(list ...string) (all []netip.Addr) {
	for _, s := range list {
		all = append(all, addr(s))
	}
	return all
}

func nets(list ...string) (all []netip.Prefix) {
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

// The VM's NICs as the tests plan for them.
func web(home bool) hostNIC {
	return hostNIC{NIC{MAC: "52:54:00:00:00:01", Bridge: "br0", Tap: "v0", Addresses: addrs("192.0.2.10", "2001:db8:1::10")}, "02:00:00:00:00:01", home, nets("203.0.113.96/27")}
}

func storage(home bool) hostNIC {
	return hostNIC{NIC{MAC: "52:54:00:00:00:02", Bridge: "br1", Tap: "w0", Addresses: addrs("198.51.100.20", "198.51.100.21"),
		Served: "02:00:00:00:00:77"}, "02:00:00:00:00:02", home, nets("198.51.100.1/24", "2001:db8:9::1/64")}
}

func only(n hostNIC, list ...string) hostNIC {
	n.Addresses = addrs(list...)
	return n
}

// planned are the plans of the golden files, with the devices of planSite.
func planned() map[string]Plan {
	outer4 := tunnelFacts{kind: QUIC, device: "wmqtest", local: addr("203.0.113.1"), remote: addr("203.0.113.2"), mtu: 1380}
	back4 := outer4
	back4.local, back4.remote = outer4.remote, outer4.local
	kernel4, kernel6 := outer4, outer4
	kernel4.kind, kernel4.device, kernel4.mtu = IPIP, "wmktest", 1480
	kernel6.kind, kernel6.device, kernel6.mtu = IPIP, "wmktest", 1460
	kernel6.local, kernel6.remote = addr("2001:db8:a::1"), addr("2001:db8:b::1")

	source := func(t tunnelFacts, slot int, nics ...hostNIC) Plan {
		p := planSource(slot, topPriority-rulesEach*slot, t.device, nics)
		p.Tunnel = planTunnel(t)
		return remembered(p)
	}
	destination := func(t tunnelFacts, slot int, e Egress, mapped map[netip.Addr]netip.Addr, nics ...hostNIC) Plan {
		p := planDestination(destinationNeeds{slot: slot, priority: topPriority - rulesEach*slot, device: t.device, nics: nics, egress: e, mapped: mapped})
		p.Tunnel = planTunnel(t)
		return remembered(p)
	}
	follower := planDestination(destinationNeeds{slot: 6, priority: topPriority - 6*rulesEach, device: back4.device, nics: []hostNIC{web(false)}, egress: EgressTunnel, follows: true})
	follower.Tunnel = planTunnel(back4)
	moved := map[netip.Addr]netip.Addr{addr("192.0.2.10"): addr("203.0.113.99"), addr("2001:db8:1::10"): addr("2001:db8:9::99")}
	return map[string]Plan{
		"source":                       source(outer4, 0, web(false), storage(false)),
		"source-kernel-ipv4":           source(kernel4, 3, only(web(false), "192.0.2.10")),
		"source-kernel-ipv6":           source(kernel6, maxSlots-1, only(web(false), "2001:db8:1::10")),
		"destination-keep-tunnel":      destination(back4, 0, EgressTunnel, nil, web(false), storage(false)),
		"destination-keep-direct":      destination(back4, 1, EgressDirect, nil, web(false)),
		"destination-new-tunnel":       destination(back4, 2, EgressTunnel, moved, web(false)),
		"destination-new-direct":       destination(back4, 3, EgressDirect, moved, web(false)),
		"destination-home":             destination(back4, 4, EgressDirect, nil, web(true), storage(true)),
		"destination-new-partly-home":  destination(back4, 5, EgressTunnel, moved, web(false), storage(true)),
		"destination-follows":          remembered(follower),
		"destination-kernel-ipv6-only": destination(kernel6, maxSlots-1, EgressTunnel, nil, only(web(false), "2001:db8:1::10")),
	}
}

// remembered fills in what the manager reads from the host.
func remembered(p Plan) Plan {
	for _, part := range [][]hostnet.Step{p.Stay, p.Arm} {
		for _, s := range part {
			if s.Sysctl != nil && s.Sysctl.Was == "" {
				s.Sysctl.Was = "0"
				if strings.HasSuffix(s.Sysctl.Key, "/proxy_delay") {
					s.Sysctl.Was = "80"
				}
			}
		}
	}
	return p
}

func TestPlansAreAsWritten(t *testing.T) {
	for name, p := range planned() {
		var b strings.Builder
		for _, part := range []struct {
			name  string
			steps []hostnet.Step
		}{{"tunnel", p.Tunnel}, {"stay", p.Stay}, {"arm", p.Arm}, {"switch", p.Switch}} {
			fmt.Fprintf(&b, "# %s\n", part.name)
			for _, s := range part.steps {
				fmt.Fprintln(&b, s)
			}
		}
		path := filepath.Join("testdata", name+".txt")
		if *rewrite {
			if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if b.String() == string(want) {
			continue
		}
		is, was := strings.Split(b.String(), "\n"), strings.Split(string(want), "\n")
		for i := range is {
			if i >= len(was) || is[i] != was[i] {
				t.Errorf("%s, line %d: %q (go test -run Plans -rewrite, and look at the difference)", path, i+1, is[i])
				break
			}
		}
		if len(is) < len(was) {
			t.Errorf("%s: %d lines, not %d", path, len(is), len(was))
		}
	}
}

func TestPlansAreValid(t *testing.T) {
	for name, p := range planned() {
		for _, s := range p.steps() {
			if err := s.Validate(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestPlansAreTheirOwn makes sure that redirects in different slots share no
// rule, route or table but those of a tunnel.
func TestPlansAreTheirOwn(t *testing.T) {
	for _, role := range []Role{Source, Destination} {
		seen := map[string]int{}
		for slot := range 4 {
			priority := topPriority - rulesEach*slot
			p := planSource(slot, priority, "wmqtest", []hostNIC{web(false)})
			if role == Destination {
				p = planDestination(destinationNeeds{slot: slot, priority: priority, device: "wmqtest", nics: []hostNIC{web(false)}})
			}
			for _, s := range p.steps() {
				key := ""
				switch {
				case s.Rule != nil:
					key = fmt.Sprintf("priority %d, %v %v", s.Rule.Priority, s.Rule.From, s.Rule.To)
					if s.Rule.Priority <= priority-rulesEach || s.Rule.Priority >= priority+rulesEach {
						t.Errorf("%s in slot %d has a rule of priority %d", role, slot, s.Rule.Priority)
					}
				case s.Route != nil:
					key = fmt.Sprintf("route %v table %d", s.Route.Dst, s.Route.Table)
				case s.Table != nil:
					key = s.Table.Family + " " + s.Table.Name
				default:
					continue
				}
				if other, ok := seen[key]; ok && other != slot {
					t.Errorf("%s: slots %d and %d share %s", role, other, slot, key)
				}
				seen[key] = slot
			}
		}
	}
}

func TestMarksKeepToTheirBits(t *testing.T) {
	seen := map[uint32]bool{}
	for slot := range maxSlots {
		mark := markOf(slot)
		if mark&^uint32(markMask) != 0 || mark&markOurs == 0 || seen[mark] {
			t.Fatalf("slot %d has the mark %#x", slot, mark)
		}
		seen[mark] = true
	}
}

func TestTunnelMTU(t *testing.T) {
	v4, v6 := addr("203.0.113.1"), addr("2001:db8::1")
	for _, c := range []struct {
		kind  Kind
		outer netip.Addr
		path  int
		want  int
	}{
		{IPIP, v4, 1500, 1480}, {IPIP, v6, 1500, 1460}, {IPIPUser, v4, 9000, 8980}, {IPIPUser, v4, 1400, 1380},
		{IPIP, v4, 0, 1480}, {IPIP, v4, 65536, 1480}, {IPIP, v6, 100, 1460}, {QUIC, v4, 9000, 1280},
	} {
		if got := tunnelMTU(c.kind, c.outer, c.path); got != c.want {
			t.Errorf("%s to %s over %d bytes: %d, not %d", c.kind, c.outer, c.path, got, c.want)
		}
	}
}

func TestDeviceNames(t *testing.T) {
	seen := map[string]bool{}
	for _, peer := range []string{"", "a", strings.Repeat("x", 1000), "../..", "\x00"} {
		for _, k := range Kinds {
			name := deviceName(peer, k)
			step := hostnet.Step{Route: &hostnet.Route{Table: 1, Dst: host(addr("192.0.2.1")), Dev: name}}
			if err := step.Validate(); err != nil || seen[name] || !strings.HasPrefix(name, "wm") {
				t.Errorf("%q: %s: %v", peer, name, err)
			}
			seen[name] = true
		}
	}
}
