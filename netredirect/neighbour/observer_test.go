package neighbour

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/net/bpf"

	"github.com/gopacket/gopacket/layers"
)

// packet4 and packet6 are what a guest sends, without a payload.
func packet4(from hardware, source netip.Addr) []byte {
	b := ethernet{bridgeHardware, from, etherTypeIPv4}.append(nil)
	b = append(b, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0)
	return append(append(b, source.AsSlice()...), 192, 0, 2, 1)
}

func packet6(from hardware, source netip.Addr) []byte {
	b := ethernet{bridgeHardware, from, etherTypeIPv6}.append(nil)
	b = append(b, 0x60, 0, 0, 0, 0, 0, 59, 64)
	return append(append(b, source.AsSlice()...), host6.AsSlice()...)
}

func advertise(from hardware, m discovery) []byte {
	return m.append(ethernet{bridgeHardware, from, etherTypeIPv6}.append(nil))
}

func TestClaimed(t *testing.T) {
	for _, c := range []struct {
		name  string
		frame []byte
		want  netip.Addr
	}{
		{"ARP request", askARP(t, sameARP), vm4},
		{"ARP reply", arp{arpReply, vmHardware, vm4, bridgeHardware, gateway4}.append(ethernet{bridgeHardware, vmHardware, etherTypeARP}.append(nil)), vm4},
		{"ARP probe", askARP(t, func(_ *layers.Ethernet, m *layers.ARP) { m.SourceProtAddress = make([]byte, 4) }), netip.IPv4Unspecified()},
		{"ARP in the name of another", askARP(t, func(_ *layers.Ethernet, m *layers.ARP) { m.SourceHwAddress = otherHardware[:] }), netip.Addr{}},
		{"solicitation", askND(t, sameND), vmLocal},
		{"advertisement", advertise(vmHardware, discovery{vmLocal, gateway6, advertisement, 0, vm6, vmHardware}), vm6},
		{"advertisement without its option", advertise(vmHardware, discovery{vmLocal, gateway6, advertisement, 0, vm6, hardware{}}), vm6},
		{"advertisement for another", advertise(vmHardware, discovery{vmLocal, gateway6, advertisement, 0, vm6, otherHardware}), netip.Addr{}},
		{"IPv4", packet4(vmHardware, vm4), vm4},
		{"IPv4 of another", packet4(otherHardware, vm4), netip.Addr{}},
		{"IPv4, short", packet4(vmHardware, vm4)[:ethernetSize+19], netip.Addr{}},
		{"IPv6", packet6(vmHardware, vm6), vm6},
		{"IPv6, short", packet6(vmHardware, vm6)[:ethernetSize+39], netip.Addr{}},
		{"IPv6 of another", packet6(otherHardware, vm6), netip.Addr{}},
		{"nothing", nil, netip.Addr{}},
	} {
		if got := claimed(c.frame, vmHardware); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestAddressesLeavesOutWhatCannotMove(t *testing.T) {
	o := &Observer{}
	for _, a := range []string{"::", "10.0.0.5", "0.0.0.0", "fe80::1", "169.254.3.4", "ff02::1", "127.0.0.1", "2001:db8::5", "::1", "::ffff:10.0.0.9"} {
		o.seen = append(o.seen, netip.MustParseAddr(a))
	}
	if got := o.Addresses(); len(got) != 2 || got[0] != vm4 || got[1] != vm6 {
		t.Errorf("addresses %v", got)
	}
}

// verdict runs a filter as the kernel would.
func verdict(t *testing.T, program []bpf.Instruction, frame []byte) bool {
	t.Helper()
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	n, err := vm.Run(frame)
	if err != nil {
		t.Fatal(err)
	}
	return n > 0
}

func TestSentByFilter(t *testing.T) {
	program := append(sentBy(vmHardware), accept)
	if !verdict(t, program, packet4(vmHardware, vm4)) {
		t.Error("the VM's frame is dropped")
	}
	for i := range vmHardware {
		other := vmHardware
		other[i] ^= 0x40
		if verdict(t, program, packet4(other, vm4)) {
			t.Errorf("frame of %v is let through", other)
		}
	}
}

func TestQuestionsFilter(t *testing.T) {
	for _, c := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"ARP", askARP(t, sameARP), true},
		{"solicitation", askND(t, sameND), true},
		{"advertisement", advertise(vmHardware, discovery{vm6, host6, advertisement, 0, vm6, vmHardware}), false},
		{"IPv4", packet4(vmHardware, vm4), false},
		{"IPv6", packet6(vmHardware, vm6), false},
		{"short", askND(t, sameND)[:ethernetSize+ipv6Size], false},
		{"nothing", nil, false},
	} {
		if got := verdict(t, questions(), c.frame); got != c.want {
			t.Errorf("%s: let through: %v", c.name, got)
		}
	}
}

func TestStrangersFilter(t *testing.T) {
	var known []netip.Addr
	for i := range byte(observed / 2) {
		known = append(known, netip.AddrFrom4([4]byte{10, 0, 1, i}))
		a := vm6.As16()
		a[i%16] ^= 1 + i // differs in each of the words
		known = append(known, netip.AddrFrom16(a))
	}
	program := strangers(known)
	for _, a := range []netip.Addr{vm4, gateway4} {
		if !verdict(t, program, packet4(vmHardware, a)) {
			t.Errorf("%v is unknown, and dropped", a)
		}
	}
	for _, a := range []netip.Addr{vm6, host6, vmLocal} {
		if !verdict(t, program, packet6(vmHardware, a)) {
			t.Errorf("%v is unknown, and dropped", a)
		}
	}
	for _, a := range known {
		frames := [][]byte{packet6(vmHardware, a), advertise(vmHardware, discovery{vm6, host6, advertisement, 0, a, vmHardware})}
		if a.Is4() {
			frames = [][]byte{packet4(vmHardware, a), askARP(t, func(_ *layers.Ethernet, m *layers.ARP) { m.SourceProtAddress = a.AsSlice() })}
		}
		for _, frame := range frames {
			if verdict(t, program, frame) {
				t.Errorf("%v is known, and let through: % x", a, frame)
			}
		}
	}
	if !verdict(t, program, advertise(vmHardware, discovery{known[1], host6, advertisement, 0, vm6, vmHardware})) {
		t.Error("advertisement of an unknown target from a known source is dropped")
	}
	other := packet4(vmHardware, vm4)
	binary.BigEndian.PutUint16(other[offsetEtherType:], 0x88cc)
	if verdict(t, program, other) {
		t.Error("frame of another protocol is let through")
	}
}
