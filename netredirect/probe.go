package netredirect

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A probe is a UDP packet inside the tunnel, as long as the tunnel's MTU, with a
// random number that comes back in an answer. Both ends write it to and read it
// from the tunnel's device itself, so that it takes the tunnel's way and no
// other, and no address of a host has to change for it.
const (
	probePort  = 7945
	probeMagic = "wanmig probe 1 "
	probeEach  = 200 * time.Millisecond
	probeTries = 8
)

// Probes are between addresses that no network uses: those of RFC 7335 and 6666.
var (
	probeSource      = []netip.Addr{netip.MustParseAddr("192.0.0.2"), netip.MustParseAddr("100::2")}
	probeDestination = []netip.Addr{netip.MustParseAddr("192.0.0.1"), netip.MustParseAddr("100::1")}
	probeAddresses   = slices.Concat(probeSource, probeDestination)
)

// probe reports whether packets of a size come back through the tunnel, in each
// address family that the VM uses.
func (m *Manager) probe(ctx context.Context, x *redirect, size int) (bool, error) {
	port, err := openDevice(x.Device)
	if err != nil {
		return false, err
	}
	defer port.Close()
	wanted := map[int][]byte{} // family: nonce
	for family := range probeSource {
		if slices.ContainsFunc(x.addresses(), func(a netip.Addr) bool { return a.Is4() == probeSource[family].Is4() }) {
			nonce := make([]byte, 16)
			rand.Read(nonce) // never fails
			wanted[family] = nonce
		}
	}
	buf := make([]byte, maxMTU)
	for range probeTries {
		for family, nonce := range wanted {
			packet, err := probePacket(probeSource[family], probeDestination[family], append([]byte(probeMagic+"?"), nonce...), size)
			if err == nil {
				err = port.send(packet, probeSource[family].Is4())
			}
			if err != nil {
				return false, fmt.Errorf("probe tunnel %s: %w", x.Device, err)
			}
		}
		for until := time.Now().Add(probeEach); len(wanted) > 0; {
			n, err := port.receive(buf, until)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return false, fmt.Errorf("probe tunnel %s: %w", x.Device, err)
			}
			if _, _, payload, ok := readProbe(buf[:n]); ok {
				for family, nonce := range wanted {
					if bytes.HasPrefix(payload, append([]byte(probeMagic+"!"), nonce...)) {
						delete(wanted, family)
					}
				}
			}
		}
		if len(wanted) == 0 {
			return true, nil
		}
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
	}
	return false, nil
}

// answerProbes answers those of the source, while the redirect is made ready.
func (m *Manager) answerProbes(x *redirect) {
	port, err := openDevice(x.Device)
	if err != nil {
		x.problem("probes", err)
		return
	}
	defer port.Close()
	buf := make([]byte, maxMTU)
	for x.ctx.Err() == nil && x.state() == Opening {
		n, err := port.receive(buf, time.Now().Add(probeEach))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return // the device is gone
		}
		from, to, payload, ok := readProbe(buf[:n])
		if !ok || !bytes.HasPrefix(payload, []byte(probeMagic+"?")) || !slices.Contains(probeDestination, to) {
			continue
		}
		payload = slices.Clone(payload)
		payload[len(probeMagic)] = '!'
		answer, err := probePacket(to, from, payload, n)
		if err == nil {
			err = port.send(answer, to.Is4())
		}
		x.problem("probes", err)
	}
}

