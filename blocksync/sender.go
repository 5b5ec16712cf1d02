package blocksync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wanmig/wanmig/compress"
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
	// offerAbove is how much has to wait, once the whole disk is covered, for what
	// is sent to be offered: the answer takes a round trip, for which a guest that
	// is stopped would wait.
	offerAbove = 4 << 20
	// maxJobs is how many jobs of a disk may wait for the destination's answers.
	// Each may be offered twice, in blocks and then in pages.
	maxJobs = maxOffers / 2
	// bulkRoom is how much of the mirror's first pass may wait: enough to keep the
	// link busy. What is read from the disk earlier only fills memory, as the
	// guest's memory is not sent before.
	bulkRoom = 64 << 20
)

// job is what is sent together: content, then zeros, then a barrier. None of
// its extents overlap.
type job struct {
	taken   []taken
	content int64 // bytes in taken
	zeros   []extent
	checks  []check
	last    bool // checks are the last ones
	barrier span

	offered  bool
	id       uint32   // of its offer of blocks; that of pages has maxJobs more
	offers   []uint32 // that were made
	unit     int64    // of the last of them
	held     []byte   // the destination's answer to that
	offering int64    // bytes of offers and applies
	counts   Reduction
	recalled int64 // bytes that the destination need not be asked for

	raw     []byte                 // content that the destination does not hold, as far as is known
	extents []extent               // of raw, in its order
	sums    []compress.Fingerprint // of the whole pages in extents
	dropped []bool                 // those that turn out to be held
	missing []extent               // extents without them

	offerFrame []byte
	dataFrame  []byte
	zeroFrame  []byte
	toEncode   time.Time     // when it was given to the encoders
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
	image, err := newImage(o.size)
	if err == nil {
		o.image = image
		err = o.sendFrame(ctx, frames, appendOpen(nil, o.size, o.verify != nil))
		if err == nil {
			err = o.run(ctx, frames, acks)
		}
		err = errors.Join(err, image.close())
	}
	if err != nil {
		o.fail(err)
	}
	return err
}

// workers is how many goroutines fingerprint and encode the jobs of a disk.
func workers() int { return min(runtime.GOMAXPROCS(0), maxEncoders) }

