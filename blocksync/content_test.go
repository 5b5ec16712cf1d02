package blocksync

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/wanmig/wanmig/compress"
	"pgregory.net/rapid"
)

func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// What the destination holds already, in whatever place, does not cross again.
func TestHeldIsNotSent(t *testing.T) {
	const n = 2 << 20
	for name, again := range map[string]struct {
		at, from int64 // where what is there from from is written again
		held     int64 // of n bytes, at least
	}{
		"aligned alike":    {4 << 20, 0, n},
		"other blocks":     {4<<20 + 5*page, 0, n},
		"not from a page":  {4<<20 + page, sectorSize, 0},
		"a part of it":     {5 << 20, 1 << 20, n - 1<<20},
		"written in parts": {4<<20 + sectorSize, sectorSize, n - 2*page},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8 << 20)
				x := newTransfer(t, d, newBudget(t, 8<<20, 0))
				x.outbox.above = 0
				content := noise(1, n)
				mustWrite(t, x.outbox, content, 0)
				x.start(t.Context())
				synctest.Wait()
				before := x.outbox.Stats().Wire
				second := append(bytes.Clone(content[again.from:]), noise(2, int(again.from))...)
				mustWrite(t, x.outbox, second, again.at)
				synctest.Wait()
				if err := errors.Join(x.finish(), x.settled()); err != nil {
					t.Fatal(err)
				}
				want := make([]byte, d.Size())
				copy(want, content)
				copy(want[again.at:], second)
				if !bytes.Equal(d.content, want) {
					t.Error("content differs")
				}
				s := x.outbox.Stats()
				if s.Held < again.held || s.Held > n {
					t.Errorf("%d of %d bytes are held, expected %d", s.Held, n, again.held)
				}
				if wire := s.Wire - before; wire > n-s.Held+n/200+1000 {
					t.Errorf("%d bytes crossed where %d are held", wire, s.Held)
				}
			})
		})
	}
}

// fickle is a source of content that changes, or can't be read.
type fickle struct {
	*disk
	r *rand.Rand
	m *sync.Mutex // of r: places are read at once
}

func (f *fickle) ReadAt(ctx context.Context, p []byte, off int64) error {
	f.m.Lock()
	now, seed := f.r.IntN(3), f.r.Uint64()
	f.m.Unlock()
	switch now {
	case 0:
		return errors.New("the seed is gone")
	case 1:
		copy(p, noise(seed, len(p)))
		return nil
	}
	return f.disk.ReadAt(ctx, p, off)
}

// What is found is right, wherever the index leads: to what was overwritten,
// changes while it is read, ends, or can't be read.
func TestSearchIsNeverWrong(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 3))
		var m sync.Mutex // of r
		c, err := NewContent(rapid.Int64Range(0, 64*page).Draw(rt, "index"))
		if err != nil {
			rt.Fatal(err)
		}
		defer c.Close()
		kinds := make([][]byte, 6) // of pages
		for i := range kinds {
			kinds[i] = noise(uint64(i), page)
		}
		var places []compress.Place
		for range rapid.IntRange(1, 3).Draw(rt, "sources") {
			d := newDisk(rapid.Int64Range(1, 20*page).Draw(rt, "size"))
			for at := 0; at < len(d.content); at += page {
				copy(d.content[at:], kinds[r.IntN(len(kinds))])
			}
			var src readerAt = d
			if rapid.Bool().Draw(rt, "fickle") {
				src = &fickle{d, r, &m}
			}
			places = append(places, c.add(src))
		}
		for range rapid.IntRange(0, 60).Draw(rt, "known") {
			c.index.Put(compress.Sum(kinds[r.IntN(len(kinds))]), places[r.IntN(len(places))]+compress.Place(r.IntN(40)))
		}
		for range rapid.IntRange(0, 2).Draw(rt, "seeds") {
			d := newDisk(rapid.Int64Range(1, 20*page).Draw(rt, "size"))
			for at := 0; at < len(d.content); at += page {
				copy(d.content[at:], kinds[r.IntN(len(kinds))])
			}
			c.Seed(&anySeed{fickle{d, r, &m}}, compress.OnSeed)
		}
		var sums []compress.Fingerprint
		var asked []int
		for range rapid.IntRange(1, 40).Draw(rt, "asked") {
			k := r.IntN(len(kinds))
			asked = append(asked, k)
			sums = append(sums, compress.Sum(kinds[k]))
		}
		found, content := c.Search(rt.Context(), sums)
		for i, k := range asked {
			if found[i] != compress.Nowhere && !bytes.Equal(content[i*page:(i+1)*page], kinds[k]) {
				rt.Fatalf("page %d is said to be held and is something else", i)
			}
		}
	})
}

// anySeed is an image whose index says anything.
type anySeed struct{ fickle }

func (s *anySeed) Find(compress.Fingerprint) (int64, bool) {
	s.m.Lock()
	defer s.m.Unlock()
	return []int64{s.r.Int64N(24), -1, 1 << 62}[min(s.r.IntN(20), 2)], s.r.IntN(4) > 0
}
