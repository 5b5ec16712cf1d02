package api

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

func filled(c Cell, words int) []uint64 {
	w := make([]uint64, words)
	c.Fill(w)
	return w
}

func TestCellMatchesItselfOnly(t *testing.T) {
	c := Cell{Kind: PageCell, Index: 17, Generation: 5, Seed: 99}
	w := filled(c, PageSize/8)
	if !c.Matches(w) {
		t.Fatal("a cell does not match what it filled")
	}
	for _, other := range []Cell{
		{BlockCell, 17, 5, 99}, {PageCell, 18, 5, 99}, {PageCell, 17, 4, 99}, {PageCell, 17, 6, 99}, {PageCell, 17, 5, 98},
	} {
		if other.Matches(w) {
			t.Errorf("%+v matches what %+v filled", other, c)
		}
		if slices.Equal(w[4:], filled(other, len(w))[4:]) {
			t.Errorf("%+v and %+v have the same payload", other, c)
		}
	}
}

func TestEditedCellsDifferInFewWords(t *testing.T) {
	before := filled(Cell{EditCell, 17, 5, 99}, PageSize/8)
	for generation := range uint64(100) {
		c := Cell{EditCell, 17, 6 + generation, 99}
		w := filled(c, PageSize/8)
		if !c.Matches(w) {
			t.Fatal("an edited cell does not match what it filled")
		}
		different := 0
		for i := range w {
			if w[i] != before[i] {
				different++
			}
		}
		if different < edits+2 || different > 2*edits+2 {
			t.Errorf("generation %d differs from the one before in %d words", c.Generation, different)
		}
		before = w
	}
}

func TestFlippedBitsAreFound(t *testing.T) {
	c := Cell{Kind: PageCell, Index: 3, Generation: 1, Seed: 7}
	w := filled(c, PageSize/8)
	for i := range w {
		for bit := i % 8; bit < 64; bit += 8 {
			w[i] ^= 1 << bit
			if c.Matches(w) {
				t.Fatalf("bit %d of word %d flipped, and it matches", bit, i)
			}
			w[i] ^= 1 << bit
		}
	}
	if !c.Matches(w) {
		t.Fatal("the cell does not match after the bits were restored")
	}
}

func TestDiagnose(t *testing.T) {
	c := Cell{Kind: PageCell, Index: 17, Generation: 5, Seed: 99}
	damaged := filled(c, PageSize/8)
	original := byte(damaged[100] >> 24)
	damaged[100] ^= 0x41 << 24
	damaged[200] ^= 1
	for _, test := range []struct {
		name string
		w    []uint64
		want string
	}{
		{"stale", filled(Cell{PageCell, 17, 3, 99}, 512), "17: expected generation 5, holds the stale generation 3"},
		{"later", filled(Cell{PageCell, 17, 6, 99}, 512), "17: expected generation 5, holds the later generation 6"},
		{"swapped", filled(Cell{PageCell, 18, 2, 99}, 512), "17: expected generation 5, holds 18 of generation 2"},
		{"foreign", filled(Cell{PageCell, 17, 5, 98}, 512), "17: expected generation 5, holds something of another origin"},
		{"zeros", make([]uint64, 512), "damaged in 4"},
		{"damaged", damaged, "17: generation 5 damaged in 2 of 4096 bytes, first at offset 803: "},
	} {
		if got := c.Diagnose(test.w); !strings.HasPrefix(got, test.want) && !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
	if got := c.Diagnose(damaged); !strings.HasSuffix(got, "instead of "+hexByte(original)) {
		t.Errorf("%q does not end with the expected byte %#02x", got, original)
	}
}

func hexByte(b byte) string {
	const digits = "0123456789abcdef"
	return "0x" + string(digits[b>>4]) + string(digits[b&15])
}

func TestCellsCompressLikeMemoryInUse(t *testing.T) {
	var compressed bytes.Buffer
	w, err := flate.NewWriter(&compressed, flate.DefaultCompression)
	if err != nil {
		t.Fatal(err)
	}
	const pages = 256
	for i := range uint64(pages) {
		if err := binary.Write(w, binary.LittleEndian, filled(Cell{PageCell, i, 1, 1}, PageSize/8)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if ratio := pages * PageSize / float64(compressed.Len()); ratio < 2 || ratio > 4 {
		t.Errorf("cells compress %.2f:1, want between 2:1 and 4:1", ratio)
	}
}

func TestWordsRefusesWhatIsNotWords(t *testing.T) {
	b := make([]byte, 64)
	for name, p := range map[string][]byte{"empty": nil, "odd": b[:9], "unaligned": b[1:9]} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s bytes were taken for words", name)
				}
			}()
			Words(p)
		}()
	}
}

func BenchmarkFillAndMatch(b *testing.B) {
	w := make([]uint64, PageSize/8)
	b.SetBytes(PageSize)
	for i := range uint64(b.N) {
		c := Cell{PageCell, i, 1, 1}
		c.Fill(w)
		if !c.Matches(w) {
			b.Fatal("no match")
		}
	}
}