// run is the pipeline: the order of jobs is fixed when they are taken, and kept
// by those that send while several workers fingerprint and encode.
func (o *Outbox) run(ctx context.Context, frames frameWriter, acks frameReader) error {
	const depth = maxJobs
	free, order, ordered := make(chan *job, depth), make(chan *job, depth), make(chan *job, depth)
	collect, refine, encode, sent := make(chan *job, depth), make(chan *job, depth), make(chan *job, depth), make(chan struct{})
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
	for range workers() {
		g.Go(func() error { return o.work(ctx, collect, encode, sent) })
	}
	waiting := &waiting{jobs: map[uint32]*job{}}
	g.Go(func() error {
		defer close(ordered)
		for j := range order {
			if _, err := receive(ctx, j.collected); err != nil {
				return err
			}
			o.recall(j)
			unit := int64(page)
			if o.alike.Load() && countUnits(j.extents, blockUnit) > 0 {
				unit = blockUnit
			}
			offered := j.offered && j.offer(unit) // before another has j
			ordered <- j
			if !offered {
				encode <- j.due()
				continue
			}
			waiting.add(j)
			if err := o.sendFrame(ctx, frames, j.offerFrame); err != nil {
				return err
			}
		}
		return nil
	})
	g.Go(func() error { // pages are offered where blocks differ
		for {
			select {
			case j := <-refine:
				j.drop()
				if !j.offer(page) {
					encode <- j.due()
					continue
				}
				waiting.add(j)
				if err := o.sendFrame(ctx, frames, j.offerFrame); err != nil {
					return err
				}
			case <-sent:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
	g.Go(func() error {
		defer close(sent)
		for j := range ordered {
			waiting := time.Now()
			if _, err := receive(ctx, j.encoded); err != nil {
				return err
			}
			begun := time.Now()
			// Until it was given to the encoders it waited for an answer, or for the mirror.
			o.encoder.Awaited(begun.Sub(later(waiting, j.toEncode)))
			if err := o.send(ctx, frames, j); err != nil {
				return err
			}
			o.encoder.Sent(time.Since(begun))
			free <- j
		}
		return nil
	})
	g.Go(func() error {
		return o.readAcks(ctx, acks, func(a ack) error {
			j, err := waiting.answered(a)
			switch {
			case err != nil:
			case j.unit == page:
				encode <- j.due()
			default:
				refine <- j
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
			j.collected <- struct{}{}
		case j := <-encode:
			j.encode(o.encoder.Encode)
			j.encoded <- struct{}{}
		case <-sent:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// due notes that a job can be encoded.
func (j *job) due() *job {
	j.toEncode = time.Now()
	return j
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// waiting are the jobs that were offered and not answered.
type waiting struct {
	mu   sync.Mutex
	jobs map[uint32]*job
}

// add notes the last offer that was made of a job.
func (w *waiting) add(j *job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.jobs[j.offers[len(j.offers)-1]] = j
}

// answered takes the job of an answer out.
func (w *waiting) answered(a ack) (*job, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := uint32(a.id)
	j := w.jobs[id]
	if j == nil {
		return nil, fmt.Errorf("%w: an answer to offer %d, which was not made", ErrFrame, id)
	}
	if units := countUnits(j.extents, j.unit); len(a.held) != (units+3)/4 {
		return nil, fmt.Errorf("%w: %d bytes of answer to an offer of %d units", ErrFrame, len(a.held), units)
	}
	delete(w.jobs, id)
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
	j.checks, j.last = j.checks[:0], false
	j.offered, j.offers, j.held, j.counts = false, j.offers[:0], j.held[:0], Reduction{}
	j.offering, j.recalled = 0, 0
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		waits, bulk := o.stats.PendingMemory+o.stats.PendingSpool, o.bulk
		for o.takeNext(j) {
		}
		for _, t := range j.taken { // what is sent again is hardly anywhere
			if o.sent.set(t.idx, t.idx+1) > 0 && (bulk || waits >= o.above) && !o.sealed {
				j.offered = true
			}
		}
		if bulk && len(j.taken) > 0 {
			o.change.broadcast() // the mirror may go on
		}
		if len(j.taken) > 0 || len(j.zeros) > 0 || len(j.checks) > 0 || j.barrier.barrier != 0 {
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
		if s.covered {
			o.bulk = false
		}
		return false
	case s.check != nil:
		if len(j.checks) > 0 && j.last != s.last {
			return false
		}
		j.checks, j.last = append(j.checks, *s.check), s.last
		o.order.pop()
		return len(j.checks) < maxChecks
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
	j.sums = j.sums[:0]
	unitsOf(j.extents, page, func(_, at int64) { j.sums = append(j.sums, compress.Sum(j.raw[at:at+page])) })
	return nil
}

// recall drops the pages of j that are the destination's already, by the order
// of the jobs, and notes the others.
func (o *Outbox) recall(j *job) {
	for _, e := range j.extents { // pages at both ends may change in part
		o.image.forget(extent{e.offset, min(e.length, -e.offset&(page-1))})
		o.image.forget(extent{e.end() &^ (page - 1), e.end() & (page - 1)})
	}
	for _, e := range j.zeros {
		o.image.forget(e)
	}
	j.dropped = j.dropped[:0]
	unitsOf(j.extents, page, func(p, _ int64) {
		j.dropped = append(j.dropped, o.image.put(p, j.sums[len(j.dropped)]))
	})
	j.reduce(func(int) *Count { return &j.counts.Disk })
	j.recalled = j.counts.Disk.Bytes
}

// offer makes the frame that offers j in units, if it has whole ones.
func (j *job) offer(unit int64) bool {
	if countUnits(j.extents, unit) == 0 {
		return false
	}
	id := j.id
	if unit == page {
		id += maxJobs
	}
	j.unit, j.offers = unit, append(j.offers, id)
	j.offerFrame = appendOffer(j.offerFrame[:0], id, unit, j.extents, j.sums)
	j.offering += int64(len(j.offerFrame)) + applySize
	return true
}

// encode makes the frames of what the destination does not hold of j.
func (j *job) encode(encode encode) {
	j.dataFrame, j.zeroFrame = j.dataFrame[:0], j.zeroFrame[:0]
	j.drop()
	if len(j.extents) > 0 {
		var m compress.Method
		j.dataFrame, m = appendData(j.dataFrame, encode, j.extents, j.raw)
		c := &j.counts.Compressed
		if m == compress.Raw {
			c = &j.counts.Raw
		}
		c.Bytes, c.WireBytes = int64(len(j.raw)), int64(len(j.dataFrame))
	}
	if len(j.zeros) > 0 {
		j.zeroFrame = append(j.zeroFrame, frameZero)
	}
	for _, e := range j.zeros {
		j.zeroFrame = appendZero(j.zeroFrame, e)
		j.counts.Zero.Bytes += e.length
	}
	j.counts.Zero.WireBytes = int64(len(j.zeroFrame))
	j.counts.share(j.offering)
}

// drop leaves out what the destination holds, by its last answer.
func (j *job) drop() {
	if len(j.held) == 0 {
		return
	}
	held := map[int64]compress.Origin{}
	i := 0
	unitsOf(j.extents, j.unit, func(u, _ int64) {
		held[u] = heldAt(j.held, i)
		i++
	})
	var origins []compress.Origin
	j.dropped = j.dropped[:0]
	unitsOf(j.extents, page, func(p, _ int64) {
		origin := held[p*page/j.unit]
		origins, j.dropped = append(origins, origin), append(j.dropped, origin != compress.Nowhere)
	})
	j.held = j.held[:0]
	j.reduce(func(i int) *Count { return j.counts.of(origins[i]) })
}

// reduce leaves the pages that are dropped out of extents, raw and sums, and
// counts each.
func (j *job) reduce(count func(i int) *Count) {
	if !slices.Contains(j.dropped, true) {
		return
	}
	j.missing = j.missing[:0]
	n, i, kept, at := 0, 0, 0, int64(0)
	keep := func(e extent, from int64) {
		if e.length > 0 {
			j.missing = appendExtent(j.missing, e, maxContent)
			n += copy(j.raw[n:], j.raw[from:from+e.length])
		}
	}
	for _, e := range j.extents {
		done := e.offset // what was kept or is dropped
		unitsOf([]extent{e}, page, func(p, _ int64) {
			if j.dropped[i] {
				keep(extent{done, p*page - done}, at+done-e.offset)
				done = (p + 1) * page
				count(i).Bytes += page
			} else {
				j.sums[kept] = j.sums[i]
				kept++
			}
			i++
		})
		keep(extent{done, e.end() - done}, at+done-e.offset)
		at += e.length
	}
	j.raw, j.sums = j.raw[:n], j.sums[:kept]
	j.extents, j.missing = j.missing, j.extents
}

// send writes j's frames.
func (o *Outbox) send(ctx context.Context, frames frameWriter, j *job) error {
	var barrier []byte
	if j.barrier.barrier != 0 {
		barrier = appendBarrier(nil, j.barrier.barrier, j.barrier.final)
	}
	var list [][]byte
	for _, id := range j.offers {
		list = append(list, appendApply(nil, id))
	}
	var checks []byte
	if len(j.checks) > 0 {
		checks = appendChecks(nil, j.last, j.checks)
	}
	for _, frame := range append(list, j.dataFrame, j.zeroFrame, checks, barrier) {
		if len(frame) == 0 {
			continue
		}
		if err := o.sendFrame(ctx, frames, frame); err != nil {
			return err
		}
	}
	content := int64(len(j.raw))
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stats.InFlight -= j.content
	o.stats.SentData += content
	o.stats.Held += j.content - content
	o.stats.Recalled += j.recalled
	o.stats.SentZero += j.counts.Zero.Bytes
	o.stats.Reduction.Add(j.counts)
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
		switch a.kind {
		case ackReady:
			o.alike.Store(a.blocks)
			continue
		case ackChecked:
			if err := o.compared(a); err != nil {
				return err
			}
			continue
		case ackHeld:
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
		o.stats.Applied = int64(min(a.applied, uint64(o.stats.Accepted-o.stats.Recalled)))
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
