package encap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	machine4, machine6 = netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::10")
	user4, user6       = netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:1::7")
)

// chain makes the payload of an IPv6 packet: extension headers of 8 bytes, each told the next one, and what follows them.
func chain(protocols []byte, payload []byte) []byte {
	var b []byte
	for i := range len(protocols) - 1 {
		b = append(b, protocols[i+1], 0, 0, 0, 0, 0, 0, 0)
	}
	return append(b, payload...)
}

// chained is an IPv6 packet with extension headers before the last of protocols.
func chained(payload []byte, protocols ...byte) []byte {
	return packetOf(user6, machine6, protocols[0], 0, chain(protocols, payload))
}

func repeat(protocol byte, n int, last byte) []byte {
	return append(bytes.Repeat([]byte{protocol}, n), last)
}

// change returns b with f applied, and the checksum of an IPv4 header right again.
func change(b []byte, f func(b []byte)) []byte {
	b = bytes.Clone(b)
	f(b)
	if b[0]>>4 == 4 {
		refreshChecksum(b)
	}
	return b
}

func at(i int, values ...byte) func([]byte) { return func(b []byte) { copy(b[i:], values) } }

const (
	hop     = unix.IPPROTO_HOPOPTS
	route   = unix.IPPROTO_ROUTING
	part    = unix.IPPROTO_FRAGMENT
	auth    = unix.IPPROTO_AH
	options = unix.IPPROTO_DSTOPTS
	udp     = unix.IPPROTO_UDP
)

