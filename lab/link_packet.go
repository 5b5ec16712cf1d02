package lab

import (
	"encoding/binary"
	"net/netip"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// blockable are the protocols that a firewall on the link can drop.
var blockable = map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}

// headers are what the link reads of a packet. Guests send packets of any
// shape: what is not there stays zero.
type headers struct {
	protocol byte // of what IP carries, behind IPv6's extensions
	from, to netip.AddrPort
	ports    int // where the ports of TCP or UDP stand; 0: there are none, as in a later fragment
}

// readHeaders reads IPv4 (RFC 791) and IPv6 (RFC 8200).
func readHeaders(b []byte) (h headers) {
	var from, to netip.Addr
	next := 0 // where what IP carries begins
	first := true
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		from, to = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		h.protocol = b[9]
		next = int(b[0]&15) * 4
		first = binary.BigEndian.Uint16(b[6:])&0x1fff == 0
		if next < 20 {
			return headers{}
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		from, to = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		h.protocol, next, first = skipExtensions(b)
	default:
		return headers{}
	}
	h.from, h.to = netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, 0)
	if (h.protocol == unix.IPPROTO_TCP || h.protocol == unix.IPPROTO_UDP) && first && len(b) >= next+4 {
		h.ports = next
		h.from = netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[next:]))
		h.to = netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[next+2:]))
	}
	return h
}

// skipExtensions returns the protocol behind the extensions of an IPv6 packet,
// where it begins, and whether this is the first fragment.
func skipExtensions(b []byte) (protocol byte, next int, first bool) {
	protocol, next, first = b[6], 40, true
	for len(b) >= next+8 {
		switch protocol {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			protocol, next = b[next], next+8+8*int(b[next+1])
		case unix.IPPROTO_FRAGMENT:
			first = first && binary.BigEndian.Uint16(b[next+2:])&^7 == 0
			protocol, next = b[next], next+8
		default:
			return protocol, next, first
		}
	}
	return protocol, next, first
}

// setPort writes a port of TCP or UDP, which stands at place, and corrects the
// checksum (RFC 1624, equation 3).
func setPort(b []byte, h headers, place int, port uint16) {
	sum := h.ports + 6
	if h.protocol == unix.IPPROTO_TCP {
		sum = h.ports + 16
	}
	old := binary.BigEndian.Uint16(b[place:])
	binary.BigEndian.PutUint16(b[place:], port)
	if len(b) < sum+2 {
		return
	}
	before := binary.BigEndian.Uint16(b[sum:])
	if before == 0 && h.protocol == unix.IPPROTO_UDP { // RFC 768: none
		return
	}
	total := uint32(^before) + uint32(^old) + uint32(port)
	total = total>>16 + total&0xffff
	total += total >> 16
	after := ^uint16(total)
	if after == 0 && h.protocol == unix.IPPROTO_UDP {
		after = 0xffff
	}
	binary.BigEndian.PutUint16(b[sum:], after)
}

// tooBig is what a router answers to a packet that is larger than the MTU of the
// way on: RFC 792 with RFC 1191, also where IPv4 would let it cut the packet into
// fragments, or RFC 4443, section 3.2. The router has the address of the
// packet's destination. There is no answer to what is not IP.
func tooBig(b []byte, mtu int) []byte {
	h := readHeaders(b)
	buf := gopacket.NewSerializeBuffer()
	options := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	var err error
	switch {
	case h.to.Addr().Is4():
		err = gopacket.SerializeLayers(buf, options,
			&layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolICMPv4, SrcIP: h.to.Addr().AsSlice(), DstIP: h.from.Addr().AsSlice()},
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodeFragmentationNeeded), Seq: uint16(mtu)},
			gopacket.Payload(b[:min(len(b), minLinkMTU-28)]))
	case h.to.Addr().Is6():
		ip := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolICMPv6, SrcIP: h.to.Addr().AsSlice(), DstIP: h.from.Addr().AsSlice()}
		icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypePacketTooBig, 0)}
		if err = icmp.SetNetworkLayerForChecksum(ip); err == nil {
			body := binary.BigEndian.AppendUint32(nil, uint32(mtu))
			err = gopacket.SerializeLayers(buf, options, ip, icmp, gopacket.Payload(append(body, b[:min(len(b), 1280-48)]...)))
		}
	default:
		return nil
	}
	if err != nil { // nothing of the kind is asked of gopacket
		return nil
	}
	return buf.Bytes()
}
