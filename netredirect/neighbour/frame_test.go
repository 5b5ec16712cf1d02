package neighbour

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var (
	vmHardware     = hardware{0x52, 0x54, 0, 1, 2, 3}
	bridgeHardware = hardware{2, 0, 10, 0, 0, 1}
	otherHardware  = hardware{0x52, 0x54, 0, 9, 9, 9}

	vm4      = netip.MustParseAddr("10.0.0.5")
	vm6      = netip.MustParseAddr("2001:db8::5")
	vmLocal  = netip.MustParseAddr("fe80::5054:ff:fe01:203")
	gateway4 = netip.MustParseAddr("10.0.0.1")
	gateway6 = netip.MustParseAddr("fe80::1")
	host6    = netip.MustParseAddr("2001:db8::77")
)

// askARP is a request of the VM, made by another implementation than ours.
func askARP(t testing.TB, change func(*layers.Ethernet, *layers.ARP)) []byte {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: vmHardware[:], DstMAC: broadcast[:], EthernetType: layers.EthernetTypeARP}
	m := &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
		Operation: layers.ARPRequest, SourceHwAddress: vmHardware[:], SourceProtAddress: vm4.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: gateway4.AsSlice(),
	}
	change(eth, m)
	return serialized(t, eth, m)
}

type question struct {
	ethernet layers.Ethernet
	ip       layers.IPv6
	header   layers.ICMPv6
	body     layers.ICMPv6NeighborSolicitation
}

// askND is a solicitation of the VM, made by another implementation than ours.
func askND(t testing.TB, change func(*question)) []byte {
	t.Helper()
	group := netip.MustParseAddr("ff02::1:ff00:1")
	to := groupHardware(group)
	q := &question{
		ethernet: layers.Ethernet{SrcMAC: vmHardware[:], DstMAC: to[:], EthernetType: layers.EthernetTypeIPv6},
		ip:       layers.IPv6{Version: 6, NextHeader: layers.IPProtocolICMPv6, HopLimit: 255, SrcIP: vmLocal.AsSlice(), DstIP: group.AsSlice()},
		header:   layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborSolicitation, 0)},
		body: layers.ICMPv6NeighborSolicitation{
			TargetAddress: gateway6.AsSlice(),
			Options:       layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: vmHardware[:]}},
		},
	}
	change(q)
	if err := q.header.SetNetworkLayerForChecksum(&q.ip); err != nil {
		t.Fatal(err)
	}
	return serialized(t, &q.ethernet, &q.ip, &q.header, &q.body)
}

func serialized(t testing.TB, parts ...gopacket.SerializableLayer) []byte {
	t.Helper()
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, parts...); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func sameARP(*layers.Ethernet, *layers.ARP) {}
func sameND(*question)                      {}

func TestParseReadsWhatAnotherImplementationWrote(t *testing.T) {
	header, payload, err := parseEthernet(askARP(t, sameARP))
	if err != nil || header != (ethernet{broadcast, vmHardware, etherTypeARP}) {
		t.Fatal(header, err)
	}
	a, err := parseARP(payload)
	if want := (arp{arpRequest, vmHardware, vm4, hardware{}, gateway4}); err != nil || a != want {
		t.Errorf("got %v, %v, want %v", a, err, want)
	}
	_, payload, err = parseEthernet(askND(t, sameND))
	if err != nil {
		t.Fatal(err)
	}
	d, err := parseDiscovery(payload)
	want := discovery{vmLocal, netip.MustParseAddr("ff02::1:ff00:1"), solicitation, 0, gateway6, vmHardware}
	if err != nil || d != want {
		t.Errorf("got %v, %v, want %v", d, err, want)
	}
}

