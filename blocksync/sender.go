package blocksync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
)

const (
	// jobSize bounds the content of one data frame, and with it of one extent.
	// Adjacent content is compressed together: a root file system takes 6 % fewer
	// bytes in extents of 1 MiB than in extents of 256 KiB.
	jobSize = maxContent
	// maxZeros bounds the extents of one zero frame.
	maxZeros = 4096
	// maxEncoders is how many jobs of a disk are fingerprinted or encoded at once.
	maxEncoders = 8
	// offerAbove is how much has to wait for what is sent to be offered: the answer
	// takes a round trip, for which a guest that is stopped would wait.
	offerAbove = 4 << 20
)

// job is what is sent together: content, then zeros, then a barrier. None of
// its extents overlap.
type job struct {
	taken   []taken
	content int64 // bytes in taken
	zeros   []extent
	barrier span

	offered bool
	id      uint32 // of its offer
	held    []byte // the destination's answer

	raw        []byte
	extents    []extent // of raw, in its order
	missing    []extent // of raw, what the destination does not hold
	offerFrame []byte
	dataFrame  []byte
	zeroFrame  []byte
	collected  chan struct{} // receives when raw and the offer are ready
	encoded    chan struct{} // receives when the other frames are ready
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
	err := o.sendFrame(ctx, frames, appendOpen(nil, o.size))
	if err == nil {
		err = o.run(ctx, frames, acks)
	}
	if err != nil {
		o.fail(err)
	}
	return err
}