func TestParse(t *testing.T) {
	text := udpOf(1, 2, "hello")
	good4 := packetOf(user4, machine4, udp, 0, text)
	good6 := packetOf(user6, machine6, udp, 0, text)
	withOptions := append(slices.Clone(good4[:header4]), 1, 1, 1, 0)
	withOptions = append(withOptions, text...)
	withOptions[0], withOptions[3] = 0x46, byte(len(withOptions))
	clear(withOptions[10:12])
	binary.BigEndian.PutUint16(withOptions[10:], ^fold(sum(0, withOptions[:24])))

	tests := []struct {
		name     string
		packet   []byte
		want     verdict
		protocol byte
		upper    int
		fragment bool
	}{
		{"IPv4", good4, passes, udp, 20, false},
		{"IPv4 without payload", packetOf(user4, machine4, udp, 0, nil), passes, udp, 20, false},
		{"IPv4 with options", withOptions, passes, udp, 24, false},
		{"IPv4 followed by other bytes", append(slices.Clone(good4), 1, 2, 3), passes, udp, 20, false},
		{"IPv4, first fragment", change(good4, at(6, 0x20, 0)), passes, udp, 20, true},
		{"IPv4, last fragment", change(good4, at(6, 0, 1)), passes, udp, 20, true},
		{"IPv4, GRE inside", change(good4, at(9, unix.IPPROTO_GRE)), passes, unix.IPPROTO_GRE, 20, false},
		{"IPv4 in IPv4", change(good4, at(9, protocolIPv4)), nested, 4, 20, false},
		{"IPv6 in IPv4", change(good4, at(9, protocolIPv6)), nested, 41, 20, false},
		{"IPv4 in IPv4, last fragment", change(good4, func(b []byte) { b[7], b[9] = 1, protocolIPv4 }), nested, 4, 20, true},
		{"IPv4 longer than what there is", change(good4, at(3, byte(len(good4)+1))), malformed, 0, 0, false},
		{"IPv4 shorter than its header", change(good4, at(2, 0, 19)), malformed, 0, 0, false},
		{"IPv4 of length zero", change(good4, at(2, 0, 0)), malformed, 0, 0, false},
		{"IPv4 with a short header", change(good4, at(0, 0x44)), malformed, 0, 0, false},
		{"IPv4 with a header longer than it", change(packetOf(user4, machine4, udp, 0, nil), at(0, 0x46)), malformed, 0, 0, false},
		{"IPv4 with a bad checksum", append([]byte{0x45, 1}, good4[2:]...), malformed, 0, 0, false},
		{"version 0", make([]byte, 60), malformed, 0, 0, false},
		{"version 5", change(good4, at(0, 0x55)), malformed, 0, 0, false},
		{"version 15", bytes.Repeat([]byte{0xff}, 60), malformed, 0, 0, false},
		{"nothing", nil, malformed, 0, 0, false},

		{"IPv6", good6, passes, udp, 40, false},
		{"IPv6 without payload", packetOf(user6, machine6, unix.IPPROTO_NONE, 0, nil), passes, unix.IPPROTO_NONE, 40, false},
		{"IPv6 followed by other bytes", append(slices.Clone(good6), 1, 2, 3), passes, udp, 40, false},
		{"IPv6 longer than what there is", change(good6, at(5, byte(len(text)+1))), malformed, 0, 0, false},
		{"IPv6 jumbogram", change(chained(text, hop, udp), at(4, 0, 0)), malformed, 0, 0, false},
		{"IPv4 in IPv6", chained(good4, protocolIPv4), nested, 4, 40, false},
		{"IPv6 in IPv6", chained(good6, protocolIPv6), nested, 41, 40, false},
		{"options", chained(text, hop, options, udp), passes, udp, 56, false},
		{"IPv4 behind options", chained(good4, hop, route, options, protocolIPv4), nested, 4, 64, false},
		{"IPv6 behind an encapsulation limit", chained(good6, options, protocolIPv6), nested, 41, 48, false},
		{"encrypted", chained(text, hop, unix.IPPROTO_ESP), passes, unix.IPPROTO_ESP, 48, false},
		{"no next header", chained(good4, hop, unix.IPPROTO_NONE), passes, unix.IPPROTO_NONE, 48, false},
		{"atomic fragment", chained(text, part, udp), passes, udp, 48, false},
		{"IPv4 in an atomic fragment", chained(good4, part, protocolIPv4), nested, 4, 48, false},
		{"first fragment", change(chained(text, part, udp), at(43, 1)), passes, udp, 48, true},
		{"IPv4 in a first fragment", change(chained(good4, part, protocolIPv4), at(43, 1)), nested, 4, 48, true},
		{"later fragment", change(chained(text, part, udp), at(42, 1, 0)), passes, udp, 48, true},
		{"IPv4 in a later fragment", change(chained(good4, part, protocolIPv4), at(42, 1, 0)), nested, 4, 48, true},
		{"later fragment, whose bytes are no options", change(chained(repeat(0xff, 20, 0), part, options), at(42, 1, 0)), passes, options, 48, true},
		{"first fragment without all headers", change(chained(nil, part, options, udp), at(43, 1)), passes, udp, 56, true},
		{"first fragment cut within its options", change(chained(nil, part, options), at(43, 1)), malformed, 0, 0, false},
		{"as many headers as there may be", chained(text, repeat(options, maxExtensions-1, udp)...), passes, udp, 40 + 8*(maxExtensions-1), false},
		{"too many headers", chained(text, repeat(options, maxExtensions, udp)...), malformed, 0, 0, false},
		{"very many headers", chained(text, repeat(hop, 4000, protocolIPv4)...), malformed, 0, 0, false},
		{"options longer than the packet", change(chained(text, options, udp), at(41, 3)), malformed, 0, 0, false},
		{"options, and no byte of them", chained(nil, options), malformed, 0, 0, false},
	}
	for _, test := range tests {
		p, v := parse(test.packet)
		if v != test.want {
			t.Errorf("%s: verdict %d, want %d", test.name, v, test.want)
		}
		if v == malformed || v != test.want {
			continue
		}
		if p.protocol != test.protocol || p.upper != test.upper || p.fragment != test.fragment {
			t.Errorf("%s: protocol %d at %d, fragment %v; want %d at %d, %v",
				test.name, p.protocol, p.upper, p.fragment, test.protocol, test.upper, test.fragment)
		}
		src, dst := user4, machine4
		if test.packet[0]>>4 == 6 {
			src, dst = user6, machine6
		}
		if p.src != src || p.dst != dst {
			t.Errorf("%s: from %v to %v", test.name, p.src, p.dst)
		}
	}
}

func TestAuthenticationHeaderCountsOtherwise(t *testing.T) {
	inner := packetOf(user4, machine4, udp, 0, nil)
	header := make([]byte, 24) // of RFC 4302, with 12 bytes of value
	header[0], header[1] = protocolIPv4, 24/4-2
	b := packetOf(user6, machine6, auth, 0, append(header, inner...))
	if p, v := parse(b); v != nested || p.upper != header6+24 {
		t.Errorf("verdict %d, headers end at %d", v, p.upper)
	}
}

func TestParseCutsToLength(t *testing.T) {
	for _, b := range [][]byte{
		packetOf(user4, machine4, udp, 0, udpOf(1, 2, "hello")),
		packetOf(user6, machine6, udp, 0, udpOf(1, 2, "hello")),
	} {
		p, v := parse(append(slices.Clone(b), make([]byte, 100)...))
		if v != passes || !bytes.Equal(p.data, b) {
			t.Errorf("verdict %d, data % x, want % x", v, p.data, b)
		}
	}
}

