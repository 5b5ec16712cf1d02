//go:build lab

package hostnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// devices are what a redirect's plan makes, and others that a step can be, each
// with what ip(8) tells of it.
var devices = []struct {
	device Device
	shown  []string
}{
	{
		Device{Name: "wm0", Kind: KindSit, Local: addr("198.51.100.1"), Remote: addr("198.51.100.2"), MTU: 1480, TTL: 64},
		[]string{"mtu 1480", "sit any remote 198.51.100.2 local 198.51.100.1 ttl 64 pmtudisc"},
	},
	{
		Device{Name: "wm0", Kind: KindIP6Tnl, Local: addr("2001:db8:2::1"), Remote: addr("2001:db8:2::2"), MTU: 1460, TTL: 64},
		[]string{"mtu 1460", "ip6tnl any remote 2001:db8:2::2 local 2001:db8:2::1 hoplimit 64 encaplimit none"},
	},
	{
		Device{Name: "wm0", Kind: KindIPIP, Local: addr("198.51.100.1"), Remote: addr("198.51.100.2"), MTU: 1480},
		[]string{"mtu 1480", "ipip ipip remote 198.51.100.2 local 198.51.100.1 ttl inherit pmtudisc"},
	},
	{
		Device{Name: "up0.100", Kind: KindVLAN, Parent: "up0", VLAN: 100, MTU: 1450},
		[]string{"mtu 1450", "vlan protocol 802.1Q id 100"},
	},
}

func devicesAreMadeAndUndone(t *testing.T) {
	for _, c := range devices {
		t.Run(c.device.Kind, func(t *testing.T) {
			s := linkSite(t)
			h := s.host()
			show := func() string { return changing.ReplaceAllString(s.Sh("ip -d link show dev "+c.device.Name), "") }
			before := s.links()

			step := Step{Device: &c.device}
			s.apply(h, step)
			first := show()
			for _, want := range append(c.shown, ",UP", "alias wanmig") {
				if !strings.Contains(first, want) {
					t.Errorf("no %q in %s", want, first)
				}
			}
			applied := s.links()
			s.apply(h, step)
			if again := show(); again != first {
				t.Errorf("applied again:\n%swas:\n%s", again, first)
			}

			smaller := c.device
			smaller.MTU = 1300
			s.apply(h, Step{Device: &smaller})
			if got, want := show(), strings.Replace(first, fmt.Sprint("mtu ", c.device.MTU), "mtu 1300", 1); got != want {
				t.Errorf("with another MTU:\n%swant:\n%s", got, want)
			}
			s.Must(func() error {
				found, err := h.Leftovers(context.Background())
				if want := "[device " + c.device.Name + "]"; fmt.Sprint(found) != want {
					t.Errorf("what is ours: %q, want %s", found, want)
				}
				return err
			})
			for range 2 {
				s.revert(h, step)
			}
			testnet.Same(t, "reverted", before, s.links())

			s.Sh(step.String())
			testnet.Same(t, "typed", applied, s.links())
			s.apply(h, step) // knows it for its own
			s.Sh(step.UndoString())
			testnet.Same(t, "typed back", before, s.links())

			// An apply that a kill has cut short.
			s.Sh(made(&c.device))
			s.apply(h, step)
			testnet.Same(t, "completed", applied, s.links())
			s.revert(h, step)
			testnet.Same(t, "reverted", before, s.links())
		})
	}
}

func foreignDevicesStay(t *testing.T) {
	s := linkSite(t)
	h := s.host()
	other := strings.NewReplacer("198.51.100.2", "198.51.100.3", "2001:db8:2::2", "2001:db8:2::3", "id 100", "id 101")
	first := &devices[0].device
	type foreign struct {
		device *Device
		typed  string
		named  string // in the error
	}
	all := []foreign{
		{first, "ip link add name wm0 type veth peer name theirs", "veth"},
		{first, made(first) + "; ip link set dev wm0 alias uplink", "uplink"},
	}
	for _, c := range devices {
		d := c.device
		all = append(all,
			foreign{&d, other.Replace(made(&d)), d.Name},
			foreign{&d, strings.Replace(made(&d), "name "+d.Name, "name theirs", 1), "device theirs has the same ends"})
	}
	for _, f := range all {
		s.Sh(f.typed)
		before := s.links()
		s.Must(func() error {
			step := Step{Device: f.device}
			if err := h.Apply(context.Background(), step); !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), f.named) {
				t.Errorf("%s: %v, want %q", f.typed, err, f.named)
			}
			return h.Revert(context.Background(), step)
		})
		testnet.Same(t, f.typed, before, s.links())
		s.Sh("ip link del " + f.device.Name + " 2>/dev/null || ip link del theirs")
	}
}

// made is the command that makes a device, without those that set it up.
func made(d *Device) string {
	command, _, _ := strings.Cut(Step{Device: d}.String(), "\n")
	return command
}

