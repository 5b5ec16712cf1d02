package tunnel

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func numbered(number uint32, text string) []byte {
	return append(appendSequence(nil, number), text...)
}

// TestSequencer plays what arrives: "1:5" is packet 5 on carrier 1, "+20" are
// 20 ms after which what has waited too long goes on. Of two carriers.
func TestSequencer(t *testing.T) {
	for _, test := range []struct{ arrives, want string }{
		{"", ""},
		{"0:0 1:1 0:2 1:3", "0 1 2 3"},
		{"1:1 0:0", "0 1"},
		{"1:1 1:3 0:0 0:2", "0 1 2 3"},
		// Each carrier is in order: 1 can't come behind 2 and 3.
		{"0:0 0:2", "0"},
		{"0:0 0:2 1:3", "0 2 3"},
		{"0:0 0:2 1:3 1:1", "0 2 3 1"},
		// An idle carrier tells nothing, so time has to.
		{"0:0 0:2 +29", "0"},
		{"0:0 0:2 +30", "0 2"},
		{"0:0 0:2 +30 1:1 0:3", "0 2 1 3"},
		{"0:0 0:2 +20 0:4 +10", "0 2"},
		{"0:0 0:2 +20 0:4 +30", "0 2 4"},
		{"0:0 0:2 0:4 +30", "0 2 4"},
		// The same number twice: not what our peers send.
		{"0:0 0:0", "0 0"},
		{"0:0 0:2 0:2 +30", "0 2"},
		// What is too far ahead pushes the others on.
		{"0:0 0:2 0:1025", "0 2"},
		{"0:0 0:2 0:1026", "0 2"},
		{"0:0 0:2 0:4 0:1028", "0 2 4"},
		{"0:5000 0:5001", "5000 5001"},
		{"0:0 0:2147483647 0:2147483648", "0 2147483647 2147483648"},
		{"0:0 0:2 0:4294967295 1:1", "0 4294967295 1 2"},
		{"1:1023 0:0 +30", "0 1023"},
		{"1:1024 0:1025", "1024 1025"},
	} {
		s := newSequencer(2)
		now := time.Unix(0, 0)
		var out [][]byte
		for _, what := range strings.Fields(test.arrives) {
			if wait, ok := strings.CutPrefix(what, "+"); ok {
				ms, err := strconv.Atoi(wait)
				if err != nil {
					t.Fatal(err)
				}
				now = now.Add(time.Duration(ms) * time.Millisecond)
				out = s.expire(out, now)
				continue
			}
			var carrier int
			var number uint32
			if _, err := fmt.Sscanf(what, "%d:%d", &carrier, &number); err != nil {
				t.Fatal(err)
			}
			out = s.take(out, carrier, numbered(number, fmt.Sprint(number)), now)
		}
		var got []string
		for _, b := range out {
			got = append(got, string(b))
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: got %v, want %s", test.arrives, got, test.want)
		}
	}
}

func TestSequencerIgnoresWhatHasNoPacket(t *testing.T) {
	s := newSequencer(1)
	for n := range sequenceSize + 1 {
		if out := s.take(nil, 0, make([]byte, n), time.Now()); out != nil || s.next != 0 {
			t.Errorf("%d bytes give %q", n, out)
		}
	}
}

// Packets of eight carriers, each with its own delay, of which some are lost.
func TestSequencerRestoresTheOrder(t *testing.T) {
	const packets = 10_000
	dice := rand.New(rand.NewPCG(1, 2))
	type flying struct {
		at      int
		carrier int
		number  uint32
	}
	var air []flying
	free := make([]int, packetCarriers)
	lost := 0
	for i := range packets {
		carrier := i % packetCarriers
		free[carrier] = max(free[carrier]+1, i+dice.IntN(40))
		if dice.IntN(100) == 0 {
			lost++
			continue
		}
		air = append(air, flying{free[carrier], carrier, uint32(math.MaxUint32 - packets/2 + i)})
	}
	slices.SortStableFunc(air, func(a, b flying) int { return a.at - b.at })

	s := newSequencer(packetCarriers)
	s.next = math.MaxUint32 - packets/2
	var out [][]byte
	now := time.Unix(0, 0)
	for _, f := range air {
		out = s.take(out, f.carrier, numbered(f.number, string(binary.BigEndian.AppendUint32(nil, f.number))), now)
		if s.count > packetCarriers*50 {
			t.Fatalf("%d packets wait", s.count)
		}
	}
	out = s.expire(out, now.Add(maxWait))
	if len(out) != packets-lost {
		t.Errorf("%d packets of %d", len(out), packets-lost)
	}
	for i := 1; i < len(out); i++ {
		if a, b := binary.BigEndian.Uint32(out[i-1]), binary.BigEndian.Uint32(out[i]); ahead(b, a) <= 0 {
			t.Fatalf("%d comes behind %d", b, a)
		}
	}
}

// FuzzSequencer: whatever a peer sends, each packet comes out once at most, and
// none stays for ever.
func FuzzSequencer(f *testing.F) {
	f.Add([]byte{0, 0, 1, 0, 2, 1})
	f.Add([]byte{5, 0, 3, 1, 200, 255, 0, 255, 7, 7})
	f.Fuzz(func(t *testing.T, script []byte) {
		s := newSequencer(packetCarriers)
		now := time.Unix(0, 0)
		var out [][]byte
		taken := 0
		number := uint32(0)
		for i := 0; i+1 < len(script); i += 2 {
			number += uint32(int8(script[i])) * uint32(script[i])
			if script[i+1] >= 128 {
				now = now.Add(time.Duration(script[i+1]) * time.Millisecond / 8)
				out = s.expire(out, now)
			}
			out = s.take(out, int(script[i+1])%packetCarriers, numbered(number, "x"), now)
			taken++
			waiting := 0
			for n := range s.ring {
				if s.ring[n].packet != nil {
					waiting++
				}
			}
			if waiting != s.count || s.ring[s.next%window].packet != nil {
				t.Fatalf("%d packets wait, %d are counted", waiting, s.count)
			}
		}
		out = s.expire(out, now.Add(time.Hour))
		if s.count != 0 || len(out) > taken {
			t.Fatalf("%d of %d packets come out, %d stay", len(out), taken, s.count)
		}
	})
}
