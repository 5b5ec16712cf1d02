package blocksync

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/wanmig/wanmig/blocksync/nbd"
)

// disk is a device in memory. It reports writes that overlap in time and place.
type disk struct {
	mu       sync.Mutex
	content  []byte
	running  []extent
	overlap  string
	writes   int
	flushes  int
	unsynced bool
	room     int64 // bytes that may still be written, when limited
	limited  bool
	spoil    int // the write, from 1, that changes a bit
}

func newDisk(size int64) *disk { return &disk{content: make([]byte, size)} }

func (d *disk) Size() int64 { return int64(len(d.content)) }

func (d *disk) ReadAt(ctx context.Context, p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(p, d.content[off:])
	return nil
}

func (d *disk) change(e extent, apply func(area []byte)) error {
	d.mu.Lock()
	for _, r := range d.running {
		if e.offset < r.end() && r.offset < e.end() {
			d.overlap = fmt.Sprintf("%v with %v", e, r)
		}
	}
	d.running = append(d.running, e)
	if d.limited && e.length > d.room {
		d.mu.Unlock()
		return fmt.Errorf("the disk's file: %w", syscall.ENOSPC)
	}
	d.room -= e.length
	d.mu.Unlock()
	runtime.Gosched()
	d.mu.Lock()
	defer d.mu.Unlock()
	apply(d.content[e.offset:e.end()])
	i := slices.Index(d.running, e)
	d.running = slices.Delete(d.running, i, i+1)
	d.unsynced = true
	return nil
}

func (d *disk) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	return d.change(extent{off, int64(len(p))}, func(area []byte) {
		copy(area, p)
		if d.writes++; d.writes == d.spoil {
			area[len(area)/2] ^= 4
		}
	})
}

func (d *disk) Zero(ctx context.Context, off, n int64, f nbd.ZeroFlags) error {
	if f.NoHole {
		return fmt.Errorf("NoHole makes a thin disk thick")
	}
	return d.change(extent{off, n}, func(area []byte) { clear(area); d.writes++ })
}

func (d *disk) Trim(ctx context.Context, off, n int64, fua bool) error {
	return fmt.Errorf("a target never trims")
}

func (d *disk) Flush(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.running) > 0 {
		d.overlap = "flush with a write"
	}
	d.flushes++
	d.unsynced = false
	return nil
}

// set writes as a guest does.
func (d *disk) set(p []byte, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.content[off:], p)
}

// openDisk is a disk that is read beside.
type openDisk struct{ *disk }

func (openDisk) Close() error { return nil }

// thinDisk is a disk that tells where it has zeros, in extents of odd sizes.
type thinDisk struct{ *disk }

func (d thinDisk) BlockStatus(ctx context.Context, off, n int64) ([]nbd.Extent, error) {
	var list []nbd.Extent
	d.mu.Lock()
	defer d.mu.Unlock()
	for end := off + n; off < end && len(list) < 3; {
		length := min(end-off, 7*sectorSize)
		zero := isZero(d.content[off : off+length])
		list = append(list, nbd.Extent{Offset: off, Length: length, Hole: zero, Zero: zero})
		off += length
	}
	return list, nil
}

// pipe is one direction of a channel.
type pipe struct {
	frames chan []byte
	tokens chan struct{} // when not nil, each Send takes one
	sent   [][]byte      // all frames, when kept
	keep   bool
	mu     sync.Mutex
}

func newPipe() *pipe { return &pipe{frames: make(chan []byte, 4)} }

