package encap

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	header4 = 20 // bytes of an IPv4 header without options
	header6 = 40

	// A chain of more IPv6 extension headers is taken for an attack: RFC 8200 knows six, of which one may come twice.
	maxExtensions = 8

	protocolIPv4 = unix.IPPROTO_IPIP // IPv4 inside, RFC 2003
	protocolIPv6 = unix.IPPROTO_IPV6 // IPv6 inside, RFC 4213 and RFC 2473
)

// packet is an inner packet whose headers have been found to lie within it.
type packet struct {
	data     []byte // cut to the length that its header states
	src, dst netip.Addr
	protocol byte // of what follows the IP header and its extensions
	upper    int  // where that begins
	fragment bool // it is not whole
}

func (p packet) is4() bool { return p.data[0]>>4 == 4 }

// tos is the IPv4 TOS or the IPv6 traffic class: six bits of DSCP, two of ECN.
func (p packet) tos() byte {
	if p.is4() {
		return p.data[1]
	}
	return p.data[0]<<4 | p.data[1]>>4
}

// parse finds its way through an inner packet's headers. The verdict is passes, malformed or nested.
func parse(b []byte) (packet, verdict) {
	if len(b) == 0 {
		return packet{}, malformed
	}
	var p packet
	var v verdict
	switch b[0] >> 4 {
	case 4:
		p, v = parse4(b)
	case 6:
		p, v = parse6(b)
	default:
		return packet{}, malformed
	}
	if v == passes && (p.protocol == protocolIPv4 || p.protocol == protocolIPv6) {
		v = nested
	}
	return p, v
}

// parse4 reads an IPv4 header, RFC 791.
func parse4(b []byte) (packet, verdict) {
	if len(b) < header4 {
		return packet{}, malformed
	}
	header := int(b[0]&0xf) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if header < header4 || total < header || total > len(b) || fold(sum(0, b[:header])) != 0xffff {
		return packet{}, malformed
	}
	const offsetAndMore = 0x3fff
	return packet{
		data:     b[:total],
		src:      netip.AddrFrom4([4]byte(b[12:])),
		dst:      netip.AddrFrom4([4]byte(b[16:])),
		protocol: b[9],
		upper:    header,
		fragment: binary.BigEndian.Uint16(b[6:])&offsetAndMore != 0,
	}, passes
}

// parse6 reads an IPv6 header and the extension headers after it, RFC 8200.
func parse6(b []byte) (packet, verdict) {
	if len(b) < header6 {
		return packet{}, malformed
	}
	total := header6 + int(binary.BigEndian.Uint16(b[4:]))
	if total > len(b) {
		return packet{}, malformed
	}
	p := packet{
		data:     b[:total],
		src:      netip.AddrFrom16([16]byte(b[8:])),
		dst:      netip.AddrFrom16([16]byte(b[24:])),
		protocol: b[6],
		upper:    header6,
	}
	for range maxExtensions {
		rest := p.data[p.upper:]
		if !isExtension(p.protocol) {
			return p, passes
		}
		if len(rest) < 8 {
			return packet{}, malformed
		}
		size := (int(rest[1]) + 1) * 8
		part := uint16(0) // of a fragment: its offset, and whether there are more
		switch p.protocol {
		case unix.IPPROTO_AH:
			size = (int(rest[1]) + 2) * 4 // RFC 4302
		case unix.IPPROTO_FRAGMENT:
			size = 8
			part = binary.BigEndian.Uint16(rest[2:]) &^ 6
		}
		if size > len(rest) {
			return packet{}, malformed
		}
		p.protocol, p.upper = rest[0], p.upper+size
		p.fragment = p.fragment || part != 0
		if part>>3 != 0 {
			// What follows is no header. The first fragment has all of them (RFC 7112), and is looked at itself.
			return p, passes
		}
	}
	return packet{}, malformed
}

// isExtension names the headers that the kernel looks through, ipv6_ext_hdr in net/ipv6/exthdrs_core.c.
func isExtension(protocol byte) bool {
	switch protocol {
	case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT, unix.IPPROTO_AH, unix.IPPROTO_DSTOPTS:
		return true
	}
	return false
}

// unfinished tells that the kernel left the checksum of a TCP or UDP packet to the hardware: there is the sum of the
// pseudo-header in its place. So look packets that were merged on receipt (GRO), and packets of a virtual machine or a
// namespace on the same host. field is where the checksum is. To finish a checksum that was right already does not change it.
func (p packet) unfinished() (field int, yes bool) {
	header := 0
	switch p.protocol {
	case unix.IPPROTO_TCP:
		header, field = 20, p.upper+16
	case unix.IPPROTO_UDP:
		header, field = 8, p.upper+6
	}
	if header == 0 || p.fragment || len(p.data) < p.upper+header {
		return 0, false
	}
	var addresses []byte
	if p.is4() {
		addresses = p.data[12:header4]
	} else {
		addresses = p.data[8:header6]
	}
	pseudo := sum(uint64(p.protocol)+uint64(len(p.data)-p.upper), addresses)
	return field, binary.BigEndian.Uint16(p.data[field:]) == fold(pseudo)
}

// sum adds 16-bit words to a checksum, RFC 1071. The number of bytes is even.
func sum(s uint64, b []byte) uint64 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint64(binary.BigEndian.Uint16(b))
	}
	return s
}

func fold(s uint64) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
