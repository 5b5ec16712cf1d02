package blocksync

import (
	"context"
	"fmt"
	"time"

	"github.com/wanmig/wanmig/blocksync/nbd"
	"github.com/wanmig/wanmig/compress"
)

// segment is what is compared at once of the disks of both sides.
const segment = 1 << 20

// An Image is the source's disk as the guest sees it.
type Image interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
	Close() error
}

// verification compares a disk with its copy while both change. The source
// digests segments of its disk in the order of the stream, and the destination
// compares where their turn is. A segment that differs may have been written to
// and not been copied yet, so it is compared again; those that are left, or were
// written since, when the guest is stopped and nothing changes any more. Then
// they have to be the same.
type verification struct {
	touched    bitmap // segments that were written since their digest was taken
	agreed     bitmap // segments that the destination has found the same
	unanswered int64
	passes     int
	again      int64 // bytes that were compared after the seal
}

const (
	// fewSegments may be left for when the guest is stopped: 16 MiB are read in
	// some 10 ms.
	fewSegments = 16
	// maxPasses is how often that is waited for.
	maxPasses = 4
	// passInterval is the time between two passes.
	passInterval = time.Second
)

// check is the digest of a segment.
type check struct {
	segment int64
	sum     compress.Fingerprint
}

func segmentsIn(size int64) int64 { return (size + segment - 1) / segment }

// segmentAt is a segment of a disk of the given size.
func segmentAt(i, size int64) extent {
	return extent{i * segment, min(segment, size-i*segment)}
}

var zeroSegment = compress.Sum(make([]byte, segment))

// digest reads a segment. buf has room for it.
func digest(ctx context.Context, dev readerAt, e extent, buf []byte) (compress.Fingerprint, error) {
	if s, ok := dev.(interface {
		BlockStatus(ctx context.Context, off, n int64) ([]nbd.Extent, error)
	}); ok && e.length == segment {
		list, err := s.BlockStatus(ctx, e.offset, e.length)
		if err != nil {
			return compress.Fingerprint{}, err
		}
		if len(list) > 0 && list[0].Zero && list[0].Offset == e.offset && list[0].Length >= e.length {
			return zeroSegment, nil
		}
	}
	if err := dev.ReadAt(ctx, buf[:e.length], e.offset); err != nil {
		return compress.Fingerprint{}, err
	}
	return compress.Sum(buf[:e.length]), nil
}

// WillVerify makes the disk one that Verify has to compare before it is complete.
// It is called before Run.
func (o *Outbox) WillVerify() {
	n := segmentsIn(o.size)
	o.verify = &verification{touched: newBitmap(n), agreed: newBitmap(n)}
}

// Verify compares the disk that open gives with the destination's. It returns
// when it has, some time after the seal: what the destination finds then is its
// failure, or that it is durable.
func (o *Outbox) Verify(ctx context.Context, open func(context.Context) (Image, error)) error {
	buf := make([]byte, segment)
	for {
		sealed, err := o.awaitPass(ctx)
		if err == nil {
			err = o.pass(ctx, open, sealed, buf)
		}
		if err != nil {
			return err
		}
		o.mu.Lock()
		o.verify.passes++
		if sealed {
			o.pushBarrier(span{final: true})
		}
		o.mu.Unlock()
		if sealed {
			return nil
		}
	}
}

// awaitPass waits until the disk is covered, and then for the next pass, or the
// last.
func (o *Outbox) awaitPass(ctx context.Context) (sealed bool, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.bulk && !o.sealed {
		if o.err != nil {
			return false, o.err
		}
		if err := o.pause(ctx, nil); err != nil {
			return false, err
		}
	}
	if o.verify.passes == 0 {
		return o.sealed, nil
	}
	next := make(chan struct{})
	defer time.AfterFunc(passInterval, func() { close(next) }).Stop()
	for !o.sealed {
		select {
		case <-next:
			return false, nil
		default:
		}
		if o.err != nil {
			return false, o.err
		}
		if err := o.pause(ctx, next); err != nil {
			return false, err
		}
	}
	return true, nil
}

// pass digests the segments that are not agreed on.
func (o *Outbox) pass(ctx context.Context, open func(context.Context) (Image, error), last bool, buf []byte) (err error) {
	o.mu.Lock()
	n := segmentsIn(o.size)
	done := o.verify.agreed.nextClear(0, n) == n
	o.mu.Unlock()
	if done {
		return nil // to open an image takes time, and the guest may be stopped
	}
	img, err := open(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := img.Close(); err == nil {
			err = cerr
		}
	}()
	if img.Size() < o.size {
		return fmt.Errorf("the guest's disk has %d bytes, read as an image %d", o.size, img.Size())
	}
	v := o.verify
	for i := range n {
		o.mu.Lock()
		skip, end := v.agreed.get(i), o.sealed && !last
		if !skip {
			v.touched.clear(i, i+1)
		}
		o.mu.Unlock()
		if end {
			return nil
		}
		if skip {
			continue
		}
		e := segmentAt(i, o.size)
		sum, err := digest(ctx, img, e, buf)
		if err != nil {
			return fmt.Errorf("read %d bytes at %d of the guest's disk: %w", e.length, e.offset, err)
		}
		o.mu.Lock()
		if !v.touched.get(i) { // else it has changed while it was read
			o.order.pushSpan(span{check: &check{i, sum}, last: last})
			v.unanswered++
			o.change.broadcast()
		}
		if last {
			v.again += e.length
		}
		o.mu.Unlock()
	}
	return nil
}

// touch notes that bytes of the disk change. The mutex is held.
func (o *Outbox) touch(off, n int64) {
	if o.verify != nil {
		from, to := off/segment, segmentsIn(off+n)
		o.verify.touched.set(from, to)
		o.verify.agreed.clear(from, to)
	}
}

// compared takes the destination's answer to a check.
func (o *Outbox) compared(a ack) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	v := o.verify
	if v == nil || v.unanswered < int64(len(a.results)) {
		return fmt.Errorf("%w: an answer of %d to checks that were not asked for", ErrFrame, len(a.results))
	}
	v.unanswered -= int64(len(a.results))
	for _, r := range a.results {
		if r.segment >= segmentsIn(o.size) {
			return fmt.Errorf("%w: the answer to a check of segment %d of %d", ErrFrame, r.segment, segmentsIn(o.size))
		}
		if r.same && !v.touched.get(r.segment) {
			v.agreed.set(r.segment, r.segment+1)
		}
	}
	o.change.broadcast()
	return nil
}

// Verified tells that little is left to compare when the guest is stopped.
func (o *Outbox) Verified() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	v := o.verify
	if v == nil {
		return true
	}
	n := segmentsIn(o.size)
	return v.passes >= maxPasses || v.passes > 0 && n-v.agreed.count(n) <= fewSegments
}
