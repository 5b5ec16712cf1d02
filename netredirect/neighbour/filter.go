package neighbour

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/net/bpf"
)

// Offsets in a frame.
const (
	offsetFrom        = 6
	offsetEtherType   = 12
	offsetARPSender   = ethernetSize + 14
	offsetIPv4Source  = ethernetSize + 12
	offsetNextHeader  = ethernetSize + 6
	offsetIPv6Source  = ethernetSize + 8
	offsetICMPv6Type  = ethernetSize + ipv6Size
	offsetDiscoTarget = ethernetSize + ipv6Size + 8
)

const packetOutgoing = 4 // PACKET_OUTGOING of linux/if_packet.h

var (
	drop   = bpf.RetConstant{Val: 0}
	accept = bpf.RetConstant{Val: frameLimit}
)

// unless drops the frame if the value loaded is not v.
func unless(v uint32) []bpf.Instruction {
	return []bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: 1}, drop}
}

// when runs the block, which must end with a verdict or jump, if the value
// loaded is v.
func when(v uint32, block ...bpf.Instruction) []bpf.Instruction {
	return append([]bpf.Instruction{
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: 1},
		bpf.Jump{Skip: uint32(len(block))},
	}, block...)
}

// arriving drops what this host sends on the device and what has a VLAN tag,
// which the kernel has taken out of the frame.
func arriving() []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: packetOutgoing, SkipTrue: 1}, drop,
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, drop,
	}
}

// sentBy drops what other stations than mac sent.
func sentBy(mac hardware) []bpf.Instruction {
	code := []bpf.Instruction{bpf.LoadAbsolute{Off: offsetFrom, Size: 4}}
	code = append(code, unless(binary.BigEndian.Uint32(mac[:4]))...)
	code = append(code, bpf.LoadAbsolute{Off: offsetFrom + 4, Size: 2})
	return append(code, unless(uint32(binary.BigEndian.Uint16(mac[4:])))...)
}

// questions accepts ARP and neighbour solicitations.
func questions() []bpf.Instruction {
	code := []bpf.Instruction{bpf.LoadAbsolute{Off: offsetEtherType, Size: 2}}
	code = append(code, when(etherTypeARP, accept)...)
	code = append(code, unless(etherTypeIPv6)...)
	code = append(code, bpf.LoadAbsolute{Off: offsetNextHeader, Size: 1})
	code = append(code, unless(protocolICMPv6)...)
	code = append(code, bpf.LoadAbsolute{Off: offsetICMPv6Type, Size: 1})
	code = append(code, unless(solicitation)...)
	return append(code, accept)
}

// strangers accepts ARP and IP whose sender is not known, an advertisement by its
// target. So the kernel leaves out a VM's traffic as soon as its address is found.
func strangers(known []netip.Addr) []bpf.Instruction {
	// The register X has the offset of the sender's address.
	v4 := []bpf.Instruction{bpf.LoadIndirect{Size: 4}}
	v6 := []bpf.Instruction{}
	for i := range 4 {
		v6 = append(v6, bpf.LoadIndirect{Off: uint32(4 * i), Size: 4}, bpf.StoreScratch{Src: bpf.RegA, N: i})
	}
	for _, a := range known {
		if a.Is4() {
			b := a.As4()
			v4 = append(v4, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(b[:]), SkipTrue: 1}, drop)
			continue
		}
		b := a.As16()
		for i := range 4 {
			// Past the drop, if this word differs.
			v6 = append(v6, bpf.LoadScratch{Dst: bpf.RegA, N: i},
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(b[4*i:]), SkipTrue: uint8(7 - 2*i)})
		}
		v6 = append(v6, drop)
	}
	v4, v6 = append(v4, accept), append(v6, accept)

	arp := append([]bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegX, Val: offsetARPSender}}, v4...)
	ip := append([]bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegX, Val: offsetIPv4Source}}, v4...)
	code := []bpf.Instruction{bpf.LoadAbsolute{Off: offsetEtherType, Size: 2}}
	code = append(code, when(etherTypeARP, arp...)...)
	code = append(code, when(etherTypeIPv4, ip...)...)
	code = append(code, unless(etherTypeIPv6)...)
	code = append(code,
		bpf.LoadConstant{Dst: bpf.RegX, Val: offsetIPv6Source},
		bpf.LoadAbsolute{Off: offsetNextHeader, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protocolICMPv6, SkipTrue: 3},
		bpf.LoadAbsolute{Off: offsetICMPv6Type, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: advertisement, SkipTrue: 1},
		bpf.LoadConstant{Dst: bpf.RegX, Val: offsetDiscoTarget})
	return append(code, v6...)
}
