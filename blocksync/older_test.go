package blocksync

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/wanmig/wanmig/blocksync/nbd"
	"github.com/wanmig/wanmig/compress"
)

// Of a disk that has an older copy at the destination only what differs crosses,
// and only that is written.
func TestOlderCopy(t *testing.T) {
	const n = 4 << 20
	content := noise(1, n)
	changed := func(every, length int) []byte {
		p := bytes.Clone(content)
		for at := 0; at < n; at += every {
			copy(p[at:], noise(uint64(at)+2, length))
		}
		return p
	}
	for name, tt := range map[string]struct {
		older []byte
		held  int64 // of n bytes
		wire  int64 // at most
	}{
		"the same":                    {content, n, n / 1000},
		"a page in 64 changed":        {changed(64*page, page), n - n/64, n/64 + n/500},
		"a sector in 16 pages":        {changed(16*page, sectorSize), n - n/16, n/16 + n/150},
		"nothing alike":               {noise(9, n), 0, n + n/150},
		"zeros":                       {make([]byte, n), 0, n + n/150},
		"the first half":              {append(bytes.Clone(content[:n/2]), noise(9, n/2)...), n / 2, n/2 + n/150},
		"by half a block, so by page": {append(noise(9, 8*page), content[8*page:]...), n - 8*page, 9 * page},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(n + 2<<20)
				copy(d.content, tt.older)
				copy(d.content[n:], fill(2<<20, 9)) // what the guest has trimmed since
				x := newTransfer(t, d, newBudget(t, 2*n, 0))
				x.target = NewTarget(d, newContent(t, d.Size()), true)
				x.outbox.bulk = true
				x.start(t.Context())
				synctest.Wait() // the source learns of the copy
				if err := x.outbox.Zero(t.Context(), 0, d.Size(), nbd.ZeroFlags{}); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if d.writes > 0 {
					t.Error("the older copy is cleared before it is looked at")
				}
				mustWrite(t, x.outbox, content, 0)
				x.outbox.Covered()
				synctest.Wait()
				want := make([]byte, d.Size())
				copy(want, content)
				if !bytes.Equal(d.content, want) || d.unsynced {
					t.Error("what was not mentioned is not zeros when all is covered")
				}
				if err := errors.Join(x.finish(), x.settled()); err != nil {
					t.Fatal(err)
				}
				s := x.outbox.Stats()
				if s.Held != tt.held || s.Reduction.Old.Bytes != tt.held {
					t.Errorf("%d of %d bytes are held, %d by the older copy: want %d", s.Held, n, s.Reduction.Old.Bytes, tt.held)
				}
				if s.Wire > tt.wire {
					t.Errorf("%d bytes crossed, want %d at most", s.Wire, tt.wire)
				}
				if ts := x.target.Stats(); ts.Written != n-tt.held {
					t.Errorf("%d bytes written, %d differ", ts.Written, n-tt.held)
				}
			})
		})
	}
}

// What is in another older thing, as the memory that the guest had, is older content too. It
// is not where it will stand, where there is something else.
func TestOlderContentElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 4 << 20
		content := noise(1, n)
		stale := bytes.Clone(content)
		for at := 0; at < n; at += 5 * page {
			copy(stale[at:], noise(uint64(at)+2, page))
		}
		memory := make([]byte, 0, 2*n) // in another order
		for at := n - page; at >= 0; at -= page {
			memory = append(memory, content[at:at+page]...)
		}
		d := &disk{content: stale}
		x := newTransfer(t, d, newBudget(t, 2*n, 0))
		have := newContent(t, n)
		have.Seed(newArraySeed(memory), compress.OnOld)
		x.target = NewTarget(d, have, true)
		x.outbox.bulk = true
		x.start(t.Context())
		synctest.Wait()
		mustWrite(t, x.outbox, content, 0)
		synctest.Wait()
		x.outbox.Covered()
		if err := errors.Join(x.finish(), x.settled()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(d.content, content) {
			t.Error("what was found elsewhere was not written")
		}
		if s := x.outbox.Stats(); s.Held != n || s.Reduction.Old.Bytes != n {
			t.Errorf("%d of %d bytes are held, %d in what is older", s.Held, n, s.Reduction.Old.Bytes)
		}
	})
}

