package encap

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseOuter4(t *testing.T) {
	inner := packetOf(user4, machine4, udp, 0, udpOf(1, 2, "hello"))
	b := packetOf(user4, machine4, protocolIPv4, 0xb9, inner)
	o, ok := parseOuter4(b)
	if !ok || o.src != user4 || o.tos != 0xb9 || !bytes.Equal(b[o.header:][:o.payload], inner) {
		t.Errorf("%+v, %v", o, ok)
	}
	for n := range b {
		if o, ok := parseOuter4(b[:n]); ok {
			t.Errorf("the first %d of %d bytes: %+v", n, len(b), o)
		}
	}
	// The kernel gives options too.
	long := append(bytes.Clone(b[:header4]), 1, 1, 1, 0)
	long = append(long, inner...)
	long[0] = 0x46
	binary.BigEndian.PutUint16(long[2:], uint16(len(long)))
	if o, ok := parseOuter4(append(long, "trailer"...)); !ok || o.header != 24 || o.payload != len(inner) {
		t.Errorf("with options: %+v, %v", o, ok)
	}
	for name, bad := range map[string][]byte{
		"version 6":                   change(b, at(0, 0x65)),
		"short header":                change(b, at(0, 0x44)),
		"header longer than the rest": change(b[:header4], at(0, 0x4f)),
		"length beyond the packet":    change(b, at(2, 0xff, 0xff)),
		"length within the header":    change(b, at(2, 0, 19)),
	} {
		if o, ok := parseOuter4(bad); ok {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

func FuzzOuter(f *testing.F) {
	f.Add(packetOf(user4, machine4, protocolIPv4, 0, packetOf(user4, machine4, udp, 0, udpOf(1, 2, "hello"))))
	f.Add(packetOf(user4, machine4, protocolIPv6, 0, nil))
	f.Add(change(packetOf(user4, machine4, protocolIPv4, 0, make([]byte, 50)), at(0, 0x4f)))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, ok := parseOuter4(b)
		if ok && (o.header < header4 || o.payload < 0 || o.header+o.payload > len(b)) {
			t.Fatalf("%+v in %d bytes", o, len(b))
		}
	})
}

// TestMark is figure 4 of RFC 6040.
func TestMark(t *testing.T) {
	const drop = 0xff
	want := [4][4]byte{ // by inner, then outer
		notECT: {notECT: notECT, ect0: notECT, ect1: notECT, ce: drop},
		ect0:   {notECT: ect0, ect0: ect0, ect1: ect1, ce: ce},
		ect1:   {notECT: ect1, ect0: ect1, ect1: ect1, ce: ce},
		ce:     {notECT: ce, ect0: ce, ect1: ce, ce: ce},
	}
	const dscp = 0xa4
	for inner := range byte(4) {
		for outer := range byte(4) {
			for _, ends := range [][2]int{{4, 0}, {6, 0}} {
				src, dst := user4, machine4
				if ends[0] == 6 {
					src, dst = user6, machine6
				}
				before := packetOf(src, dst, udp, dscp|inner, udpOf(1, 2, "hello"))
				p, v := parse(bytes.Clone(before))
				if v != passes {
					t.Fatal(v)
				}
				passed := p.mark(0x50 | outer) // the outer DSCP is not taken over
				wanted := want[inner][outer]
				if passed != (wanted != drop) {
					t.Errorf("IPv%d, inner %d, outer %d: passes %v", ends[0], inner, outer, passed)
				}
				if wanted == drop {
					continue
				}
				if after := packetOf(src, dst, udp, dscp|wanted, udpOf(1, 2, "hello")); !bytes.Equal(p.data, after) {
					t.Errorf("IPv%d, inner %d, outer %d: % x, want % x", ends[0], inner, outer, p.data, after)
				}
			}
		}
	}
}

func TestTrafficClass(t *testing.T) {
	b := family6.controlMessage()
	binary.NativeEndian.PutUint32(b[unix.CmsgLen(0):], 0xb9)
	if got := trafficClass(b); got != 0xb9 {
		t.Errorf("%#x", got)
	}
	for n := range unix.CmsgLen(4) {
		if got := trafficClass(b[:n]); got != 0 {
			t.Errorf("the first %d bytes: %#x", n, got)
		}
	}
	if got := trafficClass(family4.controlMessage()); got != 0 {
		t.Errorf("another message: %#x", got)
	}
}