// run is the pipeline: the order of jobs is fixed when they are taken, and kept
// by the two that send while several workers fingerprint and encode. Up to
// maxOffers jobs wait for the destination's answer.
func (o *Outbox) run(ctx context.Context, frames frameWriter, acks frameReader) error {
	workers := min(runtime.GOMAXPROCS(0), maxEncoders)
	const depth = maxOffers
	free, order, ordered := make(chan *job, depth), make(chan *job, depth), make(chan *job, depth)
	collect, encode, sent := make(chan *job, depth), make(chan *job, depth), make(chan struct{})
	for i := range depth { // every channel has room for every job
		free <- &job{id: uint32(i), collected: make(chan struct{}, 1), encoded: make(chan struct{}, 1)}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(order)
		for {
			j, err := receive(ctx, free)
			if err != nil {
				return err
			}
			if err := o.take(ctx, j); err != nil {
				return err
			}
			final := j.barrier.final // j is another's once it is sent
			order <- j
			collect <- j
			if final {
				return nil
			}
		}
	})
	for range workers {
		g.Go(func() error { return o.work(ctx, collect, encode, sent) })
	}
	waiting := &waiting{jobs: map[uint32]*job{}}
	g.Go(func() error {
		defer close(ordered)
		for j := range order {
			if _, err := receive(ctx, j.collected); err != nil {
				return err
			}
			ordered <- j
			if !j.offered {
				encode <- j
				continue
			}
			waiting.add(j)
			if err := o.sendFrame(ctx, frames, j.offerFrame); err != nil {
				return err
			}
		}
		return nil
	})
	g.Go(func() error {
		defer close(sent)
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
	g.Go(func() error {
		return o.readAcks(ctx, acks, func(a ack) error {
			j, err := waiting.answered(a)
			if err == nil {
				encode <- j
			}
			return err
		})
	})
	return g.Wait()
}

// work fingerprints and encodes jobs until all are sent.
func (o *Outbox) work(ctx context.Context, collect, encode <-chan *job, sent <-chan struct{}) error {
	for {
		select {
		case j := <-collect:
			if err := o.collect(j); err != nil {
				return err
			}
			if j.offered {
				j.offerFrame = appendOffer(j.offerFrame[:0], j.id, j.extents, j.raw)
			}
			j.collected <- struct{}{}
		case j := <-encode:
			j.encode()
			j.encoded <- struct{}{}
		case <-sent:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// waiting are the jobs that were offered and not answered.
type waiting struct {
	mu   sync.Mutex
	jobs map[uint32]*job
}

func (w *waiting) add(j *job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.jobs[j.id] = j
}

// answered takes the job of an answer out.
func (w *waiting) answered(a ack) (*job, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	j := w.jobs[uint32(a.id)]
	if j == nil {
		return nil, fmt.Errorf("%w: an answer to offer %d, which was not made", ErrFrame, a.id)
	}
	pages := 0
	pagesOf(j.extents, func(_, _ int64) { pages++ })
	if len(a.held) != (pages+7)/8 {
		return nil, fmt.Errorf("%w: %d bytes of answer to an offer of %d pages", ErrFrame, len(a.held), pages)
	}
	delete(w.jobs, j.id)
	j.held = append(j.held[:0], a.held...)
	return j, nil
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
	j.offered, j.held = false, j.held[:0]
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		waits := o.stats.PendingMemory + o.stats.PendingSpool
		for o.takeNext(j) {
		}
		for _, t := range j.taken { // what is sent again is hardly anywhere
			if o.sent.set(t.idx, t.idx+1) > 0 && waits >= o.above && !o.sealed {
				j.offered = true
			}
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
			j.extents = appendExtent(j.extents, extent{t.idx*blockSize + int64(at), int64(n)}, maxContent)
			from = valid.nextSet(to, sectors)
		}
		if !t.b.torn {
			o.budget.release(t.b.buf, t.b.slot)
		}
	}
	clear(j.taken)
	return nil
}

// encode makes the frames of what the destination does not hold of j.
func (j *job) encode() {
	j.dataFrame, j.zeroFrame = j.dataFrame[:0], j.zeroFrame[:0]
	content := j.reduce()
	if len(j.missing) > 0 {
		j.dataFrame = appendData(j.dataFrame, j.missing, content)
	}
	if len(j.zeros) > 0 {
		j.zeroFrame = append(j.zeroFrame, frameZero)
	}
	for _, e := range j.zeros {
		j.zeroFrame = appendZero(j.zeroFrame, e)
	}
}

// reduce leaves what the destination does not hold in missing, and returns its
// content, which it moves together in raw.
func (j *job) reduce() []byte {
	j.missing = j.missing[:0]
	if !slices.ContainsFunc(j.held, func(b byte) bool { return b != 0 }) {
		j.missing = append(j.missing, j.extents...)
		return j.raw
	}
	n, bit, at := 0, 0, int64(0)
	keep := func(e extent, from int64) {
		if e.length > 0 {
			j.missing = appendExtent(j.missing, e, maxContent)
			n += copy(j.raw[n:], j.raw[from:from+e.length])
		}
	}
	for _, e := range j.extents {
		done := e.offset // what was kept or is held
		pagesOf([]extent{e}, func(p, _ int64) {
			if j.held[bit/8]&(1<<(bit%8)) != 0 {
				keep(extent{done, p*page - done}, at+done-e.offset)
				done = (p + 1) * page
			}
			bit++
		})
		keep(extent{done, e.end() - done}, at+done-e.offset)
		at += e.length
	}
	return j.raw[:n]
}

// send writes j's frames.
func (o *Outbox) send(ctx context.Context, frames frameWriter, j *job) error {
	var zeros, content int64
	for _, e := range j.zeros {
		zeros += e.length
	}
	for _, e := range j.missing {
		content += e.length
	}
	var barrier, apply []byte
	if j.barrier.barrier != 0 {
		barrier = appendBarrier(nil, j.barrier.barrier, j.barrier.final)
	}
	if j.offered {
		apply = appendApply(nil, j.id)
	}
	for _, frame := range [][]byte{apply, j.dataFrame, j.zeroFrame, barrier} {
		if len(frame) == 0 {
			continue
		}
		if err := o.sendFrame(ctx, frames, frame); err != nil {
			return err
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stats.InFlight -= j.content
	o.stats.SentData += content
	o.stats.Held += j.content - content
	o.stats.SentZero += zeros
	return nil
}

// sendFrame sends and counts one frame.
func (o *Outbox) sendFrame(ctx context.Context, frames frameWriter, frame []byte) error {
	if err := frames.Send(ctx, frame); err != nil {
		return fmt.Errorf("send blocks: %w", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stats.Wire += int64(len(frame))
	return nil
}

// readAcks follows what the destination reports until the final barrier is
// durable.
func (o *Outbox) readAcks(ctx context.Context, acks frameReader, held func(ack) error) error {
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
		if a.kind == ackHeld {
			if err := held(a); err != nil {
				return err
			}
			continue
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
