package blocksync

import (
	"context"
	"fmt"

	"github.com/wanmig/wanmig/compress"
)

// offer is content that the source has told the fingerprints of. What of it is
// held lies in buf, read and compared, until the source has it applied: whatever
// is written meanwhile, these are the bytes that were meant.
type offer struct {
	extents []extent
	sums    []compress.Fingerprint
	held    []bool
	buf     []byte
	done    chan struct{} // closed when the answer is sent
	err     error
}

// offers are those that the source has made and not had applied yet.
type offers struct {
	t    *Target
	open map[uint32]*offer
}

// take answers an offer beside what is received.
func (o *offers) take(ctx context.Context, acks frameWriter, body []byte) error {
	id, list, _, sums, err := parseOffer(body, o.t.dev.Size())
	if err != nil {
		return err
	}
	if len(o.open) == maxOffers || o.open[id] != nil {
		return fmt.Errorf("%w: offer %d, with %d that are not applied", ErrFrame, id, len(o.open))
	}
	x := &offer{extents: list, sums: sums, held: make([]bool, len(sums)), done: make(chan struct{})}
	o.open[id] = x
	o.t.beside.Go(func() {
		defer close(x.done)
		search := search{Content: o.t.have, sums: x.sums, held: x.held}
		search.run(ctx)
		x.buf = search.buf
		if err := acks.Send(ctx, appendHeld(nil, id, x.held)); err != nil {
			x.err = fmt.Errorf("answer an offer: %w", err)
		}
	})
	return nil
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
	var runs []extent // what is held together
	var from []int
	i := 0
	pagesOf(x.extents, func(p, _ int64) {
		o.t.have.index.Put(x.sums[i], o.t.place+compress.Place(p)) // what is not held follows
		if x.held[i] {
			if n := len(runs); n > 0 && runs[n-1].end() == p*page && from[n-1]+int(runs[n-1].length/page) == i {
				runs[n-1].length += page
			} else {
				runs, from = append(runs, extent{p * page, page}), append(from, i)
			}
		}
		i++
	})
	for i, e := range runs {
		o.t.write(w, e, x.buf[from[i]*page:][:e.length])
		o.t.held.Add(e.length)
	}
	return nil
}
