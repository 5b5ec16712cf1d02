package encap

import (
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

const probe = 4790

func TestGate(t *testing.T) {
	near4, far4 := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
	near6, far6 := netip.MustParseAddr("2001:db8:ffff::1"), netip.MustParseAddr("2001:db8:ffff::2")
	other4, other6 := netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8::11")
	all, link := netip.MustParseAddr("224.0.0.22"), netip.MustParseAddr("ff02::16")
	text := udpOf(1, 2, "hello")
	question := udpOf(probe, probe, "are you there?")
	plain := func(src, dst netip.Addr) []byte { return packetOf(src, dst, udp, 0, text) }
	asked := func(src, dst netip.Addr) []byte { return packetOf(src, dst, udp, 0, question) }

	none := NewGate()
	here, away := NewGate(), NewGate()
	here.Set([]netip.Addr{machine4, machine6}, nil)
	away.Set(nil, []netip.Addr{machine4, machine6})
	mapped := NewGate()
	mapped.Set([]netip.Addr{netip.AddrFrom16(machine4.As16())}, nil)
	replaced := NewGate()
	replaced.Set([]netip.Addr{machine4}, []netip.Addr{machine6})
	replaced.Set([]netip.Addr{machine6}, nil)

	tests := []struct {
		name     string
		gate     *Gate
		packet   []byte
		in, out  verdict
		ends     [2]netip.Addr // 203.0.113.1 and .2 by default
		noProbes bool
	}{
		{name: "to the VM here", gate: here, packet: plain(user4, machine4), in: passes, out: foreign},
		{name: "from the VM here", gate: here, packet: plain(machine4, user4), in: foreign, out: passes},
		{name: "to the VM away", gate: away, packet: plain(user4, machine4), in: foreign, out: passes},
		{name: "from the VM away", gate: away, packet: plain(machine4, user4), in: passes, out: foreign},
		{name: "to the VM here, IPv6", gate: here, packet: plain(user6, machine6), in: passes, out: foreign},
		{name: "from the VM away, IPv6", gate: away, packet: plain(machine6, user6), in: passes, out: foreign},
		{name: "another address", gate: here, packet: plain(user4, other4), in: foreign, out: foreign},
		{name: "another address, IPv6", gate: away, packet: plain(other6, user6), in: foreign, out: foreign},
		{name: "no addresses", gate: none, packet: plain(user4, machine4), in: foreign, out: foreign},
		{name: "an address of IPv4 written as IPv6", gate: mapped, packet: plain(user4, machine4), in: passes, out: foreign},
		{name: "a mapped address on the wire", gate: here, packet: plain(user6, netip.AddrFrom16(machine4.As16())), in: foreign, out: foreign},
		{name: "an address that was replaced", gate: replaced, packet: plain(user4, machine4), in: foreign, out: foreign},
		{name: "an address that replaced it", gate: replaced, packet: plain(user6, machine6), in: passes, out: foreign},
		{name: "nested, to the VM", gate: here, packet: packetOf(user4, machine4, protocolIPv4, 0, plain(user4, machine4)), in: nested, out: nested},
		{name: "malformed, to the VM", gate: here, packet: plain(user4, machine4)[:20], in: malformed, out: malformed},
		{name: "multicast of the host's", gate: here, packet: plain(near4, all), in: foreign, out: chatter},
		{name: "multicast of the host's, IPv6", gate: here, packet: plain(netip.IPv6Unspecified(), link), in: foreign, out: chatter},
		{name: "multicast of the VM's", gate: here, packet: plain(machine4, all), in: foreign, out: passes},

		{name: "probe out", gate: none, packet: asked(near4, far4), in: foreign, out: passes},
		{name: "probe in", gate: none, packet: asked(far4, near4), in: passes, out: foreign},
		{name: "probe in, IPv6", gate: none, packet: asked(far6, near6), in: passes, out: foreign, ends: [2]netip.Addr{near6, far6}},
		{name: "probe of another tunnel", gate: none, packet: asked(far6, near6), in: foreign, out: foreign},
		{name: "probe from elsewhere", gate: none, packet: asked(user4, near4), in: foreign, out: foreign},
		{name: "probe without a port for it", gate: none, packet: packetOf(far4, near4, udp, 0, udpOf(0, 0, "")), in: foreign, out: foreign, noProbes: true},
		{name: "probe from another port", gate: none, packet: packetOf(far4, near4, udp, 0, udpOf(1, probe, "")), in: foreign, out: foreign},
		{name: "probe to another port", gate: none, packet: packetOf(far4, near4, udp, 0, udpOf(probe, 1, "")), in: foreign, out: foreign},
		{name: "probe of TCP", gate: none, packet: packetOf(far4, near4, unix.IPPROTO_TCP, 0, question), in: foreign, out: foreign},
		{name: "probe in fragments", gate: none, packet: change(asked(far4, near4), at(6, 0x20)), in: foreign, out: foreign},
		{name: "probe cut short", gate: none, packet: packetOf(far4, near4, udp, 0, question[:7]), in: foreign, out: foreign},
		{name: "ping between the ends", gate: none, packet: packetOf(far4, near4, unix.IPPROTO_ICMP, 0, question), in: foreign, out: foreign},
	}
	for _, test := range tests {
		f := filter{gate: test.gate, local: near4, remote: far4, probePort: probe}
		if test.ends[0].IsValid() {
			f.local, f.remote = test.ends[0], test.ends[1]
		}
		if test.noProbes {
			f.probePort = 0
		}
		if _, v := f.incoming(test.packet); v != test.in {
			t.Errorf("%s: verdict %d coming in, want %d", test.name, v, test.in)
		}
		if _, v := f.outgoing(test.packet); v != test.out {
			t.Errorf("%s: verdict %d going out, want %d", test.name, v, test.out)
		}
	}
}

func TestGateIsSetWhileItIsUsed(t *testing.T) {
	gate := NewGate()
	f := filter{gate: gate, local: user4, remote: user6}
	packet := packetOf(user4, machine4, udp, 0, udpOf(1, 2, "hello"))
	var using sync.WaitGroup
	for range 4 {
		using.Go(func() {
			for range 1000 {
				if _, v := f.incoming(packet); v != passes && v != foreign {
					t.Errorf("verdict %d", v)
					return
				}
			}
		})
	}
	for range 500 {
		gate.Set([]netip.Addr{machine4}, nil)
		gate.Set(nil, []netip.Addr{machine6})
	}
	using.Wait()
}

func TestConfigIsChecked(t *testing.T) {
	good := Config{Name: "wm0", MTU: 1480, Local: user4, Remote: machine4}
	for name, change := range map[string]func(*Config){
		"no address":          func(c *Config) { c.Local = netip.Addr{} },
		"unspecified address": func(c *Config) { c.Remote = netip.IPv4Unspecified() },
		"multicast address":   func(c *Config) { c.Remote = netip.MustParseAddr("224.0.0.1") },
		"address with a zone": func(c *Config) {
			c.Local, c.Remote = netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("fe80::2%eth0")
		},
		"two families":         func(c *Config) { c.Remote = machine6 },
		"the peer is the host": func(c *Config) { c.Remote = user4 },
		"no MTU":               func(c *Config) { c.MTU = 0 },
		"small MTU":            func(c *Config) { c.MTU = 575 },
		"large MTU":            func(c *Config) { c.MTU = 65496 },
		"no name":              func(c *Config) { c.Name = "" },
		"long name":            func(c *Config) { c.Name = "wm01234567890123" },
		"pattern":              func(c *Config) { c.Name = "wm%d" },
		"path":                 func(c *Config) { c.Name = "../wm" },
	} {
		c := good
		change(&c)
		if err := c.check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	mapped := good
	mapped.Local = netip.AddrFrom16(user4.As16())
	if err := mapped.check(); err != nil || mapped.Local != user4 {
		t.Errorf("mapped address: %v, %v", mapped.Local, err)
	}
}
