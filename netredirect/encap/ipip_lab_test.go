//go:build lab

package encap

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestPacketsOfBothVersionsPass(t *testing.T) {
	for _, merged := range []bool{false, true} {
		for _, o := range outers {
			t.Run(fmt.Sprintf("%s, merged on receipt %v", o.name, merged), func(t *testing.T) {
				p := newPair(t)
				if merged {
					mergeReceived(t, p.source, "wan", p.peer, "wan")
				}
				near, far := p.connect(o)
				p.peer.echo(":7")
				for _, vm := range []string{vm4.String(), vm6.String()} {
					p.client.Sh("ping -c 2 -i 0.05 -W 5 " + vm)
					transfer(t, p.client, net.JoinHostPort(vm, "7"), 16<<20)
				}
				for _, tunnel := range []*Tunnel{near, far} {
					s := tunnel.Stats()
					// What has arrived is counted a moment later.
					for until := time.Now().Add(5 * time.Second); s.Received.Bytes < 32<<20 && time.Now().Before(until); s = tunnel.Stats() {
						time.Sleep(10 * time.Millisecond)
					}
					if s.Drops != (Drops{}) {
						t.Errorf("dropped: %+v", s.Drops)
					}
					// There and back again, twice.
					if s.Sent.Bytes < 32<<20 || s.Received.Bytes < 32<<20 {
						t.Errorf("32 MiB were transferred each way, but %d bytes sent and %d received", s.Sent.Bytes, s.Received.Bytes)
					}
					t.Logf("%+v", s)
				}
				if near.Stats().Sent.Packets < 32<<20/uint64(o.mtu) {
					t.Error("the packets sent were too few for their size")
				}
				if merged && far.Stats().Received.Packets > near.Stats().Sent.Packets/2 {
					t.Error("the kernel has merged too few packets for this to be a test of merged ones")
				}
			})
		}
	}
}

func TestKernelTellsOfTheMTU(t *testing.T) {
	for _, o := range outers {
		t.Run(o.name, func(t *testing.T) {
			p := newPair(t)
			near, _ := p.connect(o)
			// Just fits, for both versions: 8 bytes of ICMP, and the IP header.
			p.client.Sh("ping -c 1 -W 5 -M do -s " + fmt.Sprint(o.mtu-28) + " " + vm4.String())
			p.client.Sh("ping -c 1 -W 5 -M do -s " + fmt.Sprint(o.mtu-48) + " " + vm6.String())
			out, _ := p.client.Try("ping -c 1 -W 5 -M do -s " + fmt.Sprint(o.mtu-27) + " " + vm4.String())
			if want := fmt.Sprintf("Frag needed and DF set (mtu = %d)", o.mtu); !strings.Contains(out, want) {
				t.Errorf("want %q, have:\n%s", want, out)
			}
			if err := near.SetMTU(1300); err != nil {
				t.Fatal(err)
			}
			out, _ = p.client.Try("ping -c 1 -W 5 -M do -s 1300 " + vm6.String())
			if want := "Packet too big: mtu=1300"; !strings.Contains(out, want) {
				t.Errorf("want %q, have:\n%s", want, out)
			}
			if d := near.Stats().Drops; d != (Drops{}) {
				t.Errorf("dropped: %+v", d)
			}
		})
	}
}

func TestCloseRemovesTheDevice(t *testing.T) {
	p := newPair(t)
	near, far := p.connect(outer4Ends)
	p.peer.echo(":7")
	p.peer.background("ping", "-q", "-i", "0.002", client4.String()) // so that they are closed at work
	transfer(t, p.client, net.JoinHostPort(vm4.String(), "7"), 1<<20)
	for _, end := range []struct {
		*Tunnel
		*space
	}{{near, p.source}, {far, p.peer}} {
		if end.Tunnel.Name() != "wm0" {
			t.Errorf("name %q", end.Tunnel.Name())
		}
		if out := end.space.Sh("ip -o addr show dev wm0"); out != "" {
			t.Errorf("the device has an address of its own:\n%s", out)
		}
		for range 2 {
			if err := end.Tunnel.Close(); err != nil {
				t.Error(err)
			}
		}
		if out, err := end.space.Try("ip link show wm0"); err == nil {
			t.Errorf("the device is left:\n%s", out)
		}
		if err := end.Tunnel.SetMTU(1400); err == nil {
			t.Error("the MTU of a closed tunnel was set")
		}
	}
	// Nothing keeps the name or the addresses.
	p.connect(outer4Ends)
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())
}