func TestAnnouncementsAreReadByAnotherImplementation(t *testing.T) {
	frames := append(announcements(bridgeHardware, otherHardware, vm4), announcements(bridgeHardware, otherHardware, vm6)...)
	if len(frames) != 3 {
		t.Fatalf("%d frames, want an ARP request, an ARP reply and an advertisement", len(frames))
	}
	for i, operation := range []uint16{layers.ARPRequest, layers.ARPReply} {
		p := gopacket.NewPacket(frames[i], layers.LayerTypeEthernet, gopacket.Default)
		eth, _ := p.LinkLayer().(*layers.Ethernet)
		m, _ := p.Layer(layers.LayerTypeARP).(*layers.ARP)
		if eth == nil || m == nil || p.ErrorLayer() != nil {
			t.Fatalf("not ARP: %v", p)
		}
		target := make([]byte, 6)
		if operation == layers.ARPReply {
			target = otherHardware[:]
		}
		if !bytes.Equal(eth.SrcMAC, bridgeHardware[:]) || !bytes.Equal(eth.DstMAC, broadcast[:]) || m.Operation != operation ||
			!bytes.Equal(m.SourceHwAddress, otherHardware[:]) || !bytes.Equal(m.SourceProtAddress, vm4.AsSlice()) ||
			!bytes.Equal(m.DstHwAddress, target) || !bytes.Equal(m.DstProtAddress, vm4.AsSlice()) {
			t.Errorf("wrong announcement: %v", p)
		}
	}
	p := gopacket.NewPacket(frames[2], layers.LayerTypeEthernet, gopacket.Default)
	if p.ErrorLayer() != nil {
		t.Fatalf("not an advertisement: %v", p)
	}
	if err := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6).SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
		t.Fatal(err)
	}
	if err, mismatches := p.VerifyChecksums(); err != nil || len(mismatches) > 0 {
		t.Errorf("check sum: %v, %v", err, mismatches)
	}
	eth, ip := p.LinkLayer().(*layers.Ethernet), p.NetworkLayer().(*layers.IPv6)
	m, _ := p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
	if m == nil || eth.DstMAC.String() != "33:33:00:00:00:01" || ip.HopLimit != 255 ||
		!ip.DstIP.Equal(net.IPv6linklocalallnodes) || !ip.SrcIP.Equal(vm6.AsSlice()) {
		t.Fatalf("wrong advertisement: %v", p)
	}
	if !m.TargetAddress.Equal(vm6.AsSlice()) || m.Solicited() || !m.Override() || !m.Router() || len(m.Options) != 1 ||
		m.Options[0].Type != layers.ICMPv6OptTargetAddress || !bytes.Equal(m.Options[0].Data, otherHardware[:]) {
		t.Errorf("wrong advertisement: %v", p)
	}
}

