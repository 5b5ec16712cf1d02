package netredirect

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
)

func probes(t testing.TB) (all [][]byte) {
	t.Helper()
	for family := range probeSource {
		for _, size := range []int{0, minMTU, 1280, 1480, maxMTU} {
			b, err := probePacket(probeSource[family], probeDestination[family], []byte(probeMagic+"?0123456789abcdef"), size)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, slices.Clone(b))
		}
	}
	return all
}

func TestProbeRoundTrip(t *testing.T) {
	asked := []byte(probeMagic + "?0123456789abcdef")
	for family := range probeSource {
		from, to := probeSource[family], probeDestination[family]
		header := 48
		if from.Is4() {
			header = 28
		}
		least := header + len(asked)
		for _, size := range []int{-1, 0, least - 1, least, least + 1, minMTU, 1280, 1500, maxMTU} {
			b, err := probePacket(from, to, asked, size)
			if err != nil || len(b) != max(size, least) {
				t.Errorf("%s: a probe of %d bytes has %d: %v", from, size, len(b), err)
				continue
			}
			if from.Is4() && b[6]&0x40 == 0 {
				t.Errorf("%s: a probe of %d bytes may be fragmented", from, size)
			}
			gotFrom, gotTo, payload, ok := readProbe(b)
			if !ok || gotFrom != from || gotTo != to || !bytes.HasPrefix(payload, asked) {
				t.Errorf("%d bytes are read as %v → %v, %q, %v", size, gotFrom, gotTo, payload, ok)
			}
			if rest := payload[len(asked):]; bytes.Count(rest, []byte{0}) != len(rest) {
				t.Errorf("filled with %q", rest)
			}
		}
	}
	if string(asked) != probeMagic+"?0123456789abcdef" {
		t.Errorf("the caller's payload has become %q", asked)
	}
}

func TestNoProbes(t *testing.T) {
	for _, whole := range probes(t) {
		v4 := whole[0]>>4 == 4
		header := 40
		if v4 {
			header = 20
		}
		for n := range header + 8 + len(probeMagic) {
			if _, _, _, ok := readProbe(whole[:n:n]); ok {
				t.Errorf("the first %d bytes are a probe", n)
			}
		}
		for name, spoil := range map[string]func([]byte){
			"other source port":      func(b []byte) { b[header]++ },
			"other destination port": func(b []byte) { b[header+3]++ },
			"other text":             func(b []byte) { b[header+8]++ },
			"TCP": func(b []byte) {
				if v4 {
					b[9] = 6
				} else {
					b[6] = 6
				}
			},
			"no version": func(b []byte) { b[0] &= 0x0f },
		} {
			b := slices.Clone(whole)
			spoil(b)
			if _, _, _, ok := readProbe(b); ok {
				t.Errorf("%s: a probe", name)
			}
		}
	}
}

// TestProbeFilter runs the filter as the kernel does.
func TestProbeFilter(t *testing.T) {
	vm, err := bpf.NewVM(probeFilter())
	if err != nil {
		t.Fatal(err)
	}
	taken := func(b []byte) int {
		t.Helper()
		n, err := vm.Run(b)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, whole := range probes(t) {
		header := 40
		if whole[0]>>4 == 4 {
			header = 20
		}
		if n := taken(whole); n < len(whole) {
			t.Errorf("%d bytes of a probe of %d are taken", n, len(whole))
		}
		for n := range header + 4 {
			if taken(whole[:n:n]) != 0 {
				t.Errorf("the first %d bytes are taken", n)
			}
		}
		for name, spoil := range map[string]func([]byte){
			"source port": func(b []byte) { b[header]++ }, "destination port": func(b []byte) { b[header+3]++ },
			"protocol": func(b []byte) { b[map[int]int{20: 9, 40: 6}[header]] = 6 }, "version": func(b []byte) { b[0] ^= 0x80 },
		} {
			b := slices.Clone(whole)
			spoil(b)
			if taken(b) != 0 {
				t.Errorf("other %s: taken", name)
			}
		}
		if header == 20 {
			options := slices.Concat([]byte{0x46}, whole[1:20], []byte{1, 1, 1, 1}, whole[20:])
			if taken(options) == 0 {
				t.Error("one with IP options is not taken")
			}
			later := slices.Clone(whole)
			later[7] = 1
			if taken(later) != 0 {
				t.Error("a later fragment is taken")
			}
		}
	}
}

func FuzzReadProbe(f *testing.F) {
	for _, b := range probes(f) {
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	f.Add([]byte{0x45})
	f.Add([]byte{0x60, 0, 0, 0, 0, 8, 43, 1}) // IPv6 routing header that is not there
	f.Fuzz(func(t *testing.T, b []byte) {
		was := slices.Clone(b)
		from, to, payload, ok := readProbe(b)
		if !bytes.Equal(b, was) {
			t.Error("the packet has changed")
		}
		if !ok {
			return
		}
		if !bytes.HasPrefix(payload, []byte(probeMagic)) || from.Is4() != to.Is4() || from == (netip.Addr{}) || len(payload) > len(b) {
			t.Errorf("%v → %v: %q", from, to, payload)
		}
		answer, err := probePacket(to, from, payload, len(b))
		if err != nil {
			t.Fatalf("no answer to %x: %v", b, err)
		}
		if back, there, text, ok := readProbe(answer); !ok || back != to || there != from || !bytes.HasPrefix(text, payload) {
			t.Errorf("the answer to %x is %x", b, answer)
		}
	})
}
