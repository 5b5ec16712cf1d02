package compress

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

const deltaBlock = 4096

func applied(t testing.TB, old, delta []byte) []byte {
	t.Helper()
	block := bytes.Clone(old)
	if err := ApplyDelta(block, delta); err != nil {
		t.Fatal(err)
	}
	return block
}

func TestDeltaBytes(t *testing.T) {
	old := make([]byte, 300)
	for _, c := range []struct {
		name   string
		change map[int]byte
		want   string
	}{
		{"equal", nil, ""},
		{"first", map[int]byte{0: 7}, "\x00\x01\x07"},
		{"last", map[int]byte{299: 7}, "\xab\x02\x01\x07"},
		{"apart", map[int]byte{10: 1, 15: 2}, "\x0a\x01\x01\x04\x01\x02"},
		{"joined", map[int]byte{10: 1, 14: 2}, "\x0a\x05\x01\x00\x00\x00\x02"},
		{"near the end", map[int]byte{290: 1, 297: 2}, "\xa2\x02\x01\x01\x06\x01\x02"},
	} {
		next := bytes.Clone(old)
		for i, v := range c.change {
			next[i] = v
		}
		got, ok := AppendDelta([]byte("x"), old, next, deltaBlock)
		if !ok || string(got) != "x"+c.want {
			t.Errorf("%s: %v, %x, want %x", c.name, ok, got[1:], c.want)
		}
		if !bytes.Equal(applied(t, old, got[1:]), next) {
			t.Errorf("%s: other bytes came out", c.name)
		}
	}
}

func TestDeltaLimit(t *testing.T) {
	old, next := noise(1, deltaBlock), noise(2, deltaBlock)
	whole, ok := AppendDelta(nil, old, next, 2*deltaBlock)
	if !ok || !bytes.Equal(applied(t, old, whole), next) {
		t.Fatal("no delta of unlike blocks")
	}
	if got, ok := AppendDelta([]byte("x"), old, next, len(whole)-1); ok || string(got) != "x" {
		t.Errorf("a delta of %d bytes fits into %d", len(whole), len(whole)-1)
	}
	if got, ok := AppendDelta(nil, old, next, len(whole)); !ok || !bytes.Equal(got, whole) {
		t.Error("a delta does not fit into its own length")
	}
	if _, ok := AppendDelta(nil, old, old, 0); !ok {
		t.Error("the delta of equal blocks has no length")
	}
}

func TestAnyDelta(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		old := rapid.SliceOfN(rapid.SampledFrom([]byte{0, 0, 0, 1, 255}), 0, 600).Draw(t, "old")
		next := bytes.Clone(old)
		for range rapid.IntRange(0, 20).Draw(t, "changes") {
			if len(next) > 0 {
				next[rapid.IntRange(0, len(next)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "value")
			}
		}
		limit := rapid.IntRange(0, 100).Draw(t, "limit")
		delta, ok := AppendDelta(nil, old, next, limit)
		if len(delta) > limit {
			t.Fatalf("%d bytes, the limit is %d", len(delta), limit)
		}
		if ok {
			block := bytes.Clone(old)
			if err := ApplyDelta(block, delta); err != nil || !bytes.Equal(block, next) {
				t.Fatalf("other bytes came out: %v", err)
			}
		}
	})
}

// A delta that is cut anywhere but between two changes is refused.
func TestEveryDeltaPrefix(t *testing.T) {
	old := make([]byte, deltaBlock)
	next := bytes.Clone(old)
	whole := map[int]bool{0: true}
	delta := []byte{}
	for _, i := range []int{3, 500, 600, 4000} {
		next[i] = 9
		delta, _ = AppendDelta(nil, old, next, deltaBlock)
		whole[len(delta)] = true
	}
	for n := range delta {
		err := ApplyDelta(bytes.Clone(old), delta[:n])
		if whole[n] != (err == nil) || err != nil && !errors.Is(err, ErrDelta) {
			t.Errorf("%d of %d bytes: %v", n, len(delta), err)
		}
	}
}

func TestBadDelta(t *testing.T) {
	for name, delta := range map[string]string{
		"beyond the block":      "\x0b\x01\x01",
		"ends beyond the block": "\x09\x02\x01\x01",
		"empty change":          "\x00\x00",
		"no content":            "\x00\x05",
		"endless number":        "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
		"huge number":           "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x01\x01",
		"huge change":           "\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x01",
		"at the end":            "\x0a\x01\x01",
	} {
		if err := ApplyDelta(make([]byte, 10), []byte(delta)); !errors.Is(err, ErrDelta) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDelta(f *testing.F) {
	f.Add([]byte("old content"), []byte("new content"), []byte("\x00\x03\x01\x02\x03"))
	f.Add([]byte{}, []byte{}, []byte{})
	f.Add(make([]byte, 300), noise(1, 300), []byte("\xab\x02\x01\x07"))
	f.Fuzz(func(t *testing.T, old, next, hostile []byte) {
		block := bytes.Clone(old)
		if err := ApplyDelta(block, hostile); err != nil && !errors.Is(err, ErrDelta) {
			t.Fatal(err)
		}
		n := min(len(old), len(next))
		delta, ok := AppendDelta(nil, old[:n], next[:n], 3*n+10)
		if !ok {
			t.Fatalf("a delta of blocks of %d bytes takes more than %d", n, 3*n+10)
		}
		if !bytes.Equal(applied(t, old[:n], delta), next[:n]) {
			t.Fatal("other bytes came out")
		}
	})
}

func BenchmarkDelta(b *testing.B) {
	old := table(deltaBlock)
	for name, changes := range map[string]int{"1 word": 1, "20 words": 20, "all": 512} {
		next := bytes.Clone(old)
		r := rand.New(rand.NewPCG(1, 1))
		for range changes {
			at := 8 * r.IntN(deltaBlock/8)
			copy(next[at:], noise(r.Uint64(), 8))
		}
		dst := make([]byte, 0, deltaBlock)
		b.Run("encode/"+name, func(b *testing.B) {
			b.SetBytes(deltaBlock)
			b.ReportAllocs()
			for b.Loop() {
				AppendDelta(dst, old, next, 1024)
			}
		})
		delta, ok := AppendDelta(nil, old, next, 1024)
		if !ok {
			continue
		}
		b.Run("decode/"+name, func(b *testing.B) {
			block := bytes.Clone(old)
			b.SetBytes(deltaBlock)
			b.ReportAllocs()
			for b.Loop() {
				if err := ApplyDelta(block, delta); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