// tunnelsCarryBothFamilies has the tunnels of two redirects between two hosts.
//
//	here                            there
//	eth0 -------------------------- eth0
//	198.51.100.1                    198.51.100.2
//	2001:db8:2::1                   2001:db8:2::2
//	wm0, wm1 ====================== wm0, wm1
//	lo 192.0.2.1, .11               lo 192.0.2.2, .12
//	2001:db8:1::1, ::11             2001:db8:1::2, ::12
func tunnelsCarryBothFamilies(t *testing.T) {
	here, there := joined(t)
	for i, s := range []*site{here, there} {
		s.Sh(fmt.Sprintf(`ip addr add 198.51.100.%[1]d/24 dev eth0; ip addr add 2001:db8:2::%[1]d/64 dev eth0
			for n in %[1]d 1%[1]d; do ip addr add 192.0.2.$n/32 dev lo; ip addr add 2001:db8:1::$n/128 dev lo; done
			sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.icmp_ratelimit=0`, i+1))
	}
	// steps are those of planTunnel, and routes to the VM's addresses.
	steps := func(d Device, own, others string) []Step {
		v4, v6 := "192.0.2.", "2001:db8:1::"
		return []Step{
			{Device: &d},
			{Sysctl: &Sysctl{Key: "net/ipv4/conf/" + d.Name + "/forwarding", Value: "1", Was: "0"}},
			{Sysctl: &Sysctl{Key: "net/ipv4/conf/" + d.Name + "/rp_filter", Value: "2", Was: "0"}},
			{Address: &Address{Dev: d.Name, Prefix: prefix("192.0.0." + own[len(own)-1:] + "/32")}},
			{Route: &Route{Table: unix.RT_TABLE_MAIN, Dst: prefix(v4 + others + "/32"), Dev: d.Name, Source: addr(v4 + own)}},
			{Route: &Route{Table: unix.RT_TABLE_MAIN, Dst: prefix(v6 + others + "/128"), Dev: d.Name, Source: addr(v6 + own)}},
		}
	}
	back := func(d Device) Device {
		d.Local, d.Remote = d.Remote, d.Local
		return d
	}
	in4, in6 := devices[0].device, devices[1].device
	in6.Name = "wm1"
	h, o := here.host(), there.host()
	before, beforeThere := testnet.Settled(t, here.links), testnet.Settled(t, there.links)
	steps4, steps6 := steps(in4, "1", "2"), steps(in6, "11", "12")
	back4, back6 := steps(back(in4), "2", "1"), steps(back(in6), "12", "11")
	tunnelled := here.capture("eth0")
	here.apply(h, steps4...)
	here.apply(h, steps6...)
	there.apply(o, back4...)
	there.apply(o, back6...)

	for _, s := range []*site{here, there} {
		if text := s.Sh("ip -6 addr show scope link | grep -A1 wm || true"); text != "" {
			t.Errorf("tunnels have addresses of their own: %s", text)
		}
	}
	for _, c := range []struct {
		vm    string
		size  int // of an echo request's content that fills the tunnel's MTU
		outer string
	}{
		{"192.0.2.2", 1480 - 28, "IPv4 with IPv4, 1500 bytes, TTL 64, DF"},
		{"2001:db8:1::2", 1480 - 48, "IPv4 with IPv6, 1500 bytes, TTL 64, DF"},
		{"192.0.2.12", 1460 - 28, "IPv6 with IPv4, 1500 bytes, TTL 64"},
		{"2001:db8:1::12", 1460 - 48, "IPv6 with IPv6, 1500 bytes, TTL 64"},
	} {
		here.Sh(fmt.Sprintf("ping -c 1 -W 10 -s %d %s", c.size, c.vm))
		for _, what := range []string{"question", "answer"} {
			if p := tunnelled.next(5 * time.Second); outer(p) != c.outer {
				t.Errorf("%s of %s: %s, want %s: % x", what, c.vm, outer(p), c.outer, p)
			}
		}
	}
	if p := tunnelled.next(time.Second); p != nil {
		t.Errorf("a packet that nobody has sent: %s: % x", outer(p), p)
	}
	here.revert(h, append(steps4, steps6...)...)
	there.revert(o, append(back4, back6...)...)
	testnet.Same(t, "reverted here", before, testnet.Settled(t, here.links))
	testnet.Same(t, "reverted there", beforeThere, testnet.Settled(t, there.links))
}

// A capture takes the packets that tunnels send and receive at an interface.
type capture struct {
	t  *testing.T
	fd int
}

func (s *site) capture(dev string) capture {
	s.t.Helper()
	c := capture{t: s.t}
	s.Must(func() error {
		at, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: at.Index})
	})
	s.t.Cleanup(func() { unix.Close(c.fd) })
	return c
}

// next returns the next packet, nil if there is none in time.
func (c capture) next(within time.Duration) []byte {
	c.t.Helper()
	for end := time.Now().Add(within); ; {
		left := unix.NsecToTimeval(max(int64(time.Until(end)), 1000))
		if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &left); err != nil {
			c.t.Fatal(err)
		}
		b := make([]byte, 2048)
		n, err := unix.Read(c.fd, b)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
		case err != nil:
			c.t.Fatal(err)
		case outer(b[:n]) != "":
			return b[:n]
		}
	}
}

// outer describes the outer header of a tunnel's packet, "" if it is none.
func outer(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	switch b[0] >> 4 {
	case 4:
		ip, ok := gopacket.NewPacket(b, layers.LayerTypeIPv4, gopacket.Default).NetworkLayer().(*layers.IPv4)
		if ok {
			return fmt.Sprintf("IPv4 with %s, %d bytes, TTL %d, %s", ip.Protocol, len(b), ip.TTL, ip.Flags)
		}
	case 6:
		ip, ok := gopacket.NewPacket(b, layers.LayerTypeIPv6, gopacket.Default).NetworkLayer().(*layers.IPv6)
		// The interface's own are NDP, and MLD, which has options.
		if ok && ip.NextHeader != layers.IPProtocolICMPv6 && ip.NextHeader != layers.IPProtocolIPv6HopByHop {
			return fmt.Sprintf("IPv6 with %s, %d bytes, TTL %d", ip.NextHeader, len(b), ip.HopLimit)
		}
	}
	return ""
}
