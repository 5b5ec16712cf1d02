//go:build lab

package encap

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inject sends packets with outer headers of the caller's making from the peer's namespace.
func (s *space) inject(packets ...[]byte) {
	s.t.Helper()
	s.Must(func() error {
		for _, p := range packets {
			family, to := unix.AF_INET, unix.Sockaddr(nil)
			if p[0]>>4 == 4 {
				to = &unix.SockaddrInet4{Addr: [4]byte(p[16:])}
			} else {
				family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte(p[24:])}
			}
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			if err != nil {
				return err
			}
			err = unix.Sendto(fd, p, 0, to)
			unix.Close(fd)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func TestHostilePackets(t *testing.T) {
	for _, o := range outers {
		t.Run(o.name, func(t *testing.T) {
			p := newPair(t)
			near, far := p.connect(o)
			p.peer.echo(":7")
			// The route back is by the VM's address, so that the source's network answers for no spoofed ones.
			stranger := addr("10.9.0.66")
			if o.peer.Is6() {
				stranger = addr("fd09::66")
			}
			wrap := func(src netip.Addr, protocol byte, inner []byte) []byte {
				return packetOf(src, o.source, protocol, 0, inner)
			}
			good4 := packetOf(vm4, client4, unix.IPPROTO_UDP, 0, udpOf(1, 2, "hello"))
			good6 := packetOf(vm6, client6, unix.IPPROTO_UDP, 0, udpOf(1, 2, "hello"))
			deep4 := packetOf(vm4, client4, protocolIPv4, 0, good4)
			deep6 := packetOf(vm6, client6, protocolIPv6, 0, good6)
			hidden := packetOf(vm6, client6, unix.IPPROTO_DSTOPTS, 0, append([]byte{protocolIPv4, 0, 1, 4, 0, 0, 0, 0}, good4...))
			alien4 := packetOf(addr("10.2.0.3"), client4, unix.IPPROTO_UDP, 0, udpOf(1, 2, "hello"))
			alien6 := packetOf(addr("fd02::3"), client6, unix.IPPROTO_UDP, 0, udpOf(1, 2, "hello"))
			long := packetOf(vm4, client4, unix.IPPROTO_UDP, 0, udpOf(1, 2, "hello"))
			binary.BigEndian.PutUint16(long[2:], uint16(len(long)+1))
			refreshChecksum(long)
			broken := packetOf(vm4, client4, unix.IPPROTO_UDP, 0, udpOf(1, 2, "hello"))
			broken[10]++

			var hostile [][]byte
			var want Drops
			add := func(counter *uint64, src netip.Addr, protocol byte, inner []byte) {
				hostile = append(hostile, wrap(src, protocol, inner))
				*counter++
			}
			add(&want.Spoofed, stranger, protocolIPv4, good4)
			add(&want.Spoofed, stranger, protocolIPv6, good6)
			add(&want.Spoofed, stranger, protocolIPv6, nil)
			for n := range len(good4) {
				add(&want.Malformed, o.peer, protocolIPv4, good4[:n])
			}
			for n := range len(good6) {
				add(&want.Malformed, o.peer, protocolIPv6, good6[:n])
			}
			add(&want.Malformed, o.peer, protocolIPv4, good6) // the protocol says another version
			add(&want.Malformed, o.peer, protocolIPv6, good4)
			add(&want.Malformed, o.peer, protocolIPv4, long)
			add(&want.Malformed, o.peer, protocolIPv4, broken)
			add(&want.Nested, o.peer, protocolIPv4, deep4)
			add(&want.Nested, o.peer, protocolIPv6, deep6)
			add(&want.Nested, o.peer, protocolIPv6, hidden)
			add(&want.Foreign, o.peer, protocolIPv4, alien4)
			add(&want.Foreign, o.peer, protocolIPv6, alien6)
			hostile = append(hostile, packetOf(o.peer, o.source, protocolIPv4, ce, good4)) // a transport that knows no ECN
			want.Congested++

			p.peer.inject(hostile...)
			await(t, near, "all drops", func(s Stats) bool { return s.Drops == want })
			if r := near.Stats().Received; r.Packets != 0 || !r.Last.IsZero() {
				t.Errorf("something hostile was received: %+v", r)
			}

			start := time.Now()
			p.client.Sh("ping -c 1 -W 5 " + vm4.String())
			transfer(t, p.client, net.JoinHostPort(vm6.String(), "7"), 1<<20)
			s := near.Stats()
			if s.Drops != want || far.Stats().Drops != (Drops{}) {
				t.Errorf("dropped %+v and %+v, want %+v and none", s.Drops, far.Stats().Drops, want)
			}
			for _, l := range []time.Time{s.Sent.Last, s.Received.Last} {
				if l.Before(start) || l.After(time.Now()) {
					t.Errorf("last packet at %v, now it is %v", l, time.Now())
				}
			}
		})
	}
}

// TestPadding sends an inner packet that is followed by bytes that do not belong to it.
func TestPadding(t *testing.T) {
	p := newPair(t)
	near, _ := p.connect(outer4Ends)
	var server net.PacketConn
	p.client.Must(func() (err error) {
		server, err = net.ListenPacket("udp4", ":9000")
		return err
	})
	defer server.Close()
	inner := packetOf(vm4, client4, unix.IPPROTO_UDP, 0, udpOf(9, 9000, "hello"))
	p.peer.inject(packetOf(outer4Ends.peer, outer4Ends.source, protocolIPv4, 0, append(inner, "trailer"...)))
	server.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 100)
	n, _, err := server.ReadFrom(b)
	if err != nil || string(b[:n]) != "hello" {
		t.Errorf("received %q, %v; stats %+v", b[:n], err, near.Stats())
	}
	await(t, near, fmt.Sprintf("%d bytes", len(inner)), func(s Stats) bool { return s.Received.Bytes == uint64(len(inner)) })
}

// TestForeignPacketsAreNotSent routes what is not the VM's into the device.
func TestForeignPacketsAreNotSent(t *testing.T) {
	p := newPair(t)
	near, far := p.connect(outer4Ends)
	p.source.ip("route add 10.2.0.0/24 dev wm0")
	p.client.Try("ping -c 1 -W 0.1 10.2.0.3")
	await(t, near, "one foreign packet", func(s Stats) bool { return s.Drops.Foreign == 1 })
	// A tunnel that is routed into itself does not multiply packets.
	p.source.ip("route add 10.9.0.2/32 dev wm0")
	p.client.Try("ping -c 1 -W 0.1 " + vm4.String())
	await(t, near, "one nested packet", func(s Stats) bool { return s.Drops.Nested == 1 })
	if s := far.Stats(); s.Received.Packets != 0 {
		t.Errorf("received %+v", s)
	}
}

// TestProbesPass sends UDP between the outer addresses through the tunnel.
func TestProbesPass(t *testing.T) {
	for _, o := range outers {
		t.Run(o.name, func(t *testing.T) {
			p := newPair(t)
			near, far := p.connect(o)
			// IPv6 wants a route on the device that a socket is bound to, and the outer packets must not have it.
			for _, s := range []*space{p.source, p.peer} {
				s.ip(`-6 route add default dev wm0 table 77
					-6 rule add oif wm0 lookup 77`)
			}
			listen := func(s *space, a netip.Addr, port uint16) (c net.PacketConn) {
				t.Helper()
				s.Must(func() (err error) {
					config := net.ListenConfig{Control: bindToDevice}
					c, err = config.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(a, port).String())
					return err
				})
				t.Cleanup(func() { c.Close() })
				return c
			}
			one, two := listen(p.source, o.source, probePort), listen(p.peer, o.peer, probePort)
			b := make([]byte, 100)
			for _, way := range []struct {
				from, to net.PacketConn
				at       netip.Addr
			}{{one, two, o.peer}, {two, one, o.source}} {
				to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(way.at, probePort))
				if _, err := way.from.WriteTo([]byte("are you there?"), to); err != nil {
					t.Fatal(err)
				}
				way.to.SetReadDeadline(time.Now().Add(10 * time.Second))
				if n, from, err := way.to.ReadFrom(b); err != nil || string(b[:n]) != "are you there?" {
					t.Errorf("received %q from %v, %v", b[:n], from, err)
				}
			}
			other := listen(p.source, o.source, probePort+1)
			if _, err := other.WriteTo([]byte("let me in"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(o.peer, probePort))); err != nil {
				t.Fatal(err)
			}
			await(t, near, "another port's packet dropped", func(s Stats) bool { return s.Drops.Foreign == 1 })
			await(t, far, "one probe each way", func(s Stats) bool { return s.Received.Packets == 1 && s.Sent.Packets == 1 })
		})
	}
}
