package encap

import (
	"encoding/binary"
	"net/netip"
)

// outer4 is what counts of an outer IPv4 header. The kernel has checked the packet, and put its fragments together.
type outer4 struct {
	src             netip.Addr
	tos             byte
	header, payload int // bytes
}

// parseOuter4 reads a packet as a raw IPv4 socket gives it.
func parseOuter4(b []byte) (o outer4, ok bool) {
	if len(b) < header4 || b[0]>>4 != 4 {
		return outer4{}, false
	}
	header := int(b[0]&0xf) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if header < header4 || total < header || total > len(b) {
		return outer4{}, false
	}
	return outer4{src: netip.AddrFrom4([4]byte(b[12:])), tos: b[1], header: header, payload: total - header}, true
}

// Codepoints of ECN, RFC 3168, in the low bits of TOS and traffic class.
const (
	notECT  = 0
	ect1    = 1
	ect0    = 2
	ce      = 3
	ecnMask = 3
)

// mark gives an inner packet the ECN codepoint that its own and the outer header's make (RFC 6040, figure 4). It is
// false if the packet has to be dropped: a router met congestion, and the transport inside would not learn of it.
func (p packet) mark(outer byte) bool {
	tos := p.tos()
	inner := tos & ecnMask
	switch outer &= ecnMask; {
	case outer == ce && inner == notECT:
		return false
	case outer == ce, outer == ect1 && inner == ect0:
		p.setTOS(tos&^ecnMask | outer)
	}
	return true
}

func (p packet) setTOS(tos byte) {
	if !p.is4() {
		p.data[0] = p.data[0]&0xf0 | tos>>4
		p.data[1] = p.data[1]&0x0f | tos<<4
		return
	}
	p.data[1] = tos
	clear(p.data[10:12])
	header := p.data[:int(p.data[0]&0xf)*4]
	binary.BigEndian.PutUint16(p.data[10:], ^fold(sum(0, header)))
}
