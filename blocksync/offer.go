package blocksync

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/wanmig/wanmig/compress"
)

// offer is content that the source has told the fingerprints of. What of it is
// held lies in buf, read and compared, until the source has it applied: whatever
// is written meanwhile, these are the bytes that were meant.
type offer struct {
	unit    int64
	extents []extent
	sums    []compress.Fingerprint // of the units
	firsts  []compress.Fingerprint // of their first pages, if they are blocks
	found   []compress.Origin      // likewise
	same    []bool                 // likewise: found where it will stand
	buf     []byte                 // the units' content, one after the other
	pages   []compress.Fingerprint // of the pages in buf
	done    chan struct{}          // closed when the answer is sent
	err     error
}

// offers are those that the source has made and not had applied yet.
type offers struct {
	t    *Target
	open map[uint32]*offer
}

// take answers an offer beside what is received.
func (o *offers) take(ctx context.Context, acks frameWriter, body []byte) error {
	id, x, err := parseOffer(body, o.t.dev.Size())
	if err != nil {
		return err
	}
	if len(o.open) == maxOffers || o.open[id] != nil {
		return fmt.Errorf("%w: offer %d, with %d that are not applied", ErrFrame, id, len(o.open))
	}
	x.found, x.same, x.done = make([]compress.Origin, len(x.sums)), make([]bool, len(x.sums)), make(chan struct{})
	o.open[id] = x
	o.t.beside.Go(func() {
		defer close(x.done)
		o.t.look(ctx, x)
		if err := acks.Send(ctx, appendHeld(nil, id, x.found)); err != nil {
			x.err = fmt.Errorf("answer an offer: %w", err)
		}
	})
	return nil
}

// look finds what is held of an offer: at the same place of an older copy, then
// in all content. Single pages may be anywhere; a block is where its first page
// is, or is taken for several pages.
func (t *Target) look(ctx context.Context, x *offer) {
	if t.old {
		t.lookSame(ctx, x)
	}
	if x.unit == page {
		s := search{Content: t.have, sums: x.sums, found: x.found, buf: x.buf}
		s.run(ctx)
		x.buf, x.pages = s.buf, x.sums
		return
	}
	x.room()
	var g errgroup.Group
	g.SetLimit(reads)
	for i := range x.sums {
		if x.found[i] == compress.Nowhere {
			g.Go(func() error {
				x.found[i] = t.have.searchBlock(ctx, x.firsts[i], x.content(i), func() bool { return x.isUnit(i) })
				return nil
			})
		}
	}
	_ = g.Wait() // what can't be read is not found
}

// room is made for the content of all units.
func (x *offer) room() {
	if x.buf == nil {
		x.buf = make([]byte, int64(len(x.sums))*x.unit)
		x.pages = make([]compress.Fingerprint, len(x.buf)/page)
	}
}

// content is the room for unit i.
func (x *offer) content(i int) []byte { return x.buf[int64(i)*x.unit : int64(i+1)*x.unit] }

// isUnit fingerprints the pages of unit i, and reports whether that is the one that
// is offered.
func (x *offer) isUnit(i int) bool {
	pages := x.pages[int64(i)*x.unit/page : int64(i+1)*x.unit/page]
	sumPages(pages, x.content(i))
	if x.unit == page {
		return pages[0] == x.sums[i]
	}
	return compress.SumOf(pages) == x.sums[i]
}

// sumPages puts the fingerprints of the pages of p into sums.
func sumPages(sums []compress.Fingerprint, p []byte) {
	for i := range sums {
		sums[i] = compress.Sum(p[i*page : (i+1)*page])
	}
}

// lookSame reads the disk where the offer's units will stand.
func (t *Target) lookSame(ctx context.Context, x *offer) {
	x.room()
	var runs []extent
	unitsOf(x.extents, x.unit, func(u, _ int64) { runs = appendExtent(runs, extent{u * x.unit, x.unit}, maxContent) })
	i := 0
	for _, e := range runs {
		err := t.dev.ReadAt(ctx, x.buf[int64(i)*x.unit:][:e.length], e.offset)
		for range e.length / x.unit {
			// What can't be read is not held.
			if err == nil && x.isUnit(i) {
				x.found[i], x.same[i] = compress.OnOld, true
			}
			i++
		}
	}
}

// apply writes what is held of an offer.
func (o *offers) apply(w *writers, body []byte) error {
	id, err := parseApply(body)
	if err != nil {
		return err
	}
	x := o.open[id]
	if x == nil {
		return fmt.Errorf("%w: offer %d to be applied was not made", ErrFrame, id)
	}
	delete(o.open, id)
	<-x.done
	if x.err != nil {
		return x.err
	}
	var runs []extent // what is written together
	var from []int64  // where that is in buf
	i := int64(0)     // of the pages in buf
	unitsOf(x.extents, x.unit, func(u, _ int64) {
		where := x.found[i*page/x.unit]
		for p := u * x.unit / page; p < (u+1)*x.unit/page; p++ {
			if where != compress.Nowhere {
				o.t.have.index.Put(x.pages[i], o.t.place+compress.Place(p))
				o.t.held.Add(page)
			}
			switch n := len(runs); {
			case where == compress.Nowhere:
			case x.same[i*page/x.unit] && o.t.stale.get(p):
				// It stands there since before the move.
				o.t.stale.clear(p, p+1)
				o.t.skipped.Add(page)
				o.t.applied.Add(page)
			case n > 0 && runs[n-1].end() == p*page && from[n-1]+runs[n-1].length == i*page:
				runs[n-1].length += page
			default:
				runs, from = append(runs, extent{p * page, page}), append(from, i*page)
			}
			i++
		}
	})
	for i, e := range runs {
		o.t.write(w, e, x.buf[from[i]:][:e.length])
	}
	return nil
}
