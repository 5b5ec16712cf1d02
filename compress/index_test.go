package compress

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
	"testing"

	"pgregory.net/rapid"
)

func fingerprint(n uint64) Fingerprint {
	return Sum(binary.LittleEndian.AppendUint64(nil, n))
}

func TestIndexFindsNearlyAll(t *testing.T) {
	const pages = 200_000
	x, err := NewIndex(pages)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if perPage := float64(len(x.table)) / pages; perPage > 25 {
		t.Errorf("%.1f bytes a page", perPage)
	}
	for n := range uint64(pages) {
		x.Put(fingerprint(n), Place(n*7))
	}
	lost := 0
	for n := range uint64(pages) {
		p, ok := x.Get(fingerprint(n))
		switch {
		case !ok:
			lost++
		case p != Place(n*7):
			t.Fatalf("page %d is at %d, not %d", n, p, n*7)
		}
	}
	if lost > pages/12 {
		t.Errorf("%d of %d pages are forgotten in an index made for them", lost, pages)
	}
	for n := range uint64(pages) {
		if p, ok := x.Get(fingerprint(pages + n)); ok {
			t.Fatalf("a page that was never put is at %d", p)
		}
	}
}

// What an index remembers is what was put last.
func TestIndexIsAMapThatForgets(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		x, err := NewIndex(rapid.Int64Range(0, 40).Draw(rt, "pages"))
		if err != nil {
			rt.Fatal(err)
		}
		defer x.Close()
		model := map[Fingerprint]Place{}
		for range rapid.IntRange(1, 200).Draw(rt, "steps") {
			f := fingerprint(rapid.Uint64Range(0, 60).Draw(rt, "page"))
			if rapid.Bool().Draw(rt, "put") {
				p := Place(rapid.Uint64Max(math.MaxUint64-1).Draw(rt, "place"))
				x.Put(f, p)
				model[f] = p
				if got, ok := x.Get(f); !ok || got != p {
					rt.Fatalf("just put at %d, found %v at %d", p, ok, got)
				}
			} else if p, ok := x.Get(f); ok && p != model[f] {
				rt.Fatalf("at %d, it was put at %d", p, model[f])
			}
		}
	})
}

func TestIndexOfNoMemory(t *testing.T) {
	for _, pages := range []int64{-1, 1<<36 + 1} {
		if x, err := NewIndex(pages); err == nil {
			x.Close()
			t.Errorf("an index of %d pages is made", pages)
		}
	}
	x, err := NewIndex(0)
	if err != nil {
		t.Fatal(err)
	}
	x.Put(fingerprint(1), 1)
	for range 2 {
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
	}
	x.Put(fingerprint(1), 1)
	if _, ok := x.Get(fingerprint(1)); ok {
		t.Error("it finds what it has given back")
	}
}

func TestSumIsSHA256(t *testing.T) {
	page := make([]byte, PageSize)
	sum := sha256.Sum256(page)
	if f := Sum(page); string(f[:]) != string(sum[:len(f)]) {
		t.Errorf("%x", f)
	}
}

func BenchmarkFingerprint(b *testing.B) {
	page := noise(1, PageSize)
	b.SetBytes(PageSize)
	for b.Loop() {
		Sum(page)
	}
}

func BenchmarkIndex(b *testing.B) {
	const pages = 4 << 20
	x, err := NewIndex(pages)
	if err != nil {
		b.Fatal(err)
	}
	defer x.Close()
	list := make([]Fingerprint, 1<<16)
	for i := range list {
		list[i] = fingerprint(uint64(i))
	}
	b.Run("put", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			x.Put(list[i%len(list)], Place(i))
		}
	})
	b.Run("get", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			x.Get(list[i%len(list)])
		}
	})
}