// probePacket makes a UDP packet of a size that must not be fragmented.
func probePacket(from, to netip.Addr, payload []byte, size int) ([]byte, error) {
	udp := &layers.UDP{SrcPort: probePort, DstPort: probePort}
	var ip gopacket.SerializableLayer
	header := 40 + 8
	if from.Is4() {
		header = 20 + 8
		ip4 := &layers.IPv4{Version: 4, TTL: 1, Flags: layers.IPv4DontFragment, Protocol: layers.IPProtocolUDP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
		_ = udp.SetNetworkLayerForChecksum(ip4) // it is one
		ip = ip4
	} else {
		ip6 := &layers.IPv6{Version: 6, HopLimit: 1, NextHeader: layers.IPProtocolUDP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
		_ = udp.SetNetworkLayerForChecksum(ip6)
		ip = ip6
	}
	if room := size - header; room > len(payload) {
		payload = append(slices.Clone(payload), make([]byte, room-len(payload))...)
	}
	b := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, udp, gopacket.Payload(payload))
	return b.Bytes(), err
}

// readProbe takes a probe's packet apart; ok is false for any other.
func readProbe(b []byte) (from, to netip.Addr, payload []byte, ok bool) {
	if len(b) < 1 || b[0]>>4 != 4 && b[0]>>4 != 6 {
		return from, to, nil, false
	}
	first := layers.LayerTypeIPv4
	if b[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	p := gopacket.NewPacket(b, first, gopacket.NoCopy)
	udp, isUDP := p.TransportLayer().(*layers.UDP)
	if p.ErrorLayer() != nil || p.NetworkLayer() == nil || !isUDP || udp.DstPort != probePort || udp.SrcPort != probePort {
		return from, to, nil, false
	}
	flow := p.NetworkLayer().NetworkFlow()
	from, ok1 := netip.AddrFromSlice(flow.Src().Raw())
	to, ok2 := netip.AddrFromSlice(flow.Dst().Raw())
	return from, to, udp.Payload, ok1 && ok2 && bytes.HasPrefix(udp.Payload, []byte(probeMagic))
}

// probeFilter takes UDP between the probes' ports out of IP packets, and leaves
// what else a tunnel carries to the kernel.
func probeFilter() []bpf.Instruction {
	drop, accept := bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: maxMTU}
	is := func(v uint32) []bpf.Instruction {
		return []bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: 1}, drop}
	}
	v4 := slices.Concat(
		[]bpf.Instruction{bpf.LoadAbsolute{Off: 9, Size: 1}}, is(unix.IPPROTO_UDP),
		[]bpf.Instruction{bpf.LoadAbsolute{Off: 6, Size: 2}, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0x1fff}}, is(0), // no later fragment
		[]bpf.Instruction{bpf.LoadMemShift{Off: 0}, bpf.LoadIndirect{Off: 0, Size: 4}}, is(probePort<<16|probePort),
		[]bpf.Instruction{accept})
	v6 := slices.Concat(
		[]bpf.Instruction{bpf.LoadAbsolute{Off: 6, Size: 1}}, is(unix.IPPROTO_UDP),
		[]bpf.Instruction{bpf.LoadAbsolute{Off: 40, Size: 4}}, is(probePort<<16|probePort),
		[]bpf.Instruction{accept})
	version := []bpf.Instruction{bpf.LoadAbsolute{Off: 0, Size: 1}, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0xf0},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0x40, SkipFalse: uint8(len(v4))}}
	return slices.Concat(version, v4, is(0x60), v6)
}

func attach(fd int, code []bpf.Instruction) error {
	raw, err := bpf.Assemble(code)
	if err != nil {
		return err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

// device reads and writes the IP packets of a tunnel's device beside the kernel.
type device struct {
	fd    int
	index int
}

func openDevice(name string) (*device, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("open device %s: %w", name, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open device %s: %w", name, err)
	}
	if err := attach(fd, probeFilter()); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("filter device %s: %w", name, err)
	}
	all := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open device %s: %w", name, err)
	}
	return &device{fd, link.Index}, nil
}

func (d *device) Close() { unix.Close(d.fd) }

// send puts a packet into the tunnel. One for which its queue has no room is
// lost, as on any link.
func (d *device) send(packet []byte, v4 bool) error {
	protocol := uint16(unix.ETH_P_IPV6)
	if v4 {
		protocol = unix.ETH_P_IP
	}
	err := unix.Sendto(d.fd, packet, 0, &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8, Ifindex: d.index})
	if err == unix.ENOBUFS {
		return nil
	}
	return err
}

// receive returns the next packet that comes out of the tunnel, or
// os.ErrDeadlineExceeded.
func (d *device) receive(buf []byte, until time.Time) (int, error) {
	for {
		left := time.Until(until)
		if left <= 0 {
			return 0, os.ErrDeadlineExceeded
		}
		ready := []unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(ready, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return 0, err
		}
		if n == 0 || err != nil {
			continue
		}
		n, from, err := unix.Recvfrom(d.fd, buf, 0)
		if err != nil {
			return 0, err
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		return n, nil
	}
}
