package neighbour

import (
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket/layers"
)

var someRules = rules{vm: vmHardware, mac: bridgeHardware, own: []netip.Addr{vm4, vm6, vmLocal}}

func TestWhoIsAnswered(t *testing.T) {
	arpOf := func(change func(*layers.Ethernet, *layers.ARP)) []byte { return askARP(t, change) }
	ndOf := func(change func(*question)) []byte { return askND(t, change) }
	target4 := func(a string) []byte {
		return arpOf(func(_ *layers.Ethernet, m *layers.ARP) { m.DstProtAddress = netip.MustParseAddr(a).AsSlice() })
	}
	target6 := func(a string) []byte {
		return ndOf(func(q *question) { q.body.TargetAddress = netip.MustParseAddr(a).AsSlice() })
	}
	for _, c := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"ARP for the gateway", arpOf(sameARP), true},
		{"ARP for a neighbour of old", target4("10.0.0.200"), true},
		{"ARP for a link-local service", target4("169.254.169.254"), true},
		{"ARP to the old gateway alone", arpOf(func(e *layers.Ethernet, _ *layers.ARP) { e.DstMAC = otherHardware[:] }), true},
		{"ARP for itself", target4(vm4.String()), false},
		{"ARP for nothing", target4("0.0.0.0"), false},
		{"ARP for everyone", target4("255.255.255.255"), false},
		{"ARP for a group", target4("224.0.0.251"), false},
		{"ARP probe", arpOf(func(_ *layers.Ethernet, m *layers.ARP) { m.SourceProtAddress = make([]byte, 4) }), false},
		{"ARP announcement of an address that is new", arpOf(func(_ *layers.Ethernet, m *layers.ARP) {
			m.SourceProtAddress, m.DstProtAddress = []byte{10, 0, 0, 6}, []byte{10, 0, 0, 6}
		}), false},
		{"ARP from a group", arpOf(func(_ *layers.Ethernet, m *layers.ARP) { m.SourceProtAddress = []byte{224, 0, 0, 1} }), false},
		{"ARP reply", arpOf(func(_ *layers.Ethernet, m *layers.ARP) { m.Operation = layers.ARPReply }), false},
		{"ARP in the frame of another", arpOf(func(e *layers.Ethernet, _ *layers.ARP) { e.SrcMAC = otherHardware[:] }), false},
		{"ARP in the name of another", arpOf(func(_ *layers.Ethernet, m *layers.ARP) { m.SourceHwAddress = otherHardware[:] }), false},
		{"ARP in a frame of IPv6", arpOf(func(e *layers.Ethernet, _ *layers.ARP) { e.EthernetType = layers.EthernetTypeIPv6 }), false},
		{"ARP in a VLAN", arpOf(func(e *layers.Ethernet, _ *layers.ARP) { e.EthernetType = layers.EthernetTypeDot1Q }), false},

		{"solicitation for the gateway", ndOf(sameND), true},
		{"solicitation for a neighbour of old", target6("2001:db8::99"), true},
		{"solicitation without its option", ndOf(func(q *question) { q.body.Options = nil }), true},
		{"solicitation to the old gateway alone", ndOf(func(q *question) {
			q.ethernet.DstMAC, q.ip.DstIP = otherHardware[:], gateway6.AsSlice()
		}), true},
		{"solicitation for itself", target6(vm6.String()), false},
		{"solicitation for its link-local address", target6(vmLocal.String()), false},
		{"solicitation for nothing", target6("::"), false},
		{"solicitation for loopback", target6("::1"), false},
		{"solicitation for a group", target6("ff02::1"), false},
		{"solicitation for a mapped address", target6("::ffff:10.0.0.1"), false},
		{"solicitation of its sender", target6("fe80::5054:ff:fe01:203"), false},
		{"detection of duplicates", ndOf(func(q *question) {
			q.ip.SrcIP, q.body.Options = netip.IPv6Unspecified().AsSlice(), nil
		}), false},
		{"detection of duplicates with an option", ndOf(func(q *question) { q.ip.SrcIP = netip.IPv6Unspecified().AsSlice() }), false},
		{"forwarded solicitation", ndOf(func(q *question) { q.ip.HopLimit = 254 }), false},
		{"solicitation in the frame of another", ndOf(func(q *question) { q.ethernet.SrcMAC = otherHardware[:] }), false},
		{"solicitation in the name of another", ndOf(func(q *question) { q.body.Options[0].Data = otherHardware[:] }), false},
		{"solicitation in a frame of ARP", ndOf(func(q *question) { q.ethernet.EthernetType = layers.EthernetTypeARP }), false},
		{"advertisement", discovery{vm6, allNodes, advertisement, flagOverride, vm6, vmHardware}.append(
			ethernet{broadcast, vmHardware, etherTypeIPv6}.append(nil)), false},
		{"nothing", nil, false},
	} {
		if got := someRules.answer(c.frame); (got != nil) != c.want {
			t.Errorf("%s: answer % x", c.name, got)
		}
	}
}

