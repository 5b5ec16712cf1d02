package encap

import (
	"encoding/binary"
	"net/netip"
)

// packetOf makes an IP packet of the version of its addresses.
func packetOf(src, dst netip.Addr, protocol, tos byte, payload []byte) []byte {
	if src.Is4() {
		b := make([]byte, header4, header4+len(payload))
		b[0], b[1] = 0x45, tos
		binary.BigEndian.PutUint16(b[2:], uint16(header4+len(payload)))
		b[6] = 0x40 // don't fragment
		b[8], b[9] = 64, protocol
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		refreshChecksum(b)
		return append(b, payload...)
	}
	b := make([]byte, header6, header6+len(payload))
	b[0], b[1] = 0x60|tos>>4, tos<<4
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = protocol, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(b, payload...)
}

// refreshChecksum corrects the checksum of an IPv4 header without options.
func refreshChecksum(b []byte) {
	clear(b[10:12])
	binary.BigEndian.PutUint16(b[10:], ^fold(sum(0, b[:header4])))
}

// udpOf makes a datagram without a checksum.
func udpOf(from, to uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(text)))
	return append(append(b, 0, 0), text...)
}
