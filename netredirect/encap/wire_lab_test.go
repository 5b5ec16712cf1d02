//go:build lab

package encap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// capture returns the IP packets that arrive at an interface, as they are on the wire.
func (s *space) capture(name string) (next func() []byte) {
	s.t.Helper()
	var f *os.File
	s.Must(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "capture")
		device, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: device.Index})
	})
	s.t.Cleanup(func() { f.Close() })
	return func() []byte {
		s.t.Helper()
		b := make([]byte, 65536)
		f.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := f.Read(b)
		if err != nil {
			s.t.Fatalf("capture: %v", err)
		}
		return b[:n]
	}
}

func TestOuterHeaders(t *testing.T) {
	const tos = 0xb8 | ect0 // expedited forwarding
	inside4 := packetOf(client4, vm4, unix.IPPROTO_UDP, tos, udpOf(1, 2, "hello"))
	inside6 := packetOf(client6, vm6, unix.IPPROTO_UDP, tos, udpOf(1, 2, "hello"))
	for _, o := range outers {
		t.Run(o.name, func(t *testing.T) {
			p := newPair(t)
			p.source.open(p.near(o))
			p.route()
			p.client.Sh("ping -c 1 10.1.0.1") // so that they are neighbours
			p.client.Sh("ping -c 1 fd01::1")
			next := p.peer.capture("wan")
			ids := map[uint16]bool{}
			for _, inner := range [][]byte{inside4, inside6, inside4, inside6} {
				p.client.inject(inner)
				var got []byte
				protocol := byte(protocolIPv4)
				if inner[0]>>4 == 6 {
					protocol = protocolIPv6
				}
				for { // past the neighbours' talk
					got = next()
					if got[0]>>4 == 4 && got[9] == protocol || got[0]>>4 == 6 && got[6] == protocol {
						break
					}
				}
				want := packetOf(o.source, o.peer, protocol, tos, forwarded(inner))
				if o.source.Is4() {
					id := binary.BigEndian.Uint16(got[4:])
					if id == 0 || ids[id] {
						t.Errorf("outer ID %d is zero or came before", id)
					}
					ids[id] = true
					binary.BigEndian.PutUint16(want[4:], id)
					refreshChecksum(want)
				} else {
					copy(want[1:4], []byte{want[1] | got[1]&0xf, got[2], got[3]}) // the flow label is the kernel's choice
				}
				if !bytes.Equal(got, want) {
					t.Errorf("on the wire:\n% x\nwant:\n% x", got, want)
				}
			}
		})
	}
}

// forwarded is what a router makes of a packet.
func forwarded(b []byte) []byte {
	b = bytes.Clone(b)
	if b[0]>>4 == 6 {
		b[7]--
	} else {
		b[8]--
		refreshChecksum(b)
	}
	return b
}

// TestCongestionIsToldInside marks outer packets as a router on the way would.
func TestCongestionIsToldInside(t *testing.T) {
	for _, o := range outers {
		t.Run(o.name, func(t *testing.T) {
			p := newPair(t)
			near, _ := p.connect(o)
			next := p.client.capture("eth0")
			for _, inner := range [][]byte{
				packetOf(vm4, client4, unix.IPPROTO_UDP, ect0, udpOf(1, 2, "hello")),
				packetOf(vm6, client6, unix.IPPROTO_UDP, ect0, udpOf(1, 2, "hello")),
			} {
				protocol, want := byte(protocolIPv4), packetOf(vm4, client4, unix.IPPROTO_UDP, ce, udpOf(1, 2, "hello"))
				if inner[0]>>4 == 6 {
					protocol, want = protocolIPv6, packetOf(vm6, client6, unix.IPPROTO_UDP, ce, udpOf(1, 2, "hello"))
				}
				p.peer.inject(packetOf(o.peer, o.source, protocol, ce, inner))
				var got []byte
				want = forwarded(want)
				for got = next(); len(got) != len(want) || !bytes.HasSuffix(got, []byte("hello")); got = next() {
				}
				if !bytes.Equal(got, want) {
					t.Errorf("came out:\n% x\nwant:\n% x", got, want)
				}
			}
			if d := near.Stats().Drops; d != (Drops{}) {
				t.Errorf("dropped: %+v", d)
			}
		})
	}
}

