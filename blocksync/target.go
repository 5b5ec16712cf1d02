package blocksync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/wanmig/wanmig/blocksync/nbd"
	"github.com/wanmig/wanmig/compress"
	"github.com/wanmig/wanmig/faults"
)

// page is the smallest hole that a file system makes, and the unit in which a
// target remembers zeros: 32 KiB for each GiB of the disk.
const page = compress.PageSize

// progressInterval is how often the source learns what was applied.
const progressInterval = 200 * time.Millisecond

// flushInterval is how often the disk is flushed before its barriers.
const flushInterval = 500 * time.Millisecond

// Target writes a disk at the destination.
type Target struct {
	dev     nbd.Device
	have    *Content
	place   compress.Place // of the disk's first page in have
	known   bitmap         // pages that read as zeros
	old     bool           // the disk has older content
	stale   bitmap         // pages of that which nothing was said of but that they are zeros
	compare *comparison    // nil if nothing is compared
	durable chan struct{}
	beside  sync.WaitGroup

	applied, written, zeroed, skipped, held atomic.Int64
}

// TargetStats counts bytes of one disk at the destination.
type TargetStats struct {
	Size    int64
	Applied int64 // of the source's content and zeros, done: the sum of the next three
	Written int64 // written as content
	Zeroed  int64 // asked of the device as zeros
	Skipped int64 // what the disk had there already
	Held    int64 // of Written and Skipped, content that did not cross
}

// NewTarget makes the receiver for a disk of a move, whose other disks have the
// same content. When dev tells its block status, zeros are not written where it
// has zeros, so that a thin disk stays thin. An old disk has an earlier state of
// the source's disk: what is the same there does not cross, and what the source
// does not mention becomes zeros, as it is on a new disk.
func NewTarget(dev nbd.Device, have *Content, old bool) *Target {
	t := &Target{
		dev:     dev,
		have:    have,
		place:   have.add(dev),
		known:   newBitmap(pagesIn(dev.Size())),
		old:     old,
		stale:   newBitmap(pagesIn(dev.Size())),
		durable: make(chan struct{}),
	}
	if old {
		t.stale.set(0, pagesIn(dev.Size()))
	}
	return t
}

// pagesIn returns how many pages a disk has, the last of which may be a part.
func pagesIn(size int64) int64 { return (size + page - 1) / page }

// Durable is closed when the whole disk is on stable storage.
func (t *Target) Durable() <-chan struct{} { return t.durable }

// Stats returns the counters of this moment.
func (t *Target) Stats() TargetStats {
	return TargetStats{
		Size:    t.dev.Size(),
		Applied: t.applied.Load(),
		Written: t.written.Load(),
		Zeroed:  t.zeroed.Load(),
		Skipped: t.skipped.Load(),
		Held:    t.held.Load(),
	}
}

// Run applies frames until the final barrier is durable. It returns any other
// end as an error, and has told it to the source then.
func (t *Target) Run(ctx context.Context, frames frameReader, acks frameWriter) error {
	err := t.run(ctx, frames, acks)
	if err != nil && ctx.Err() == nil {
		// When the source can't be told, the channel's end tells it.
		_ = acks.Send(ctx, appendFailure(nil, explain(err)))
	}
	return err
}

// explain adds what an operator may do.
func explain(err error) string {
	if errors.Is(err, syscall.ENOSPC) {
		return err.Error() + ": free space on the destination's storage and start the move again"
	}
	return err.Error()
}

