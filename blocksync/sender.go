package blocksync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"
)

const (
	// jobSize bounds the content of one data frame, and with it of one extent.
	// Adjacent content is compressed together: a root file system takes 6 % fewer
	// bytes in extents of 1 MiB than in extents of 256 KiB.
	jobSize = maxExtent
	// maxZeros bounds the extents of one zero frame.
	maxZeros = 4096
	// maxEncoders bounds the memory of a disk's pipeline: each encoder has a job
	// of at most 2 MiB, and two more wait.
	maxEncoders = 8
)

// job is what is sent together: content, then zeros, then a barrier. None of
// its extents overlap.
type job struct {
	taken   []taken
	content int64 // bytes in taken
	zeros   []extent
	barrier span

	raw       []byte
	extents   []extent // of raw, in its order
	dataFrame []byte
	zeroFrame []byte
	encoded   chan struct{} // receives when the frames are ready
}

// taken is a block that has left the outbox.
type taken struct {
	idx int64
	b   *block
}

// Run sends what the outbox accepts until the final barrier is durable at the
// destination, and answers for a failure there. It is called once; when it
// returns an error the outbox refuses everything.
func (o *Outbox) Run(ctx context.Context, frames frameWriter, acks frameReader) error {
	open := appendOpen(nil, o.size)
	err := frames.Send(ctx, open)
	if err == nil {
		o.mu.Lock()
		o.stats.Wire += int64(len(open))
		o.mu.Unlock()
		err = o.run(ctx, frames, acks)
	}
	if err != nil {
		o.fail(err)
	}
	return err
}

// run is the pipeline: the order of jobs is fixed when they are taken, and kept
// by the writer while several encoders work.
func (o *Outbox) run(ctx context.Context, frames frameWriter, acks frameReader) error {
	encoders := min(runtime.GOMAXPROCS(0), maxEncoders)
	depth := encoders + 2
	free, ordered, work := make(chan *job, depth), make(chan *job, depth), make(chan *job, depth)
	for range depth {
		free <- &job{encoded: make(chan struct{}, 1)}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(ordered)
		defer close(work)
		for {
			j, err := receive(ctx, free)
			if err != nil {
				return err
			}
			if err := o.take(ctx, j); err != nil {
				return err
			}
			final := j.barrier.final // j is another's once it is sent
			ordered <- j             // depth has room for every job
			work <- j
			if final {
				return nil
			}
		}
	})
	for range encoders {
		g.Go(func() error {
			for j := range work {
				if err := o.collect(j); err != nil {
					return err
				}
				j.encode()
				j.encoded <- struct{}{}
			}
			return nil
		})
	}
	g.Go(func() error {
		for j := range ordered {
			if _, err := receive(ctx, j.encoded); err != nil {
				return err
			}
			if err := o.send(ctx, frames, j); err != nil {
				return err
			}
			free <- j
		}
		return nil
	})
	g.Go(func() error { return o.readAcks(ctx, acks) })
	return g.Wait()
}

func receive[T any](ctx context.Context, ch <-chan T) (v T, err error) {
	select {
	case v = <-ch:
		return v, nil
	case <-ctx.Done():
		return v, context.Cause(ctx)
	}
}

// take fills j with the oldest of what waits, and waits for that.
func (o *Outbox) take(ctx context.Context, j *job) error {
	j.taken, j.zeros, j.content, j.barrier = j.taken[:0], j.zeros[:0], 0, span{}
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for o.takeNext(j) {
		}
		if len(j.taken) > 0 || len(j.zeros) > 0 || j.barrier.barrier != 0 {
			return nil
		}
		if err := o.pause(ctx, nil); err != nil {
			return err
		}
	}
}

// takeNext moves the next block, run of zeros or barrier to j, and reports
// whether j may take more.
func (o *Outbox) takeNext(j *job) bool {
	s := o.order.front()
	switch {
	case s == nil:
		return false
	case s.barrier != 0:
		j.barrier = *s
		o.order.pop()
		return false
	case s.from == s.to:
		o.order.pop()
		return true
	}
	if o.zeros.get(s.from) {
		if len(j.zeros) == maxZeros {
			return false
		}
		end := o.zeros.nextClear(s.from, s.to)
		n := o.bytes(s.from, end)
		j.zeros = appendExtent(j.zeros, extent{s.from * blockSize, n}, o.size)
		o.stats.PendingZero -= n
		o.zeros.clear(s.from, end)
		o.dirty.clear(s.from, end)
		s.from = end
		return true
	}
	b := o.blocks[s.from]
	n := b.size()
	if b.busy || j.content+n > jobSize {
		return false
	}
	j.taken = append(j.taken, taken{s.from, b})
	j.content += n
	*o.pending(b) -= n
	o.stats.InFlight += n
	delete(o.blocks, s.from)
	o.dirty.clear(s.from, s.from+1)
	s.from++
	if b.torn {
		o.change.broadcast() // its writer waits to store what is newer
	}
	return true
}