func (p *pipe) Send(ctx context.Context, frame []byte) error {
	if p.tokens != nil {
		select {
		case <-p.tokens:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if p.keep {
		p.mu.Lock()
		p.sent = append(p.sent, bytes.Clone(frame))
		p.mu.Unlock()
	}
	select {
	case p.frames <- bytes.Clone(frame):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *pipe) Recv(ctx context.Context, buf []byte) ([]byte, error) {
	select {
	case frame, ok := <-p.frames:
		if !ok {
			return nil, io.EOF
		}
		return append(buf[:0], frame...), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// transfer is an outbox and a target, connected.
type transfer struct {
	outbox       *Outbox
	target       *Target
	budget       *Budget
	frames, acks *pipe
	cancel       context.CancelFunc
	ended        sync.WaitGroup
	sendErr      error
	targetErr    error
	open         func(context.Context) (Image, error) // when verified
	verifyErr    error
}

func newBudget(tb testing.TB, memory, spool int64) *Budget {
	tb.Helper()
	b, err := NewBudget(memory, tb.TempDir(), spool)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := b.Close(); err != nil {
			tb.Error(err)
		}
	})
	return b
}

func newOutbox(tb testing.TB, size int64, b *Budget) *Outbox {
	tb.Helper()
	o, err := NewOutbox(size, b)
	if err != nil {
		tb.Fatal(err)
	}
	return o
}

func newContent(tb testing.TB, size int64) *Content {
	tb.Helper()
	c, err := NewContent(size)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	})
	return c
}

func newTransfer(tb testing.TB, dev nbd.Device, b *Budget) *transfer {
	o := newOutbox(tb, dev.Size(), b)
	o.bulk = false // what is to be offered is up to the test
	return &transfer{
		outbox: o,
		target: NewTarget(dev, newContent(tb, dev.Size()), false),
		budget: b,
		frames: newPipe(),
		acks:   newPipe(),
	}
}

func (x *transfer) start(ctx context.Context) {
	ctx, x.cancel = context.WithCancel(ctx)
	if x.open != nil {
		x.ended.Go(func() { x.verifyErr = x.outbox.Verify(ctx, x.open) })
	}
	x.ended.Go(func() { x.sendErr = x.outbox.Run(ctx, x.frames, x.acks) })
	x.ended.Go(func() { x.targetErr = x.target.Run(ctx, x.frames, x.acks) })
}

// verify has the transfer compared, from its start on.
func (x *transfer) verify(open func(context.Context) (Image, error)) {
	x.outbox.WillVerify()
	x.open = open
}

// finish seals, waits and returns the first error.
func (x *transfer) finish() error {
	x.outbox.Seal()
	return x.wait()
}

func (x *transfer) wait() error {
	x.ended.Wait()
	x.cancel()
	if x.sendErr != nil {
		return fmt.Errorf("outbox: %w", x.sendErr)
	}
	if x.targetErr != nil {
		return fmt.Errorf("target: %w", x.targetErr)
	}
	return x.verifyErr
}

// settled checks what holds at the end of every good transfer.
func (x *transfer) settled() error {
	s := x.outbox.Stats()
	if s.Pending() != 0 || s.PendingZero != 0 {
		return fmt.Errorf("something still waits: %+v", s)
	}
	if s.Accepted != s.Coalesced+s.SentData+s.Held+s.SentZero {
		return fmt.Errorf("accepted is not coalesced and sent: %+v", s)
	}
	if s.Applied != s.SentData+s.Held+s.SentZero {
		return fmt.Errorf("applied is not sent: %+v", s)
	}
	var content, zeros int64
	for _, c := range s.Reduction.all() {
		content += c.Bytes
	}
	if zeros = s.Reduction.Zero.Bytes; zeros != s.SentZero || content-zeros != s.SentData+s.Held {
		return fmt.Errorf("reduction is not sent: %+v", s)
	}
	t := x.target.Stats()
	if t.Applied != s.Applied-s.Recalled || t.Applied != t.Written+t.Zeroed+t.Skipped || t.Held != s.Held-s.Recalled {
		return fmt.Errorf("target counted %+v, source %+v", t, s)
	}
	select {
	case <-x.target.Durable():
	default:
		return fmt.Errorf("durable is not closed")
	}
	if n := int64(len(x.budget.holes)); n != x.budget.next {
		return fmt.Errorf("%d of %d spool slots are free", n, x.budget.next)
	}
	return nil
}

// The compressor makes its states at first use, which must not be in one of
// synctest's bubbles.
func TestMain(m *testing.M) {
	coder.Encode(nil, make([]byte, 4096))
	m.Run()
}
