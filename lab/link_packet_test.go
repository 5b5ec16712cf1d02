package lab

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// sample is a packet with what readHeaders is to read of it.
type sample struct {
	name    string
	bytes   []byte
	headers headers
}

// build serializes layers with lengths and checksums.
func build(t testing.TB, all ...gopacket.SerializableLayer) []byte {
	t.Helper()
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, all...); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// samplePackets are packets of each kind, small and large.
func samplePackets(t testing.TB) []sample {
	t.Helper()
	ip4 := func(p layers.IPProtocol) *layers.IPv4 {
		return &layers.IPv4{Version: 4, TTL: 9, Protocol: p, SrcIP: net.IP{10, 255, 0, 1}, DstIP: net.IP{10, 255, 0, 2}}
	}
	ip6 := func(p layers.IPProtocol) *layers.IPv6 {
		return &layers.IPv6{Version: 6, HopLimit: 9, NextHeader: p, SrcIP: net.ParseIP("fd00:255::1"), DstIP: net.ParseIP("fd00:255::2")}
	}
	udp := func(ip gopacket.NetworkLayer) *layers.UDP {
		u := &layers.UDP{SrcPort: 5000, DstPort: 7946}
		if err := u.SetNetworkLayerForChecksum(ip); err != nil {
			t.Fatal(err)
		}
		return u
	}
	tcp := func(ip gopacket.NetworkLayer) *layers.TCP {
		s := &layers.TCP{SrcPort: 5000, DstPort: 7946, Seq: 7, ACK: true, Window: 100}
		if err := s.SetNetworkLayerForChecksum(ip); err != nil {
			t.Fatal(err)
		}
		return s
	}
	want := func(protocol byte, ports int, v6 bool) headers {
		h := headers{protocol: protocol, ports: ports}
		from, to := netip.MustParseAddr("10.255.0.1"), netip.MustParseAddr("10.255.0.2")
		if v6 {
			from, to = netip.MustParseAddr("fd00:255::1"), netip.MustParseAddr("fd00:255::2")
		}
		var sport, dport uint16
		if ports > 0 {
			sport, dport = 5000, 7946
		}
		h.from, h.to = netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, dport)
		return h
	}
	small, large := gopacket.Payload("hello"), gopacket.Payload(bytes.Repeat([]byte("data"), 350))

	udp4, tcp4, icmp4 := ip4(layers.IPProtocolUDP), ip4(layers.IPProtocolTCP), ip4(layers.IPProtocolICMPv4)
	udp6, tcp6 := ip6(layers.IPProtocolUDP), ip6(layers.IPProtocolTCP)
	later := ip4(layers.IPProtocolUDP)
	later.FragOffset = 100
	options := ip4(layers.IPProtocolUDP)
	options.Options = []layers.IPv4Option{{OptionType: 1}, {OptionType: 1}, {OptionType: 1}, {OptionType: 0}}

	// IPv6 with a header of options for the destination, and as a later fragment.
	plain := build(t, udp6, udp(udp6), small)
	extended := append(bytes.Clone(plain[:40]), unix.IPPROTO_UDP, 0, 1, 4, 0, 0, 0, 0)
	extended[6] = unix.IPPROTO_DSTOPTS
	fragment := append(bytes.Clone(plain[:40]), unix.IPPROTO_UDP, 0, 0, 8, 0, 0, 0, 1)
	fragment[6] = unix.IPPROTO_FRAGMENT
	for _, b := range [][]byte{extended, fragment} {
		b[5] += 8 // the length of what follows
	}
	return []sample{
		{"UDP", build(t, udp4, udp(udp4), small), want(unix.IPPROTO_UDP, 20, false)},
		{"large UDP", build(t, udp4, udp(udp4), large), want(unix.IPPROTO_UDP, 20, false)},
		{"UDP behind options", build(t, options, udp(options), small), want(unix.IPPROTO_UDP, 24, false)},
		{"later fragment of UDP", build(t, later, small), want(unix.IPPROTO_UDP, 0, false)},
		{"TCP", build(t, tcp4, tcp(tcp4), small), want(unix.IPPROTO_TCP, 20, false)},
		{"large TCP", build(t, tcp4, tcp(tcp4), large), want(unix.IPPROTO_TCP, 20, false)},
		{"ICMP", build(t, icmp4, &layers.ICMPv4{TypeCode: 8 << 8}, small), want(unix.IPPROTO_ICMP, 0, false)},
		{"UDP over IPv6", plain, want(unix.IPPROTO_UDP, 40, true)},
		{"large UDP over IPv6", build(t, udp6, udp(udp6), large), want(unix.IPPROTO_UDP, 40, true)},
		{"TCP over IPv6", build(t, tcp6, tcp(tcp6), small), want(unix.IPPROTO_TCP, 40, true)},
		{"large TCP over IPv6", build(t, tcp6, tcp(tcp6), large), want(unix.IPPROTO_TCP, 40, true)},
		{"UDP over IPv6 behind options", append(extended, plain[40:]...), want(unix.IPPROTO_UDP, 48, true)},
		{"later fragment of UDP over IPv6", append(fragment, plain[40:]...), want(unix.IPPROTO_UDP, 0, true)},
	}
}