func TestAnswers(t *testing.T) {
	wantEthernet := func(b []byte, etherType uint16) []byte {
		t.Helper()
		header, payload, err := parseEthernet(b)
		if err != nil || header != (ethernet{vmHardware, bridgeHardware, etherType}) {
			t.Fatalf("%v, %v", header, err)
		}
		return payload
	}
	payload := wantEthernet(someRules.answer(askARP(t, sameARP)), etherTypeARP)
	if m, err := parseARP(payload); err != nil || m != (arp{arpReply, bridgeHardware, gateway4, vmHardware, vm4}) {
		t.Errorf("%v, %v", m, err)
	}
	payload = wantEthernet(someRules.answer(askND(t, sameND)), etherTypeIPv6)
	want := discovery{gateway6, vmLocal, advertisement, flagRouter | flagSolicited | flagOverride, gateway6, bridgeHardware}
	if m, err := parseDiscovery(payload); err != nil || m != want {
		t.Errorf("%v, %v, want %v", m, err, want)
	}
	payload = wantEthernet(someRules.told(gateway4), etherTypeARP)
	if m, err := parseARP(payload); err != nil || m != (arp{arpReply, bridgeHardware, gateway4, bridgeHardware, gateway4}) {
		t.Errorf("%v, %v", m, err)
	}
	payload = wantEthernet(someRules.told(gateway6), etherTypeIPv6)
	want = discovery{gateway6, allNodes, advertisement, flagRouter | flagOverride, gateway6, bridgeHardware}
	if m, err := parseDiscovery(payload); err != nil || m != want {
		t.Errorf("%v, %v, want %v", m, err, want)
	}
}

func TestNewRulesRefuses(t *testing.T) {
	for name, c := range map[string][2][]byte{
		"no VM":         {nil, bridgeHardware[:]},
		"no bridge":     {vmHardware[:], nil},
		"broadcast VM":  {broadcast[:], bridgeHardware[:]},
		"VM at its own": {vmHardware[:], vmHardware[:]},
	} {
		if _, err := newRules(c[0], c[1], nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	r, err := newRules(vmHardware[:], bridgeHardware[:], []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1"), netip.MustParseAddr("fe80::1%eth0")})
	if err != nil {
		t.Fatal(err)
	}
	if r.answer(askARP(t, sameARP)) != nil || r.answer(askND(t, sameND)) != nil {
		t.Error("own addresses of another form are answered for")
	}
}

// FuzzAnswer looks for frames that are answered and must not be.
func FuzzAnswer(f *testing.F) {
	f.Add(askARP(f, sameARP))
	f.Add(askND(f, sameND))
	f.Add(askND(f, func(q *question) { q.body.Options = nil }))
	f.Add(announcements(vmHardware, vmHardware, vm6)[0])
	f.Fuzz(func(t *testing.T, frame []byte) {
		if a := claimed(frame, vmHardware); a.IsValid() && hardware(frame[6:12]) != vmHardware {
			t.Errorf("claim of another: %v", a)
		}
		answer := someRules.answer(frame)
		if answer == nil {
			return
		}
		header, payload, err := parseEthernet(answer)
		if err != nil || header.to != vmHardware || header.from != bridgeHardware || hardware(frame[6:12]) != vmHardware {
			t.Fatalf("%v, %v", header, err)
		}
		var at hardware
		var target, to netip.Addr
		if header.etherType == etherTypeARP {
			m, err := parseARP(payload)
			if err != nil || m.operation != arpReply {
				t.Fatal(m, err)
			}
			at, target, to = m.senderHardware, m.sender, m.target
		} else {
			m, err := parseDiscovery(payload)
			if err != nil || m.kind != advertisement || m.source != m.target {
				t.Fatal(m, err)
			}
			at, target, to = m.linkLayer, m.target, m.destination
		}
		if at != bridgeHardware || !isHost(target) || !isHost(to) || target == vm4 || target == vm6 || target == vmLocal {
			t.Errorf("%v is at %v, says a frame to %v", target, at, to)
		}
	})
}
