//go:build lab

package netredirect

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/netredirect/hostnet"
)

// TestTablesAreAccepted has nft itself check every table of the plans.
func TestTablesAreAccepted(t *testing.T) {
	s := planSite(t)
	for name, p := range planned() {
		tables := 0
		for _, step := range p.steps() {
			if step.Table == nil {
				continue
			}
			tables++
			_, body, _ := strings.Cut(step.String(), "\n")
			body = strings.TrimSuffix(body, "EOF")
			s.must(func() error {
				cmd := exec.Command("nft", "-c", "-f", "-")
				cmd.Stdin = strings.NewReader(body)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s: %s %s: %v\n%s", name, step.Table.Family, step.Table.Name, err, out)
				}
				return nil
			})
		}
		if tables < 3 {
			t.Errorf("%s has only %d tables", name, tables)
		}
	}
}

// TestPlansAreMadeAndUndone makes each plan twice, as after a restart of the
// agent, and undoes it twice.
func TestPlansAreMadeAndUndone(t *testing.T) {
	for name, p := range planned() {
		t.Run(name, func(t *testing.T) {
			s := planSite(t)
			m := s.manager()
			// This kernel has no tunnels: the device is there already, as one that
			// the agent carries.
			for _, step := range p.Tunnel {
				if step.Device != nil {
					*step.Device = hostnet.Device{Name: step.Device.Name, Kind: hostnet.KindTUN, MTU: step.Device.MTU}
				}
			}
			s.must(func() (err error) { // what the settings are here
				for _, part := range []*[]hostnet.Step{&p.Tunnel, &p.Stay, &p.Arm} {
					for _, step := range *part {
						if step.Sysctl != nil {
							step.Sysctl.Was = ""
						}
					}
					if *part, err = m.rememberSysctls(*part); err != nil {
						return err
					}
				}
				return nil
			})
			before := s.dump()
			for range 2 {
				s.must(func() error {
					_, err := s.net.ApplyAll(context.Background(), p.steps())
					return err
				})
			}
			during := s.dump()
			for _, step := range p.steps() {
				stands := true
				switch {
				case step.Table != nil:
					stands = strings.Contains(during, step.Table.Family+" "+step.Table.Name+" {")
				case step.Rule != nil:
					stands = strings.Contains(during, fmt.Sprintf("%d:\tfrom", step.Rule.Priority)) && strings.Contains(during, fmt.Sprintf("lookup %d proto 119", step.Rule.Table))
				case step.Route != nil:
					stands = strings.Contains(during, fmt.Sprintf("dev %s table %d proto 119", step.Route.Dev, step.Route.Table))
				case step.Neighbour != nil:
					stands = strings.Contains(during, fmt.Sprintf("%s dev %s", step.Neighbour.IP, step.Neighbour.Dev))
				case step.FDB != nil:
					stands = strings.Contains(during, fmt.Sprintf("%s dev %s ", step.FDB.MAC, step.FDB.Dev))
				case step.Address != nil:
					stands = strings.Contains(during, step.Address.Prefix.String())
				case step.Sysctl != nil:
					stands = strings.Contains(during, "/proc/sys/"+step.Sysctl.Key+":"+step.Sysctl.Value+"\n")
				}
				if !stands {
					t.Errorf("does not stand: %s", step)
				}
			}
			for range 2 {
				s.must(func() error { return s.net.RevertAll(context.Background(), p.steps()) })
			}
			sameDump(t, name, before, s.dump())
			s.must(func() error {
				left, err := s.net.Leftovers(context.Background())
				if len(left) > 0 {
					t.Errorf("left over: %q", left)
				}
				return err
			})
		})
	}
}

// TestNeighboursPlansStandApart undoes one of two redirects that share a tunnel
// and a bridge.
func TestNeighboursPlansStandApart(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	other := only(web(false), "192.0.2.11", "2001:db8:1::11")
	other.MAC, other.Tap = "52:54:00:00:00:03", "v0"
	before := s.dump()
	var made []*redirect
	var dumps []string
	for slot, n := range []hostNIC{web(false), other} {
		x := m.newRedirect(&record{Move: fmt.Sprint(slot), Role: Destination, State: Standing, Kind: QUIC, Device: "wmqtest", Slot: slot, Priority: topPriority - rulesEach*slot})
		x.setNICs([]hostNIC{n})
		x.Plan = planDestination(x.needs(EgressTunnel))
		x.Plan.Tunnel = planTunnel(tunnelFacts{kind: QUIC, device: "wmqtest", local: addr("203.0.113.1"), remote: addr("203.0.113.2"), mtu: 1380})
		s.must(func() (err error) {
			if x.Plan.Stay, err = m.rememberSysctls(x.Plan.Stay); err == nil {
				_, err = s.net.ApplyAll(context.Background(), x.Plan.steps())
			}
			return err
		})
		m.redirects[x.Move] = x
		made = append(made, x)
		dumps = append(dumps, s.dump())
	}
	undo := func(x *redirect) {
		s.must(func() error { return m.revert(x, x.standing()) })
		delete(m.redirects, x.Move)
	}
	undo(made[1])
	sameDump(t, "without the second", dumps[0], s.dump())
	undo(made[0])
	// The agent makes the TUN, and what it set on it goes with it.
	s.sh("echo 0 > /proc/sys/net/ipv4/conf/wmqtest/forwarding; echo 0 > /proc/sys/net/ipv4/conf/wmqtest/rp_filter")
	sameDump(t, "without both", before, s.dump())
}
