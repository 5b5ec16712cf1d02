package blocksync

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/wanmig/wanmig/blocksync/nbd"
	"github.com/wanmig/wanmig/compress"
)

// Outbox is the disk that QEMU's mirror writes to on the source host. It keeps
// what is not sent yet and forgets the rest, so it can't be read. A block that
// is written again before it was sent is sent once. Errors carry the errno that
// the mirror sees.
//
// The source's disk is authoritative until ownership of the guest moves, so a
// flush is answered at once; the final barrier at the destination replaces it.
type Outbox struct {
	size    int64
	budget  *Budget
	encoder *compress.Encoder

	mu       sync.Mutex
	change   signal           // of anything below that a writer or the sender waits for
	blocks   map[int64]*block // dirty and not all zero
	dirty    bitmap           // in order, not taken by the sender
	zeros    bitmap           // dirty, and all zero
	sent     bitmap           // taken by the sender at some time
	order    queue
	verify   *verification // nil if nothing is compared
	strict   bool
	sealed   bool
	bulkRoom int64       // that may wait while it is bulk
	bulk     bool        // what was written before Covered is not all taken yet
	above    int64       // offerAbove
	image    *image      // the sender's
	alike    atomic.Bool // the destination has content that may be alike in blocks
	err      error       // why nothing is accepted any more

	barrier uint64 // the last one asked for
	durable uint64 // the last one the destination has confirmed
	stats   Stats
}

// block is the content of a dirty block: buf in memory, else slot of the spool.
type block struct {
	valid [sectors / 64]uint64 // a bitmap of the sectors that have content
	buf   *buffer
	slot  int64
	busy  bool // a writer has the spool slot, outside of the mutex
	torn  bool // a write to the spool slot did not succeed
}

func (b *block) sectors() bitmap { return b.valid[:] }

// Stats counts bytes of one disk. Blocks that wait as zeros occupy no memory
// and almost no link; they are counted apart from content.
type Stats struct {
	Size          int64
	Accepted      int64 // taken from the mirror, zeros included
	Coalesced     int64 // the part of it that was replaced before it was sent
	PendingMemory int64 // content that waits in memory
	PendingSpool  int64 // content that waits in the spool file
	PendingZero   int64 // zeros that wait
	InFlight      int64 // content taken to be encoded and sent
	SentData      int64 // content sent, before compression
	Held          int64 // content that the destination had already
	Recalled      int64 // the part of it that the destination was not asked for
	SentZero      int64 // zeros sent
	Wire          int64 // bytes of all frames sent
	Reduction     Reduction
	Applied       int64 // of SentData, Held and SentZero, written at the destination
	Verified      int64 // bytes that were found the same at the destination, and not written since
	VerifiedLast  int64 // bytes that were compared after the seal
	SpoolProblem  error // why the spool file is smaller than it was allowed to be
}

// Pending is the content that is not sent yet.
func (s Stats) Pending() int64 { return s.PendingMemory + s.PendingSpool + s.InFlight }

// NewOutbox makes the mirror target for a disk of size bytes, a multiple of 512.
func NewOutbox(size int64, b *Budget) (*Outbox, error) {
	if size <= 0 || size%sectorSize != 0 {
		return nil, fmt.Errorf("disk size %d is not a multiple of %d bytes", size, sectorSize)
	}
	n := (size + blockSize - 1) / blockSize
	return &Outbox{
		size:     size,
		budget:   b,
		encoder:  compress.NewEncoder(float64(workers())),
		blocks:   make(map[int64]*block),
		dirty:    newBitmap(n),
		zeros:    newBitmap(n),
		sent:     newBitmap(n),
		bulk:     true,
		bulkRoom: bulkRoom,
		above:    offerAbove,
	}, nil
}

// Size returns the size of the disk in bytes.
func (o *Outbox) Size() int64 { return o.size }

// BlockSizes gives the bounds of a request: sectors, and blocks preferred.
func (o *Outbox) BlockSizes() (min, preferred, max uint32) {
	return sectorSize, blockSize, 32 << 20
}

// MultiConn tells that a flush covers the writes of all connections.
func (o *Outbox) MultiConn() bool { return true }

// Stats returns the counters of this moment.
func (o *Outbox) Stats() Stats {
	problem := o.budget.Problem()
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.stats
	s.Size, s.SpoolProblem = o.size, problem
	s.Applied += s.Recalled
	if v := o.verify; v != nil {
		s.Verified, s.VerifiedLast = min(v.agreed.count(segmentsIn(o.size))*segment, o.size), v.again
	}
	return s
}

// Strict makes each Flush, and each write with FUA, wait until everything
// before it is durable at the destination.
func (o *Outbox) Strict(on bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.strict = on
}

// Covered tells that every part of the disk was written here at least once: what
// of an older copy at the destination was not mentioned by now will not be. It
// is cleared while the guest runs.
func (o *Outbox) Covered() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.sealed {
		o.pushBarrier(span{covered: true})
	}
}

// Seal ends the input: later writes are refused, also those that wait for room,
// and Run returns when the destination has made everything durable.
func (o *Outbox) Seal() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sealed {
		return
	}
	o.sealed = true
	o.encoder.Hurry(true)
	if o.verify == nil {
		o.pushBarrier(span{final: true})
	} // else Verify has something to send before
	o.change.broadcast()
}

func (o *Outbox) pushBarrier(s span) {
	o.barrier++
	s.barrier = o.barrier
	o.order.pushSpan(s)
	o.change.broadcast()
}