func TestRoundTrip(t *testing.T) {
	for _, want := range []arp{
		{arpRequest, vmHardware, vm4, hardware{}, gateway4},
		{arpReply, bridgeHardware, gateway4, vmHardware, vm4},
	} {
		if got, err := parseARP(want.append(nil)); err != nil || got != want {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
	for _, want := range []discovery{
		{vm6, host6, solicitation, 0, host6, hardware{}},
		{vm6, host6, solicitation, 0, host6, vmHardware},
		{host6, vm6, advertisement, flagRouter | flagSolicited | flagOverride, host6, bridgeHardware},
		{host6, allNodes, advertisement, flagOverride, host6, hardware{}},
	} {
		if got, err := parseDiscovery(want.append(nil)); err != nil || got != want {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
}

func TestEveryPrefixFails(t *testing.T) {
	everyone := rules{vm: vmHardware, mac: bridgeHardware}
	for _, frame := range [][]byte{askARP(t, sameARP), askND(t, sameND)} {
		// gopacket pads ARP to the least size of a frame.
		if binary.BigEndian.Uint16(frame[offsetEtherType:]) == etherTypeARP {
			frame = frame[:ethernetSize+arpSize]
		}
		if everyone.answer(frame) == nil {
			t.Fatalf("not answered: % x", frame)
		}
		for n := range frame {
			// A capacity that ends with the length shows reads beyond it.
			if answer := everyone.answer(bytes.Clone(frame[:n])); answer != nil {
				t.Errorf("first %d bytes of % x answered", n, frame)
			}
		}
	}
}

func TestParseDiscoveryHoldsToTheRules(t *testing.T) {
	// resum makes the check sum right after a change.
	resum := func(b []byte) {
		if size := int(binary.BigEndian.Uint16(b[4:])); size >= discoverySize && size <= len(b)-ipv6Size {
			message := b[ipv6Size : ipv6Size+size]
			message[2], message[3] = 0, 0
			binary.BigEndian.PutUint16(message[2:], checksum([16]byte(b[8:24]), [16]byte(b[24:40]), message))
		}
	}
	ask := discovery{vm6, host6, solicitation, 0, host6, vmHardware}
	tell := discovery{host6, allNodes, advertisement, flagOverride, host6, bridgeHardware}
	for _, c := range []struct {
		name   string
		from   discovery
		change func(b []byte) []byte
		ok     bool
	}{
		{"unchanged", ask, func(b []byte) []byte { return b }, true},
		{"padded", ask, func(b []byte) []byte { return append(b, 0, 0, 0) }, true},
		{"unknown option", ask, func(b []byte) []byte { b[64] = 14; return b }, true},
		{"option of the other kind", ask, func(b []byte) []byte { b[64] = targetLinkLayer; return b }, true},
		{"IPv4", ask, func(b []byte) []byte { b[0] = 0x45; return b }, false},
		{"other protocol", ask, func(b []byte) []byte { b[6] = 17; return b }, false},
		{"forwarded", ask, func(b []byte) []byte { b[7] = 254; return b }, false},
		{"packet longer than the frame", ask, func(b []byte) []byte { b[5]++; return b }, false},
		{"packet without a target", ask, func(b []byte) []byte { b[5] = 23; return b }, false},
		{"empty packet", ask, func(b []byte) []byte { b[5] = 0; return b }, false},
		{"greatest packet", ask, func(b []byte) []byte { b[4], b[5] = 0xff, 0xff; return b }, false},
		{"other type", ask, func(b []byte) []byte { b[40] = 128; return b }, false},
		{"code", ask, func(b []byte) []byte { b[41] = 1; return b }, false},
		{"multicast target", ask, func(b []byte) []byte { b[48] = 0xff; return b }, false},
		{"multicast source", ask, func(b []byte) []byte { b[8] = 0xff; return b }, false},
		{"option of length 0", ask, func(b []byte) []byte { b[65] = 0; return b }, false},
		{"option beyond the end", ask, func(b []byte) []byte { b[65] = 2; return b }, false},
		{"option of greatest length", ask, func(b []byte) []byte { b[65] = 255; return b }, false},
		{"half an option", ask, func(b []byte) []byte { b[5] -= 4; return b }, false},
		{"two link-layer options", ask, func(b []byte) []byte { b[5] += 8; return append(b, b[64:72]...) }, false},
		{"long link-layer option", ask, func(b []byte) []byte {
			b[5], b[65] = b[5]+8, 2
			return append(b, make([]byte, 8)...)
		}, false},
		{"link-layer option of nobody", ask, func(b []byte) []byte { clear(b[8:24]); return b }, false},
		{"advertisement", tell, func(b []byte) []byte { return b }, true},
		{"solicited by everyone", tell, func(b []byte) []byte { b[44] |= flagSolicited; return b }, false},
	} {
		b := c.change(c.from.append(nil))
		resum(b)
		if _, err := parseDiscovery(b); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	b := ask.append(nil)
	for i := ipv6Size; i < len(b); i++ {
		b[i] ^= 0x10
		if _, err := parseDiscovery(b); err == nil {
			t.Errorf("byte %d changed, and the check sum holds", i)
		}
		b[i] ^= 0x10
	}
}

func TestParseARPHoldsToTheRules(t *testing.T) {
	for i, to := range map[int]byte{1: 6, 2: 0x86, 3: 1, 4: 8, 5: 16, 7: 3} {
		b := arp{arpRequest, vmHardware, vm4, hardware{}, gateway4}.append(nil)
		b[i] = to
		if m, err := parseARP(b); err == nil {
			t.Errorf("byte %d = %d: parsed as %v", i, to, m)
		}
	}
}

func TestHardwareOf(t *testing.T) {
	for _, mac := range []net.HardwareAddr{nil, {2, 0, 0, 0, 0}, {2, 0, 0, 0, 0, 0, 0, 1}, broadcast[:], {0x33, 0x33, 0, 0, 0, 1}, make([]byte, 6)} {
		if h, err := hardwareOf(mac); err == nil {
			t.Errorf("%q taken for %v", mac, h)
		}
	}
	if h, err := hardwareOf(vmHardware[:]); err != nil || h != vmHardware {
		t.Error(h, err)
	}
}

func TestHostAddress(t *testing.T) {
	for _, a := range []netip.Addr{
		{}, netip.IPv4Unspecified(), netip.IPv6Unspecified(), netip.MustParseAddr("::%eth0"), netip.MustParseAddr("224.0.0.1"),
		allNodes, netip.MustParseAddr("255.255.255.255"), netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback(),
		netip.MustParseAddr("::ffff:0.0.0.0"),
	} {
		if got, err := hostAddress(a); err == nil {
			t.Errorf("%v taken for %v", a, got)
		}
	}
	for from, want := range map[string]netip.Addr{"10.0.0.5": vm4, "::ffff:10.0.0.5": vm4, "fe80::1%eth0": gateway6, "2001:db8::5": vm6} {
		if got, err := hostAddress(netip.MustParseAddr(from)); err != nil || got != want {
			t.Errorf("%s: %v, %v", from, got, err)
		}
	}
}

// FuzzParse parses what it has parsed again.
func FuzzParse(f *testing.F) {
	f.Add(askARP(f, sameARP)[ethernetSize:])
	f.Add(askND(f, sameND)[ethernetSize:])
	f.Add(announcements(bridgeHardware, otherHardware, vm6)[0][ethernetSize:])
	f.Add([]byte(arpHead))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseARP(b); err == nil {
			if again, err := parseARP(m.append(nil)); err != nil || again != m {
				t.Errorf("%v became %v, %v", m, again, err)
			}
		}
		if m, err := parseDiscovery(b); err == nil {
			if again, err := parseDiscovery(m.append(nil)); err != nil || again != m {
				t.Errorf("%v became %v, %v", m, again, err)
			}
		}
	})
}