func TestReadHeaders(t *testing.T) {
	for _, s := range samplePackets(t) {
		if got := readHeaders(s.bytes); got != s.headers {
			t.Errorf("%s: %+v, want %+v", s.name, got, s.headers)
		}
		for n := range min(len(s.bytes), 100) {
			if got := readHeaders(s.bytes[:n]); got.ports > 0 && got != s.headers {
				t.Errorf("%s, %d bytes of it: %+v", s.name, n, got)
			}
		}
	}
	if got := readHeaders([]byte{0x44, 19: 0}); got != (headers{}) {
		t.Errorf("IPv4 with a header of 16 bytes: %+v", got)
	}
}

func FuzzReadHeaders(f *testing.F) {
	for _, s := range samplePackets(f) {
		f.Add(s.bytes)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h := readHeaders(b)
		if h.ports > 0 {
			// They can be written where they were read, and nothing else changes
			// but the checksum.
			before := bytes.Clone(b)
			setPort(b, h, h.ports, h.from.Port()^1)
			setPort(b, h, h.ports+2, h.to.Port()^1)
			after := readHeaders(b)
			if after.from.Port() != h.from.Port()^1 || after.to.Port() != h.to.Port()^1 || !bytes.Equal(before[:h.ports], b[:h.ports]) {
				t.Fatalf("%+v became %+v", h, after)
			}
		}
		if answer := tooBig(b, 1280); answer != nil && readHeaders(answer).to.Addr() != h.from.Addr() {
			t.Fatalf("the answer to %+v is %+v", h, readHeaders(answer))
		}
	})
}

// valid checks the checksum of TCP, UDP or ICMP, which begins at next: RFC 1071
// with the pseudo header where there is one.
func valid(t *testing.T, name string, b []byte, next int) {
	t.Helper()
	h := readHeaders(b)
	covered := bytes.Clone(b[next:])
	if h.protocol != unix.IPPROTO_ICMP {
		length := len(covered)
		covered = slices.Concat(h.from.Addr().AsSlice(), h.to.Addr().AsSlice(), []byte{0, h.protocol, byte(length >> 8), byte(length)}, covered)
	}
	if len(covered)%2 == 1 {
		covered = append(covered, 0)
	}
	sum := uint32(0)
	for i := 0; i < len(covered); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(covered[i:]))
	}
	for sum>>16 > 0 {
		sum = sum>>16 + sum&0xffff
	}
	if sum != 0xffff {
		t.Errorf("%s: wrong checksum, all sums up to %#x", name, sum)
	}
}

func TestSetPortKeepsChecksumsRight(t *testing.T) {
	for _, s := range samplePackets(t) {
		if s.headers.ports == 0 {
			continue
		}
		for _, port := range []uint16{0, 1, 5000, 0x7fff, 0x8000, 61000, 65535} {
			b := bytes.Clone(s.bytes)
			setPort(b, s.headers, s.headers.ports, port)
			setPort(b, s.headers, s.headers.ports+2, ^port)
			valid(t, s.name, b, s.headers.ports)
			h := readHeaders(b)
			if h.from.Port() != port || h.to.Port() != ^port {
				t.Errorf("%s: ports %v and %v, want %d and %d", s.name, h.from, h.to, port, ^port)
			}
		}
	}
	// A datagram without a checksum stays one.
	b := samplePackets(t)[0]
	b.bytes[26], b.bytes[27] = 0, 0
	setPort(b.bytes, b.headers, b.headers.ports, 9)
	if b.bytes[26] != 0 || b.bytes[27] != 0 {
		t.Error("a datagram without a checksum got one")
	}
}

func TestTooBigAnswersTheSender(t *testing.T) {
	for _, s := range samplePackets(t) {
		answer := tooBig(s.bytes, 1280)
		h := readHeaders(answer)
		if h.from.Addr() != s.headers.to.Addr() || h.to.Addr() != s.headers.from.Addr() {
			t.Errorf("%s: the answer goes from %v to %v", s.name, h.from, h.to)
		}
		var mtu int
		var cited []byte
		if s.headers.from.Addr().Is4() {
			valid(t, s.name, answer, 20)
			p := gopacket.NewPacket(answer, layers.LayerTypeIPv4, gopacket.Default)
			icmp := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
			if icmp.TypeCode.Type() != 3 || icmp.TypeCode.Code() != 4 || len(answer) > 576 {
				t.Errorf("%s: %v in %d bytes", s.name, icmp.TypeCode, len(answer))
			}
			mtu, cited = int(icmp.Seq), icmp.Payload
		} else {
			valid(t, s.name, answer, 40)
			p := gopacket.NewPacket(answer, layers.LayerTypeIPv6, gopacket.Default)
			icmp := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
			if icmp.TypeCode.Type() != 2 || icmp.TypeCode.Code() != 0 || len(answer) > 1280 {
				t.Errorf("%s: %v in %d bytes", s.name, icmp.TypeCode, len(answer))
			}
			mtu, cited = int(icmp.Payload[2])<<8+int(icmp.Payload[3]), icmp.Payload[4:]
		}
		if mtu != 1280 || len(cited) < min(len(s.bytes), 500) || !bytes.HasPrefix(s.bytes, cited) {
			t.Errorf("%s: the answer says MTU %d and cites %d bytes", s.name, mtu, len(cited))
		}
	}
	if answer := tooBig(make([]byte, 1500), 1280); answer != nil {
		t.Errorf("no IP is answered with %x", answer)
	}
}
