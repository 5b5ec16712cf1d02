package memsync

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"pgregory.net/rapid"

	"github.com/wanmig/wanmig/compress"
)

// reducer is a Source past the beginning of its stream, and the decoder of its
// batches.
type reducer struct {
	*Source
	in      *unbatch
	stream  []byte // of the open batch
	offers  bool
	offered [][]byte // pages of the open batch
}

func newReducer(t testing.TB, slots uint32, pages uint64) *reducer {
	t.Helper()
	r := &reducer{Source: NewSource(SourceConfig{Store: int64(slots) * storePage})}
	if err := r.openStore(); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.in, err = newUnbatch(slots); err != nil {
		t.Fatal(err)
	}
	r.current = newBlock(pages, 0)
	r.batch = newBatch()
	return r
}

func (r *reducer) close() { r.closeStore(); r.in.close() }

func (r *reducer) add(page uint64, p []byte) {
	word := page<<storeBits | flagPage | flagContinue
	r.stream = append(binary.BigEndian.AppendUint64(r.stream, word), p...)
	before := len(r.batch.offered)
	r.reduce(word, nil, p, r.offers && r.current.see(page))
	if len(r.batch.offered) > before {
		r.offered = append(r.offered, p)
	}
}

// answer tells where what is offered of the open batch is found.
func (r *reducer) answer(origin func(i int) compress.Origin) {
	for i, p := range r.offered {
		r.batch.found = append(r.batch.found, origin(i))
		if r.batch.found[i] != compress.Nowhere {
			r.in.held = append(r.in.held, p...)
		}
	}
	r.offered = r.offered[:0]
}

// carry takes the open batch to the decoder.
func (r *reducer) carry(t interface{ Fatalf(string, ...any) }) {
	if len(r.stream) == 0 {
		return
	}
	r.batch.crc = crc32.Checksum(r.stream, castagnoli)
	got, err := r.in.decode(r.pipeline.press.seal(r.batch))
	if err != nil || !bytes.Equal(got, r.stream) {
		t.Fatalf("%d bytes became %d: %v", len(r.stream), len(got), err)
	}
	r.stream = r.stream[:0]
	r.batch.reset()
}

// check compares the stores of both sides and looks at the index.
func (r *reducer) check(t interface{ Fatalf(string, ...any) }) {
	x := r.index
	if x.filled != r.in.store.filled || x.filled > x.slots {
		t.Fatalf("%d slots are filled here, %d there, of %d", x.filled, r.in.store.filled, x.slots)
	}
	for slot := range x.filled {
		p := x.page(slot)
		if !bytes.Equal(p, r.in.store.page(slot)) {
			t.Fatalf("slot %d differs", slot)
		}
		if found, ok := x.find(x.tag(p), p); !ok || found != slot {
			t.Fatalf("slot %d is found as %d, %v", slot, found, ok)
		}
	}
	linked := uint32(0)
	for _, n := range x.chains {
		for ; n != 0; n = x.next[n-1] {
			linked++
		}
	}
	if linked != x.filled {
		t.Fatalf("%d slots are in chains, %d are filled", linked, x.filled)
	}
}

// The stores of both sides are equal after each batch, whatever is sent.
func TestStoresStayEqual(t *testing.T) {
	rapid.Check(t, func(t2 *rapid.T) {
		r := newReducer(t, uint32(rapid.IntRange(1, 12).Draw(t2, "slots")), 16)
		defer r.close()
		r.offers = rapid.Bool().Draw(t2, "offers")
		for range rapid.IntRange(1, 8).Draw(t2, "batches") {
			for range rapid.IntRange(0, 20).Draw(t2, "pages") {
				page := rapid.IntRange(0, 15).Draw(t2, "page")
				r.add(uint64(page), version(t2, page))
			}
			r.answer(func(int) compress.Origin {
				return compress.Origin(rapid.IntRange(0, 3).Draw(t2, "origin"))
			})
			r.carry(t2)
			r.check(t2)
		}
	})
}

func TestKinds(t *testing.T) {
	r := newReducer(t, 100, 100)
	defer r.close()
	changed := func(seed uint64, n int) []byte {
		p := content(seed)
		for i := range n {
			p[i*3]++
		}
		return p
	}
	expect := func(what string, zero, reference, delta, data uint64, held ...uint64) {
		t.Helper()
		r.carry(t)
		r.check(t)
		got := r.pipeline.press.counts
		r.pipeline.press.counts = Reduction{}
		want := append([]uint64{zero, reference, delta, data}, held...)
		for k, pages := range append(want, make([]uint64, int(kindOther)-len(want))...) {
			c := got.of(kind(k))
			if c.Pages != pages || c.StreamBytes != pages*(8+storePage) || (c.WireBytes == 0) != (pages == 0) {
				t.Errorf("%s: kind %d: %+v, want %d pages", what, k, *c, pages)
			}
		}
	}
	for i := range uint64(50) {
		r.add(i, content(i))
	}
	expect("new pages", 0, 0, 0, 50)
	for i := range uint64(50) {
		r.add(i, content(i))
	}
	expect("the same again", 0, 50, 0, 0)
	r.add(60, content(7))
	expect("known content elsewhere", 0, 1, 0, 0)
	r.add(60, changed(7, 10))
	expect("a copy changes", 0, 0, 1, 0)
	r.add(7, content(7))
	expect("the original is still known", 0, 1, 0, 0)
	for i := range uint64(50) {
		r.add(i, changed(i, int(i)))
	}
	expect("changes", 0, 1, 49, 0)
	if filled := r.index.filled; filled != 51 {
		t.Errorf("changed pages took %d slots, want the 51 they had", filled)
	}
	r.add(3, content(1000))
	expect("new content", 0, 0, 0, 1)

	r.offers = true
	for i := range uint64(8) {
		r.add(70+i, content(2000+i))
	}
	r.add(78, content(2001))
	r.answer(func(i int) compress.Origin { return compress.Origin(i % 4) })
	expect("offered", 0, 1, 0, 2, 2, 2, 2)
	r.add(71, changed(2001, 3))
	r.add(72, content(2005))
	expect("what was found is known", 0, 1, 1, 0)
}

// A store that is too small for the guest keeps what is of use.
func TestSecondChance(t *testing.T) {
	const hot = 8
	r := newReducer(t, 2*hot, 1000)
	defer r.close()
	for i := range uint64(900) {
		r.add(100+i, content(100+i))
		r.add(i%hot, content(i%hot))
		r.carry(t)
	}
	r.check(t)
	if c := r.pipeline.press.counts; c.Reference.Pages != 900-hot || c.Data.Pages != 900+hot {
		t.Errorf("%+v, want all but the first %d of the hot pages by reference", c, hot)
	}
}

func TestIndexIsCompact(t *testing.T) {
	for _, slots := range []uint32{1, 2, 1000, 1024, 65536, 100_001} {
		x := newIndex(&store{slots: slots})
		bytes := 4*(len(x.chains)+len(x.next)+len(x.tags)+len(x.owners)) + len(x.useful)
		if perPage := float64(bytes)/float64(slots) + 4 + 1./8; perPage > 25 {
			t.Errorf("%d slots: %.1f bytes a page", slots, perPage)
		}
	}
}