// arraySeed is an image whose index is complete.
type arraySeed struct {
	*disk
	at map[compress.Fingerprint]int64
}

func newArraySeed(content []byte) *arraySeed {
	s := &arraySeed{&disk{content: content}, map[compress.Fingerprint]int64{}}
	for at := 0; at+page <= len(content); at += page {
		s.at[compress.Sum(content[at:at+page])] = int64(at / page)
	}
	return s
}

func (s *arraySeed) Find(f compress.Fingerprint) (int64, bool) {
	at, ok := s.at[f]
	return at, ok
}

// What an image at the destination has is found in blocks, wherever it stands
// there, and in pages where it is torn apart.
func TestSeed(t *testing.T) {
	const n = 4 << 20
	content := noise(1, n)
	torn := make([]byte, 0, 2*n)
	for at := 0; at < n; at += 3 * page {
		torn = append(torn, noise(uint64(at)+9, page)...)
		torn = append(torn, content[at:min(at+3*page, n)]...)
	}
	for name, tt := range map[string]struct {
		image []byte
		wire  int64
	}{
		"elsewhere":       {append(noise(2, 5*page), content...), n / 1600},
		"not in blocks":   {append(noise(2, sectorSize), content...), n + n/150},
		"torn apart":      {torn, n / 150},
		"shorter by half": {content[:n/2], n/2 + n/200},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(n)
				x := newTransfer(t, d, newBudget(t, 2*n, 0))
				have := newContent(t, n)
				have.Seed(newArraySeed(tt.image), compress.OnSeed)
				x.target = NewTarget(d, have, false)
				x.outbox.bulk = true
				x.start(t.Context())
				synctest.Wait()
				mustWrite(t, x.outbox, content, 0)
				synctest.Wait()
				if err := errors.Join(x.finish(), x.settled()); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(d.content, content) {
					t.Error("content differs")
				}
				if s := x.outbox.Stats(); s.Wire > tt.wire || s.Reduction.Seed.Bytes != s.Held {
					t.Errorf("%d bytes crossed, want %d at most; %+v", s.Wire, tt.wire, s.Reduction)
				}
			})
		})
	}
}

// What an offer was answered with counts when it is applied, whatever was written
// in between.
func TestOlderCopyWrittenMeanwhile(t *testing.T) {
	d := newDisk(testDisk)
	block := noise(1, blockUnit)
	copy(d.content[blockUnit:], block)
	e := []extent{{blockUnit, blockUnit}}
	other := []extent{{blockUnit + page, page}}
	acks, err := applyTo(t, d, true, [][]byte{
		appendOpen(nil, testDisk, false),
		offerOf(1, blockUnit, e, block),
		appendBarrier(nil, 1, false), // clears the copy
		dataOf(other, noise(2, page)),
		appendApply(nil, 1),
		offerOf(2, page, other, noise(2, page)),
		dataOf(other, noise(3, page)),
		appendApply(nil, 2),
		appendBarrier(nil, 2, true),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, testDisk)
	copy(want[blockUnit:], block)
	held := func(i int) compress.Origin {
		for _, frame := range acks {
			if a, _ := parseAck(frame); a.kind == ackHeld && a.id == uint64(i) {
				return heldAt(a.held, 0)
			}
		}
		t.Fatalf("offer %d is not answered", i)
		return 0
	}
	// The search runs beside: it may come before the barrier, or after it.
	if held(1) == compress.Nowhere {
		clear(want[blockUnit : 2*blockUnit])
		copy(want[blockUnit+page:], noise(3, page))
	}
	if held(2) != compress.Nowhere {
		copy(want[blockUnit+page:], noise(2, page))
	} else {
		copy(want[blockUnit+page:], noise(3, page))
	}
	if !bytes.Equal(d.content, want) {
		t.Error("content differs")
	}
}
