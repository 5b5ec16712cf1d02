package neighbour

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

const (
	ethernetSize  = 14
	arpSize       = 28
	ipv6Size      = 40
	discoverySize = 24 // of ICMPv6, without options

	etherTypeIPv4 = 0x0800
	etherTypeARP  = 0x0806
	etherTypeIPv6 = 0x86dd

	protocolICMPv6 = 58
	// hopLimit proves that no router has forwarded a message.
	hopLimit = 255
)

// errFrame is returned when a frame is not one that doc.go describes.
var errFrame = errors.New("not an ARP or neighbour discovery message")

// A hardware is an Ethernet address.
type hardware [6]byte

var (
	broadcast = hardware{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	allNodes  = netip.IPv6LinkLocalAllNodes()
)

func hardwareOf(mac net.HardwareAddr) (hardware, error) {
	if len(mac) != 6 || mac[0]&1 != 0 || hardware(mac) == (hardware{}) {
		return hardware{}, fmt.Errorf("%q is not the hardware address of one Ethernet device", mac)
	}
	return hardware(mac), nil
}

// groupHardware is where Ethernet carries an IPv6 multicast (RFC 2464, 7).
func groupHardware(group netip.Addr) hardware {
	a := group.As16()
	return hardware{0x33, 0x33, a[12], a[13], a[14], a[15]}
}

// hostAddress brings an address of one host on a network to its plain form.
func hostAddress(a netip.Addr) (netip.Addr, error) {
	if a = a.Unmap().WithZone(""); !isHost(a) {
		return netip.Addr{}, fmt.Errorf("%s is not the address of one host", a)
	}
	return a, nil
}

// isHost tells whether an address can be that of one host on a network.
func isHost(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && !a.Is4In6() &&
		a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

type ethernet struct {
	to, from  hardware
	etherType uint16
}

// parseEthernet returns the header and what follows it.
func parseEthernet(b []byte) (ethernet, []byte, error) {
	if len(b) < ethernetSize {
		return ethernet{}, nil, errFrame
	}
	return ethernet{hardware(b[0:6]), hardware(b[6:12]), binary.BigEndian.Uint16(b[12:])}, b[ethernetSize:], nil
}

func (e ethernet) append(b []byte) []byte {
	b = append(append(b, e.to[:]...), e.from[:]...)
	return binary.BigEndian.AppendUint16(b, e.etherType)
}

const (
	arpRequest = 1
	arpReply   = 2
)

type arp struct {
	operation      uint16
	senderHardware hardware
	sender         netip.Addr
	targetHardware hardware
	target         netip.Addr
}

// arpHead is what every ARP message for IPv4 over Ethernet starts with.
const arpHead = "\x00\x01\x08\x00\x06\x04"

func parseARP(b []byte) (arp, error) {
	if len(b) < arpSize || string(b[:6]) != arpHead {
		return arp{}, errFrame
	}
	m := arp{
		operation:      binary.BigEndian.Uint16(b[6:]),
		senderHardware: hardware(b[8:14]),
		sender:         netip.AddrFrom4([4]byte(b[14:18])),
		targetHardware: hardware(b[18:24]),
		target:         netip.AddrFrom4([4]byte(b[24:28])),
	}
	if m.operation != arpRequest && m.operation != arpReply {
		return arp{}, errFrame
	}
	return m, nil
}

func (m arp) append(b []byte) []byte {
	b = append(b, arpHead...)
	b = binary.BigEndian.AppendUint16(b, m.operation)
	b = append(append(b, m.senderHardware[:]...), m.sender.AsSlice()...)
	return append(append(b, m.targetHardware[:]...), m.target.AsSlice()...)
}

const (
	solicitation  = 135
	advertisement = 136

	sourceLinkLayer = 1 // option of a solicitation
	targetLinkLayer = 2 // option of an advertisement

	flagRouter    = 0x80
	flagSolicited = 0x40
	flagOverride  = 0x20
)

// A discovery is a neighbour solicitation or advertisement with its IPv6 header.
type discovery struct {
	source, destination netip.Addr
	kind                byte
	flags               byte // of an advertisement
	target              netip.Addr
	linkLayer           hardware // of its option; zero if there is none
}

// parseDiscovery takes an IPv6 packet, which padding may follow. It holds the
// packet to RFC 4861, 7.1.
func parseDiscovery(b []byte) (discovery, error) {
	if len(b) < ipv6Size || b[0]>>4 != 6 || b[6] != protocolICMPv6 || b[7] != hopLimit {
		return discovery{}, errFrame
	}
	size := int(binary.BigEndian.Uint16(b[4:]))
	if size < discoverySize || size > len(b)-ipv6Size {
		return discovery{}, errFrame
	}
	source, destination := [16]byte(b[8:24]), [16]byte(b[24:40])
	message := b[ipv6Size : ipv6Size+size]
	if message[1] != 0 || checksum(source, destination, message) != 0 {
		return discovery{}, errFrame
	}
	m := discovery{
		source:      netip.AddrFrom16(source),
		destination: netip.AddrFrom16(destination),
		kind:        message[0],
		target:      netip.AddrFrom16([16]byte(message[8:24])),
	}
	option := byte(sourceLinkLayer)
	switch m.kind {
	case solicitation:
	case advertisement:
		option = targetLinkLayer
		m.flags = message[4] & (flagRouter | flagSolicited | flagOverride)
		if m.destination.IsMulticast() && m.flags&flagSolicited != 0 {
			return discovery{}, errFrame
		}
	default:
		return discovery{}, errFrame
	}
	if m.target.IsMulticast() || m.source.IsMulticast() {
		return discovery{}, errFrame
	}
	for rest := message[discoverySize:]; len(rest) > 0; {
		if len(rest) < 8 || rest[1] == 0 || int(rest[1])*8 > len(rest) {
			return discovery{}, errFrame
		}
		if rest[0] == option {
			if rest[1] != 1 || m.source.IsUnspecified() || m.linkLayer != (hardware{}) {
				return discovery{}, errFrame
			}
			m.linkLayer = hardware(rest[2:8])
		}
		rest = rest[int(rest[1])*8:]
	}
	return m, nil
}

func (m discovery) append(b []byte) []byte {
	message := make([]byte, 8, discoverySize+8)
	message[0], message[4] = m.kind, m.flags
	message = append(message, m.target.AsSlice()...)
	if m.linkLayer != (hardware{}) {
		option := byte(sourceLinkLayer)
		if m.kind == advertisement {
			option = targetLinkLayer
		}
		message = append(append(message, option, 1), m.linkLayer[:]...)
	}
	binary.BigEndian.PutUint16(message[2:], checksum(m.source.As16(), m.destination.As16(), message))

	b = append(b, 6<<4, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	b = append(b, protocolICMPv6, hopLimit)
	b = append(append(b, m.source.AsSlice()...), m.destination.AsSlice()...)
	return append(b, message...)
}

// checksum is that of ICMPv6, and zero for a message that has its own inside.
func checksum(source, destination [16]byte, message []byte) uint16 {
	sum := uint32(len(message)) + protocolICMPv6
	for _, part := range [][]byte{source[:], destination[:], message} {
		for ; len(part) > 1; part = part[2:] {
			sum += uint32(binary.BigEndian.Uint16(part))
		}
		if len(part) == 1 {
			sum += uint32(part[0]) << 8
		}
	}
	// Even 64 KiB add up to less than 2^32.
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