// fail refuses everything from now on.
func (o *Outbox) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return
	}
	o.err = fmt.Errorf("%w: this disk is no longer sent: %w", syscall.EIO, err)
	o.change.broadcast()
}

// closed returns why nothing is accepted any more, or nil.
func (o *Outbox) closed() error {
	if o.err != nil {
		return o.err
	}
	if o.sealed {
		return fmt.Errorf("%w: the disk is complete and sealed", syscall.ESHUTDOWN)
	}
	return nil
}

func (o *Outbox) check(off, n int64) error {
	if off < 0 || n < 0 || off > o.size || n > o.size-off {
		return fmt.Errorf("%w: %d bytes at %d of a disk of %d", syscall.EINVAL, n, off, o.size)
	}
	if off%sectorSize != 0 || n%sectorSize != 0 {
		return fmt.Errorf("%w: %d bytes at %d are not aligned to %d", syscall.EINVAL, n, off, sectorSize)
	}
	return nil
}

// WriteAt accepts p. It waits only when neither memory nor spool has room.
func (o *Outbox) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if err := o.check(off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		idx, at := off/blockSize, int(off%blockSize)
		n := min(blockSize-at, len(p))
		var err error
		if whole := at == 0 && int64(n) == o.bytes(idx, idx+1); whole && isZero(p[:n]) {
			err = o.putZeros(ctx, idx, idx+1)
		} else {
			err = o.put(ctx, idx, at, p[:n])
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	if fua {
		return o.Flush(ctx)
	}
	return nil
}

// Zero accepts zeros. They take no memory, but for the blocks at both ends that
// are not covered whole. Whether they become holes is the destination's choice.
func (o *Outbox) Zero(ctx context.Context, off, n int64, f nbd.ZeroFlags) error {
	if err := o.check(off, n); err != nil {
		return err
	}
	end := off + n
	from, to := (off+blockSize-1)/blockSize, end/blockSize
	if end == o.size {
		to = (end + blockSize - 1) / blockSize
	}
	if from < to {
		if err := o.WriteAt(ctx, zeroBlock[:from*blockSize-off], off, false); err != nil {
			return err
		}
		if err := o.putZeros(ctx, from, to); err != nil {
			return err
		}
		off = min(to*blockSize, end)
	}
	for off < end { // at most the tail, or both parts of what lies across two blocks
		part := min(end-off, blockSize)
		if err := o.WriteAt(ctx, zeroBlock[:part], off, false); err != nil {
			return err
		}
		off += part
	}
	if f.FUA {
		return o.Flush(ctx)
	}
	return nil
}

// Trim accepts zeros: what is left of trimmed content is anybody's guess, and
// zeros are the same on both sides.
func (o *Outbox) Trim(ctx context.Context, off, n int64, fua bool) error {
	return o.Zero(ctx, off, n, nbd.ZeroFlags{FUA: fua})
}

// Flush returns at once, or, when strict, after all before it is durable at the
// destination.
func (o *Outbox) Flush(ctx context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.strict {
		return o.err
	}
	if !o.sealed && o.err == nil {
		o.pushBarrier(span{})
	}
	for id := o.barrier; o.durable < id; {
		if o.err != nil {
			return o.err
		}
		if err := o.pause(ctx, nil); err != nil {
			return err
		}
	}
	return nil
}

// Settle asks the destination to make durable what was written here until now, and
// returns a function that reports whether it has, or the outbox has ended: what is
// left for the final barrier is then little.
func (o *Outbox) Settle() (settled func() bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.sealed && o.err == nil {
		o.pushBarrier(span{})
	}
	id := o.barrier
	return func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.durable >= id || o.sealed || o.err != nil
	}
}

// pause waits, with the mutex released, for a change of the outbox, or of the
// budget when it is given the channel for that.
func (o *Outbox) pause(ctx context.Context, room <-chan struct{}) error {
	change := o.change.wait()
	o.mu.Unlock()
	defer o.mu.Lock()
	select {
	case <-change:
	case <-room:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// ReadAt returns content that is still here. QEMU's mirror never reads its
// target.
func (o *Outbox) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := o.check(off, int64(len(p))); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(p) > 0 {
		idx, at := off/blockSize, int(off%blockSize)
		n := min(blockSize-at, len(p))
		b := o.blocks[idx]
		switch {
		case b == nil && o.zeros.get(idx):
			clear(p[:n])
		case b == nil || !b.has(at, n):
			return fmt.Errorf("%w: %d bytes at %d: a mirror target holds only what waits to be sent", syscall.EPERM, n, off)
		case b.busy:
			if err := o.pause(ctx, nil); err != nil {
				return err
			}
			continue
		case b.buf != nil:
			copy(p[:n], b.buf[at:])
		default:
			if err := o.budget.read(b.slot, at, p[:n]); err != nil {
				return fmt.Errorf("%w: %w", syscall.EIO, err)
			}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (b *block) has(at, n int) bool {
	from, to := int64(at/sectorSize), int64((at+n)/sectorSize)
	return b.sectors().nextClear(from, to) == to
}

// bytes returns how much of the disk lies in a range of blocks.
func (o *Outbox) bytes(from, to int64) int64 {
	return min(to*blockSize, o.size) - from*blockSize
}

var zeroBlock buffer

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), blockSize)
		if !bytes.Equal(p[:n], zeroBlock[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

var _ nbd.Device = (*Outbox)(nil)