// appendExtent adds e, to the last extent when it continues that and both are
// within limit bytes.
func appendExtent(list []extent, e extent, limit int64) []extent {
	if n := len(list); n > 0 && list[n-1].end() == e.offset && list[n-1].length+e.length <= limit {
		list[n-1].length += e.length
		return list
	}
	return append(list, e)
}

// collect copies the content of j's blocks together and frees their room.
func (o *Outbox) collect(j *job) error {
	j.raw, j.extents = j.raw[:0], j.extents[:0]
	if j.raw == nil {
		j.raw = make([]byte, 0, jobSize)
	}
	for _, t := range j.taken {
		valid := t.b.sectors()
		for from := valid.nextSet(0, sectors); from < sectors; {
			to := valid.nextClear(from, sectors)
			n := int((to - from) * sectorSize)
			at := int(from * sectorSize)
			start := len(j.raw)
			j.raw = j.raw[:start+n]
			if t.b.buf != nil {
				copy(j.raw[start:], t.b.buf[at:])
			} else if err := o.budget.read(t.b.slot, at, j.raw[start:]); err != nil {
				return fmt.Errorf("%w: the disk's content is intact, but the move can't go on; check the file system of the spool", err)
			}
			j.extents = appendExtent(j.extents, extent{t.idx*blockSize + int64(at), int64(n)}, maxExtent)
			from = valid.nextSet(to, sectors)
		}
		if !t.b.torn {
			o.budget.release(t.b.buf, t.b.slot)
		}
	}
	clear(j.taken)
	return nil
}

// encode makes j's frames.
func (j *job) encode() {
	j.dataFrame, j.zeroFrame = j.dataFrame[:0], j.zeroFrame[:0]
	if len(j.extents) > 0 {
		j.dataFrame = append(j.dataFrame, frameData)
	}
	raw := j.raw
	for _, e := range j.extents {
		j.dataFrame = appendData(j.dataFrame, e.offset, raw[:e.length])
		raw = raw[e.length:]
	}
	if len(j.zeros) > 0 {
		j.zeroFrame = append(j.zeroFrame, frameZero)
	}
	for _, e := range j.zeros {
		j.zeroFrame = appendZero(j.zeroFrame, e)
	}
}

// send writes j's frames.
func (o *Outbox) send(ctx context.Context, frames frameWriter, j *job) error {
	var zeros, wire int64
	for _, e := range j.zeros {
		zeros += e.length
	}
	var barrier []byte
	if j.barrier.barrier != 0 {
		barrier = appendBarrier(nil, j.barrier.barrier, j.barrier.final)
	}
	for _, frame := range [][]byte{j.dataFrame, j.zeroFrame, barrier} {
		if len(frame) == 0 {
			continue
		}
		if err := frames.Send(ctx, frame); err != nil {
			return fmt.Errorf("send blocks: %w", err)
		}
		wire += int64(len(frame))
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stats.InFlight -= j.content
	o.stats.SentData += j.content
	o.stats.SentZero += zeros
	o.stats.Wire += wire
	return nil
}

// readAcks follows what the destination reports until the final barrier is
// durable.
func (o *Outbox) readAcks(ctx context.Context, acks frameReader) error {
	var buf []byte
	for {
		var err error
		if buf, err = acks.Recv(ctx, buf); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("wait for the destination: %w", err)
		}
		a, err := parseAck(buf)
		if err != nil {
			return err
		}
		if a.kind == ackFailure {
			return fmt.Errorf("destination: %s", a.text)
		}
		final, err := o.acknowledge(a)
		if err != nil || final {
			return err
		}
	}
}

// acknowledge takes progress and durable; final is true when everything is
// durable.
func (o *Outbox) acknowledge(a ack) (final bool, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if a.applied > uint64(o.stats.Applied) { // acks may overtake the count of what was sent
		o.stats.Applied = int64(min(a.applied, uint64(o.stats.Accepted)))
	}
	if a.kind != ackDurable {
		return false, nil
	}
	if a.id <= o.durable || a.id > o.barrier {
		return false, fmt.Errorf("%w: barrier %d is durable, asked for %d, confirmed %d", ErrFrame, a.id, o.barrier, o.durable)
	}
	o.durable = a.id
	o.change.broadcast()
	return o.sealed && a.id == o.barrier, nil
}
