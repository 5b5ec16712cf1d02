//go:build lab

package netredirect

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

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
		least := 3
		if name == "destination-follows" { // the bridge's is another redirect's
			least = 2
		}
		if tables < least {
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

// TestChainAnswersThroughTheFirstTunnel is the middle of A → B → C: the VM has
// come by one tunnel and gone by another. What came by the first is answered
// through it, whichever redirect's table the packet meets first.
func TestChainAnswersThroughTheFirstTunnel(t *testing.T) {
	for _, order := range []string{"destination first", "source first"} {
		t.Run(order, func(t *testing.T) {
			s := planSite(t)
			toA, toC := s.tun("wmqtest"), s.tun("wmktest")
			came := planDestination(destinationNeeds{slot: 1, priority: topPriority, device: "wmqtest", nics: []hostNIC{web(false)}, egress: EgressTunnel})
			came.Tunnel = planTunnel(tunnelFacts{kind: QUIC, device: "wmqtest", local: addr("203.0.113.1"), remote: addr("203.0.113.2"), mtu: 1380})
			gone := planSource(2, topPriority-rulesEach, "wmktest", []hostNIC{web(false)})
			gone.Tunnel = planTunnel(tunnelFacts{kind: QUIC, device: "wmktest", local: addr("203.0.113.1"), remote: addr("203.0.113.3"), mtu: 1380})
			plans := []Plan{remembered(came), remembered(gone)}
			if order == "source first" {
				plans = []Plan{plans[1], plans[0]}
			}
			s.sh("sysctl -qw net.ipv6.conf.all.forwarding=1; ip -6 route add default dev up0")
			for _, p := range plans {
				s.must(func() error {
					_, err := s.net.ApplyAll(context.Background(), p.steps())
					return err
				})
			}
			for _, ends := range [][2]netip.Addr{{addr("203.0.113.50"), addr("192.0.2.10")}, {addr("2001:db8:5::50"), addr("2001:db8:1::10")}} {
				client, vm := ends[0], ends[1]
				for range 2 { // the first makes the connection, and its answer is of one that stands
					toA.write(t, client, vm)
					toC.expect(t, client, vm)
					toC.write(t, vm, client)
					toA.expect(t, vm, client)
				}
				toC.write(t, vm, client.Next()) // the VM's own goes out where it came from first
				toA.expect(t, vm, client.Next())
			}
			if text := s.sh("nft list table inet wanmig_r2"); !strings.Contains(text, "counter from_tunnel {\n\t\tpackets 6 ") {
				t.Errorf("not every answer is counted: %s", text)
			}
		})
	}
}

// tun is the far end of a tunnel.
type tun struct{ *os.File }

func (s *space) tun(name string) tun {
	s.t.Helper()
	var f *os.File
	s.must(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		return nil
	})
	s.t.Cleanup(func() { f.Close() })
	return tun{f}
}

func (f tun) write(t *testing.T, from, to netip.Addr) {
	t.Helper()
	udp := &layers.UDP{SrcPort: 4000, DstPort: 4000}
	var ip gopacket.SerializableLayer
	if from.Is4() {
		l := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
		_ = udp.SetNetworkLayerForChecksum(l)
		ip = l
	} else {
		l := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolUDP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
		_ = udp.SetNetworkLayerForChecksum(l)
		ip = l
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, udp, gopacket.Payload("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
}

// expect waits for a packet, and leaves out those that the kernel sends itself.
func (f tun) expect(t *testing.T, from, to netip.Addr) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, maxMTU)
	for {
		n, err := f.Read(b)
		if err != nil {
			t.Fatalf("%s → %s does not come out of %s: %v", from, to, f.Name(), err)
		}
		first := layers.LayerTypeIPv4
		if n > 0 && b[0]>>4 == 6 {
			first = layers.LayerTypeIPv6
		}
		p := gopacket.NewPacket(b[:n], first, gopacket.Default)
		if p.Layer(layers.LayerTypeUDP) != nil && p.NetworkLayer().NetworkFlow() == gopacket.NewFlow(p.NetworkLayer().NetworkFlow().EndpointType(), from.AsSlice(), to.AsSlice()) {
			return
		}
	}
}