func TestEveryPrefixIsMalformed(t *testing.T) {
	for _, b := range [][]byte{
		packetOf(user4, machine4, udp, 0, udpOf(1, 2, "hello")),
		packetOf(user6, machine6, udp, 0, udpOf(1, 2, "hello")),
		chained(udpOf(1, 2, "hello"), hop, route, part, options, udp),
	} {
		for n := range b {
			if p, v := parse(b[:n]); v != malformed || p.data != nil {
				t.Errorf("the first %d of %d bytes: verdict %d", n, len(b), v)
			}
			if n < header4 || n < header6 && b[0]>>4 == 6 {
				continue
			}
			// If the header tells the length truly, what follows it may be cut.
			short := change(b[:n:n], func(b []byte) {
				if b[0]>>4 == 4 {
					binary.BigEndian.PutUint16(b[2:], uint16(n))
				} else {
					binary.BigEndian.PutUint16(b[4:], uint16(n-header6))
				}
			})
			p, v := parse(short)
			if v != passes && v != malformed || v == passes && (len(p.data) != n || p.upper > n) {
				t.Errorf("the first %d of %d bytes: headers of %d, data of %d", n, len(b), p.upper, len(p.data))
			}
		}
	}
}

func TestUnfinishedChecksums(t *testing.T) {
	for _, c := range []struct{ src, dst netip.Addr }{{user4, machine4}, {user6, machine6}} {
		for _, layer := range []struct {
			protocol byte
			field    int
			payload  []byte
		}{
			{unix.IPPROTO_TCP, 16, append(make([]byte, 20), "some text of odd length"...)},
			{unix.IPPROTO_UDP, 6, udpOf(7, 9, "hello")},
		} {
			b := packetOf(c.src, c.dst, layer.protocol, 0, layer.payload)
			p, v := parse(b)
			if v != passes {
				t.Fatal(v)
			}
			upper := b[p.upper:]
			addresses := append(c.src.AsSlice(), c.dst.AsSlice()...)
			pseudo := fold(sum(uint64(layer.protocol)+uint64(len(upper)), addresses))
			check := upper[layer.field:]

			binary.BigEndian.PutUint16(check, pseudo)
			if field, unfinished := p.unfinished(); !unfinished || field != p.upper+layer.field {
				t.Errorf("protocol %d of %v: a pseudo-header's sum was not seen at %d", layer.protocol, c.src, field)
			}
			padded := append(bytes.Clone(upper), 0)
			finished := ^fold(sum(0, padded[:len(padded)&^1]))
			binary.BigEndian.PutUint16(check, finished)
			if _, unfinished := p.unfinished(); unfinished {
				t.Errorf("protocol %d of %v: a checksum was taken for unfinished", layer.protocol, c.src)
			}
			binary.BigEndian.PutUint16(check, pseudo)
			p.fragment = true
			if _, unfinished := p.unfinished(); unfinished {
				t.Errorf("protocol %d of %v: a fragment has no checksum of its own", layer.protocol, c.src)
			}
		}
	}
}

func FuzzInner(f *testing.F) {
	text := udpOf(probe, probe, "hello")
	good4, good6 := packetOf(user4, machine4, udp, ect0, text), packetOf(user6, machine6, udp, ect1, text)
	for _, b := range [][]byte{
		good4, good6,
		packetOf(user4, machine4, unix.IPPROTO_TCP, 0, make([]byte, 40)),
		packetOf(user6, machine6, unix.IPPROTO_TCP, 0, make([]byte, 40)),
		packetOf(user4, machine4, protocolIPv6, 0, good6),
		chained(good4, hop, route, part, auth, options, protocolIPv4),
		chained(text, repeat(options, maxExtensions, udp)...),
		change(good4, at(0, 0x4f)),
	} {
		f.Add(b, byte(ce))
	}
	gate := NewGate()
	gate.Set([]netip.Addr{machine4, machine6}, nil)
	open := filter{gate: gate, local: user6, remote: machine6, probePort: probe}
	f.Fuzz(func(t *testing.T, b []byte, outer byte) {
		before := bytes.Clone(b)
		open.outgoing(b)
		p, v := open.incoming(b)
		if !bytes.Equal(b, before) {
			t.Fatal("a check has changed the packet")
		}
		if v != passes {
			return
		}
		if len(p.data) > len(b) || p.upper > len(p.data) || p.upper < header4 {
			t.Fatalf("headers of %d bytes, data of %d, in %d", p.upper, len(p.data), len(b))
		}
		if p.protocol == protocolIPv4 || p.protocol == protocolIPv6 {
			t.Fatal("a nested packet passes")
		}
		if field, unfinished := p.unfinished(); unfinished && (field < p.upper || field+2 > len(p.data)) {
			t.Fatalf("a checksum at %d of %d bytes", field, len(p.data))
		}
		if p.mark(outer) {
			if again, v := parse(p.data); v != passes || again.src != p.src || again.dst != p.dst {
				t.Fatalf("a packet that was marked has verdict %d", v)
			}
		}
	})
}