func (t *Target) run(ctx context.Context, frames frameReader, acks frameWriter) error {
	buf, err := frames.Recv(ctx, nil)
	if err != nil {
		return fmt.Errorf("receive open: %w", err)
	}
	size, verify, err := parseOpen(buf)
	if err != nil {
		return err
	}
	if size != uint64(t.dev.Size()) {
		return fmt.Errorf("%w: the source's disk has %d bytes, the destination's %d", ErrFrame, size, t.dev.Size())
	}
	if verify {
		t.compare = &comparison{same: newBitmap(segmentsIn(t.dev.Size()))}
	}
	if err := t.learnZeros(ctx); err != nil {
		return err
	}
	// With nothing but this move's own content blocks are not worth the question.
	blocks := t.old || len(t.have.allSeeds()) > 0
	if err := acks.Send(ctx, appendReady(nil, blocks)); err != nil {
		return fmt.Errorf("answer open: %w", err)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	t.beside.Go(func() {
		if err := t.report(ctx, acks); err != nil {
			cancel(fmt.Errorf("report progress: %w", err))
		}
	})
	t.beside.Go(func() {
		if err := t.flushOften(ctx); err != nil {
			cancel(fmt.Errorf("flush: %w", err))
		}
	})
	w := newWriters(ctx, cancel)
	err = t.receive(ctx, frames, acks, w, buf)
	if failed := w.wait(); failed != nil {
		err = failed
	} else if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	cancel(nil)
	t.beside.Wait()
	return err
}

// learnZeros asks the device where it has zeros: everywhere on a new disk.
func (t *Target) learnZeros(ctx context.Context) error {
	dev, ok := t.dev.(interface {
		BlockStatus(ctx context.Context, off, n int64) ([]nbd.Extent, error)
	})
	if !ok {
		return nil
	}
	const step = 1 << 30
	size := t.dev.Size()
	var zeros extent // adjacent ones, together
	for off := int64(0); off < size; {
		list, err := dev.BlockStatus(ctx, off, min(step, size-off))
		if err != nil {
			return fmt.Errorf("look for zeros on the new disk: %w", err)
		}
		start := off
		for _, e := range list {
			if e.Offset != off || e.Length <= 0 || e.Length > size-off {
				return fmt.Errorf("block status at %d: extent of %d bytes at %d", off, e.Length, e.Offset)
			}
			if e.Zero {
				if zeros.end() != off {
					zeros = extent{offset: off}
				}
				zeros.length += e.Length
				t.remember(zeros)
			}
			off += e.Length
		}
		if off == start {
			return fmt.Errorf("block status at %d: no extent", off)
		}
	}
	return nil
}

// remember marks the pages that lie wholly in e as zeros.
func (t *Target) remember(e extent) {
	from, to := (e.offset+page-1)/page, e.end()/page
	if e.end() == t.dev.Size() {
		to = (e.end() + page - 1) / page
	}
	t.known.set(from, to)
	t.stale.clear(from, to)
}

// report tells the source now and then how far the disk is.
func (t *Target) report(ctx context.Context, acks frameWriter) error {
	return whenGrown(ctx, progressInterval, t.applied.Load, func(applied int64) error {
		return acks.Send(ctx, appendProgress(nil, uint64(applied)))
	})
}

// flushOften keeps little unwritten in the destination's page cache: the final
// barrier, for which the guest waits, then has little to do.
func (t *Target) flushOften(ctx context.Context) error {
	written := func() int64 { return t.written.Load() + t.zeroed.Load() }
	return whenGrown(ctx, flushInterval, written, func(int64) error { return t.dev.Flush(ctx) })
}

// whenGrown calls do with a count that has changed, at most once an interval,
// until ctx ends.
func whenGrown(ctx context.Context, interval time.Duration, count func() int64, do func(int64) error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var last int64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := count()
		if now == last {
			continue
		}
		last = now
		if err := do(now); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// receive takes frames until the final barrier.
func (t *Target) receive(ctx context.Context, frames frameReader, acks frameWriter, w *writers, buf []byte) error {
	offers := &offers{t: t, open: map[uint32]*offer{}}
	var d data
	for {
		var err error
		if buf, err = frames.Recv(ctx, buf); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("receive blocks: %w", err)
		}
		if len(buf) < 2 || len(buf) > maxFrame {
			return fmt.Errorf("%w: %d bytes", ErrFrame, len(buf))
		}
		body := buf[1:]
		switch buf[0] {
		case frameData:
			err = t.data(w, &d, body)
		case frameOffer:
			err = offers.take(ctx, acks, body)
		case frameApply:
			err = offers.apply(w, body)
		case frameZero:
			err = t.zero(w, body)
		case frameCheck:
			err = t.check(ctx, acks, w, body)
		case frameBarrier:
			var id uint64
			var final bool
			if id, final, err = parseBarrier(body); err != nil {
				return err
			}
			if err := t.barrier(ctx, w, acks, id, final); err != nil || final {
				return err
			}
		default:
			err = fmt.Errorf("%w: type %d from the source", ErrFrame, buf[0])
		}
		if err != nil {
			return err
		}
	}
}

// barrier makes everything before it durable and says so.
func (t *Target) barrier(ctx context.Context, w *writers, acks frameWriter, id uint64, final bool) error {
	t.wipe(w, 0, pagesIn(t.dev.Size()))
	if err := w.wait(); err != nil {
		return err
	}
	if final {
		if err := t.compared(); err != nil {
			return err
		}
	}
	if err := t.dev.Flush(ctx); err != nil {
		return err
	}
	if final {
		close(t.durable)
	}
	if err := acks.Send(ctx, appendDurable(nil, id, uint64(t.applied.Load()))); err != nil {
		return fmt.Errorf("confirm barrier: %w", err)
	}
	return nil
}

// data is what a data frame is decoded to.
type data struct {
	extents []extent
	content []byte
}

// data applies a data frame.
func (t *Target) data(w *writers, d *data, body []byte) error {
	list, n, method, payload, err := parseData(d.extents[:0], body, t.dev.Size())
	if err != nil {
		return err
	}
	d.extents = list
	if d.content, err = compress.Decode(d.content[:0], method, payload, int(n)); err != nil {
		return fmt.Errorf("%w: %d bytes at %d: %w", ErrFrame, n, list[0].offset, err)
	}
	content := d.content
	unitsOf(list, page, func(p, at int64) {
		t.have.index.Put(compress.Sum(content[at:at+page]), t.place+compress.Place(p))
	})
	for _, e := range list {
		t.write(w, e, content[:e.length])
		content = content[e.length:]
	}
	return nil
}

// write writes content to an extent, but for zeros where the disk has zeros.
func (t *Target) write(w *writers, where extent, content []byte) {
	first, last := where.offset/page, (where.end()-1)/page
	if where.offset%page != 0 {
		t.wipe(w, first, first+1)
	}
	if where.end()%page != 0 && where.end() != t.dev.Size() {
		t.wipe(w, last, last+1)
	}
	t.stale.clear(first, last+1)
	buf := w.begin(where)
	t.changed(where)
	*buf = append((*buf)[:0], content...)
	pieces := t.pieces(where, *buf)
	w.run(where, buf, func() error {
		for _, p := range pieces {
			if err := faults.Err("disk-write"); err != nil {
				return err
			}
			if err := t.dev.WriteAt(w.ctx, (*buf)[p.offset-where.offset:p.end()-where.offset], p.offset, false); err != nil {
				return err // names the disk, the request and where
			}
			t.written.Add(p.length)
			t.applied.Add(p.length)
		}
		return nil
	})
}

// wipe makes zeros of what is stale in a range of pages.
func (t *Target) wipe(w *writers, from, to int64) {
	for from = t.stale.nextSet(from, to); from < to; from = t.stale.nextSet(from, to) {
		end := min(t.stale.nextClear(from, to), from+maxZero/page)
		e := extent{from * page, min(end*page, t.dev.Size()) - from*page}
		buf := w.begin(e)
		t.changed(e)
		t.remember(e)
		w.run(e, buf, func() error { return t.dev.Zero(w.ctx, e.offset, e.length, nbd.ZeroFlags{}) })
		from = end
	}
}

// pieces returns what of content must be written: all but pages of zeros where
// the disk has zeros already.
func (t *Target) pieces(where extent, content []byte) []extent {
	var list []extent
	for off := where.offset; off < where.end(); {
		end := min((off/page+1)*page, where.end())
		if t.known.get(off/page) && isZero(content[off-where.offset:end-where.offset]) {
			t.skipped.Add(end - off)
			t.applied.Add(end - off)
		} else {
			t.known.clear(off/page, off/page+1)
			list = appendExtent(list, extent{off, end - off}, maxContent)
		}
		off = end
	}
	return list
}

// maxZero bounds one request for zeros, which some devices write out.
const maxZero = 256 << 20

// zero applies a zero frame.
func (t *Target) zero(w *writers, body []byte) error {
	for len(body) > 0 {
		e, rest, err := nextZero(body, t.dev.Size())
		if err != nil {
			return err
		}
		body = rest
		for e.length > 0 {
			first, last := e.offset/page, (e.end()+page-1)/page
			if end := min(max(t.known.nextClear(first, last), t.stale.nextClear(first, last))*page, e.end()); end > e.offset {
				t.skipped.Add(end - e.offset)
				t.applied.Add(end - e.offset)
				e = extent{end, e.end() - end}
				continue
			}
			end := min(t.known.nextSet(first, last)*page, t.stale.nextSet(first, last)*page, e.end(), e.offset+maxZero)
			t.fill(w, extent{e.offset, end - e.offset})
			e = extent{end, e.end() - end}
		}
	}
	return nil
}

// fill asks the device for zeros, and for holes where it can.
func (t *Target) fill(w *writers, e extent) {
	buf := w.begin(e)
	t.changed(e)
	t.remember(e)
	w.run(e, buf, func() error {
		if err := t.dev.Zero(w.ctx, e.offset, e.length, nbd.ZeroFlags{}); err != nil {
			return err
		}
		t.zeroed.Add(e.length)
		t.applied.Add(e.length)
		return nil
	})
}