// TestNarrowPath has a router on the way whose next link takes shorter packets:
//
//	client --- source === router =(1400)= peer (vm)
func TestNarrowPath(t *testing.T) {
	for _, o := range outers {
		t.Run(o.name, func(t *testing.T) {
			p := &pair{newSpace(t, "client"), newSpace(t, "source"), newSpace(t, "peer")}
			router := newSpace(t, "router")
			testnet.Join(p.client.Space, "eth0", p.source.Space, "lan")
			testnet.Join(p.source.Space, "wan", router.Space, "near")
			testnet.Join(router.Space, "far", p.peer.Space, "wan")
			p.addresses()
			router.ip(`addr add 10.9.0.3/24 dev near
				addr add fd09::3/64 dev near nodad
				addr add 10.8.0.3/24 dev far
				addr add fd08::3/64 dev far nodad
				link set far mtu 1400`)
			p.source.ip(`route add 10.8.0.0/24 via 10.9.0.3
				route add fd08::/64 via fd09::3`)
			p.peer.ip(`addr flush dev wan scope global
				addr add 10.8.0.2/24 dev wan
				addr add fd08::2/64 dev wan nodad
				link set wan mtu 1400
				route add 10.9.0.0/24 via 10.8.0.3
				route add fd09::/64 via fd08::3`)
			far := outer{source: o.source, peer: addr("10.8.0.2"), mtu: o.mtu}
			if o.peer.Is6() {
				far.peer = addr("fd08::2")
			}
			near, _ := p.connect(far)
			p.peer.echo(":7")
			for _, vm := range []string{vm4.String(), vm6.String()} {
				transfer(t, p.client, net.JoinHostPort(vm, "7"), 1<<20)
			}
			if near.Stats().Drops.TooBig == 0 {
				t.Error("nothing was too big")
			}
			want := fmt.Sprintf("mtu %d ", o.mtu-100)
			if out := p.source.Sh("ip link show wm0"); !strings.Contains(out, want) {
				t.Errorf("want %q, have:\n%s", want, out)
			}
			// Too high: it comes down again.
			if err := near.SetMTU(o.mtu); err != nil {
				t.Fatal(err)
			}
			p.client.Try("ping -c 1 -W 0.2 -M do -s " + fmt.Sprint(o.mtu-48) + " " + vm6.String())
			if out := p.source.Sh("ip link show wm0"); !strings.Contains(out, want) {
				t.Errorf("want %q, have:\n%s", want, out)
			}
		})
	}
}

// TestPeerUnreachable has packets come back with errors for a while.
func TestPeerUnreachable(t *testing.T) {
	p := newPair(t)
	near, far := p.connect(outer4Ends)
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())
	p.source.ip("route add unreachable 10.9.0.2/32")
	p.client.Try("ping -c 1 -W 0.1 " + vm4.String())
	await(t, near, "one packet unsent", func(s Stats) bool { return s.Drops.Unsent == 1 })
	p.source.ip("route del unreachable 10.9.0.2/32")
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())

	// Without our tunnel the peer's kernel refuses the protocol by ICMP.
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	refusals := p.source.capture("wan")
	p.client.Try("ping -c 3 -i 0.05 -W 0.1 " + vm4.String())
	for b := refusals(); b[0]>>4 != 4 || b[9] != unix.IPPROTO_ICMP || b[20] != 3; b = refusals() { // destination unreachable
	}
	p.peer.open(p.far(outer4Ends))
	p.routeBack()
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())
}