func TestOpenRefuses(t *testing.T) {
	s := newSpace(t, "host")
	s.ip(`tuntap add mode tun name taken
		link add bridge0 type bridge
		addr add 10.9.0.1/32 dev lo
		route add 10.9.0.2 dev lo`)
	good := Config{Name: "wm0", MTU: 1480, Local: addr("10.9.0.1"), Remote: addr("10.9.0.2"), Gate: NewGate(), Log: testLog(t)}
	for name, change := range map[string]func(*Config){
		"someone's TUN device":      func(c *Config) { c.Name = "taken" },
		"someone's bridge":          func(c *Config) { c.Name = "bridge0" },
		"a long name":               func(c *Config) { c.Name = "wm0123456789abcd" },
		"no name":                   func(c *Config) { c.Name = "" },
		"a name with a slash":       func(c *Config) { c.Name = "wm/0" },
		"a pattern":                 func(c *Config) { c.Name = "wm%d" },
		"an address of another":     func(c *Config) { c.Local = addr("10.9.0.7") },
		"addresses of two families": func(c *Config) { c.Remote = addr("fd09::2") },
	} {
		c := good
		change(&c)
		err := s.Run(func() error {
			tunnel, err := OpenIPIP(c)
			if err == nil {
				tunnel.Close()
			}
			return err
		})
		if err == nil {
			t.Errorf("%s was accepted", name)
			continue
		}
		t.Log(err)
	}
	if out := s.Sh("ip -o link"); strings.Contains(out, "wm") {
		t.Errorf("a device is left:\n%s", out)
	}
	s.open(good)
	good.Name = "wm1"
	err := s.Run(func() error {
		_, err := OpenIPIP(good)
		return err
	})
	if err == nil {
		t.Errorf("a second tunnel between the same ends: %v", err)
	}
	if _, err := s.Try("ip link show wm1"); err == nil {
		t.Error("a device is left")
	}
}

func TestDeviceRemovedByOthers(t *testing.T) {
	p := newPair(t)
	near, _ := p.connect(outer4Ends)
	p.source.ip("link del wm0")
	if err := near.Close(); err != nil {
		t.Error(err)
	}
	p.source.open(p.near(outer4Ends))
}

// TestTwoTunnelsOfAHost has two peers behind one local address, each with a VM.
func TestTwoTunnelsOfAHost(t *testing.T) {
	for _, o := range outers {
		t.Run(o.name, func(t *testing.T) {
			p := newPair(t)
			first, _ := p.connect(o)
			c, other, vm := p.near(o), addr("10.9.0.3"), addr("10.2.0.3")
			if o.peer.Is6() {
				other, vm = addr("fd09::3"), addr("fd02::3")
			}
			family, prefix := "-4", "/32"
			if o.peer.Is6() {
				family, prefix = "-6", "/128 nodad"
			}
			p.peer.ip(fmt.Sprintf(`addr add dev wan %v%s
				addr add dev lo %v%s`, other, prefix, vm, prefix))
			c.Name, c.Remote, c.Gate = "wm1", other, NewGate()
			c.Gate.Set(nil, []netip.Addr{vm})
			second := p.source.open(c)
			p.source.ip(fmt.Sprintf("route add %v dev wm1", vm))

			far := p.far(o)
			far.Name, far.Local, far.Gate = "wm1", other, NewGate()
			far.Gate.Set([]netip.Addr{vm}, nil)
			p.peer.open(far)
			p.peer.ip(fmt.Sprintf(`%[2]s rule add from %[1]v lookup 77
				%[2]s route add default dev wm1 table 77`, vm, family))
			p.client.Sh("ping -c 3 -i 0.05 -W 5 " + vm4.String())
			p.client.Sh("ping -c 2 -i 0.05 -W 5 " + vm.String())
			for tunnel, want := range map[*Tunnel]uint64{first: 3, second: 2} {
				await(t, tunnel, fmt.Sprintf("%d pings and nothing else at %s", want, tunnel.Name()), func(s Stats) bool {
					return s.Received.Packets == want && s.Sent.Packets == want && s.Drops == (Drops{})
				})
			}
			if err := second.Close(); err != nil {
				t.Fatal(err)
			}
			// Now nobody's.
			p.peer.Try("ping -c 1 -W 0.1 -I " + vm.String() + " " + client4.String())
			p.peer.Try("ping -c 1 -W 0.1 -I " + vm.String() + " " + client6.String())
			await(t, first, "one spoofed packet", func(s Stats) bool { return s.Drops.Spoofed == 1 })
		})
	}
}
