package memsync

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// ErrAborted is returned when the source QEMU closed its end before the stream
// was complete: the migration was cancelled or failed there.
var ErrAborted = errors.New("source QEMU closed the RAM stream before its end: the migration was cancelled or failed, see its log")

// errForeign is returned by the parser where the stream is not understood.
var errForeign = errors.New("stream not understood")

// SourceConfig says where a Source reads and writes. QEMU, Frames and Return
// are required.
type SourceConfig struct {
	// QEMU is the connection on which the source QEMU sends its stream.
	// Run closes it.
	QEMU io.ReadWriteCloser

	Frames frameWriter // to Dest
	Return frameReader // from Dest

	// Store is how many bytes of pages are kept here and at the destination,
	// which allows as much, so that they need not be sent again.
	Store int64

	// Keep is called with the content of each page of 4 KiB that is not zeros, as
	// often as it is sent, and its number among the pages of all blocks. It may be
	// nil, and must not block.
	Keep func(page uint64, content []byte)

	// Pace is called before each read with the number of bytes that the last
	// read returned, at most 64 KiB and 0 at first. While it blocks, QEMU's
	// socket fills and QEMU sends no more. An error ends Run.
	Pace func(ctx context.Context, n int) error

	// OnTail is called once, when the RAM section has ended: the guest is
	// stopped. It must not block. It is not called in opaque mode.
	OnTail func()
}

// Source turns the migration stream of a source QEMU into frames.
//
// The end of a stream cannot be told from device state that imitates it, so
// only QEMU closing its socket completes it. But QEMU waits for the
// destination's SHUT before it does. When the bytes so far could be a whole
// stream, Source answers SHUT itself, which saves a round trip of downtime, and
// drops the destination's. If that was an imitation the rest is passed on all
// the same: QEMU never sends less because of an early SHUT.
//
// A stream without description gives no such hint, nor does one in opaque
// mode: there the destination's SHUT is relayed.
type Source struct {
	cfg     SourceConfig
	reader  *reader
	answers answers
	marks   marks
	timer   *time.Timer

	in         input
	batch      *batch
	pipeline   *pipeline
	offerAbove uint64 // bytes of the first pass
	again      int    // pages in a row that were sent before
	index      *index // nil without a page store
	crc        uint32 // of the batch's stream bytes up to in.summed
	ended      atomic.Bool

	ramID          uint32
	hasRAM         bool
	blocks         map[string]*block
	current        *block
	pageBits       uint8
	openReturnPath bool
	end            endFinder

	stats     Stats
	mu        sync.Mutex
	published Stats
}

// NewSource returns a Source whose Run has yet to be called, once.
func NewSource(cfg SourceConfig) *Source {
	s := &Source{
		cfg:        cfg,
		reader:     newReader(cfg.QEMU, cfg.Pace),
		answers:    answers{qemu: cfg.QEMU},
		timer:      time.NewTimer(time.Hour),
		in:         input{buf: make([]byte, inputSize)},
		pipeline:   newPipeline(cfg.Frames, slotsIn(cfg.Store)),
		offerAbove: offerAbove,
		pageBits:   defaultPageBits,
	}
	s.answers.held, s.answers.passed = s.pipeline.held, s.marks.passed
	s.timer.Stop()
	return s
}

// Stats may be called at any time.
func (s *Source) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.published
	st.WireBytes, st.Reduction = s.pipeline.totals()
	return st
}

// Opaque tells whether the stream was not understood before its RAM section
// ended. OnTail is not called then, Dest has no tail to hold back, and SHUT
// comes from the destination: disks must be in sync before QEMU is let go on.
func (s *Source) Opaque() bool { return s.Stats().Opaque }

func (s *Source) publish() {
	s.stats.PageSize = 1 << s.pageBits
	s.mu.Lock()
	s.published = s.stats
	s.mu.Unlock()
}

// Run passes the stream on until QEMU closes its socket. It returns nil when
// the stream was complete and the frames are sent, which does not mean that the
// destination has loaded it, and ErrAborted when it was not.
func (s *Source) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		<-ctx.Done()
		s.cfg.QEMU.Close()
	})
	wg.Go(func() { s.reader.run(ctx) })
	wg.Go(func() {
		err := s.answers.run(ctx, s.cfg.Return)
		if !s.ended.Load() {
			cancel(fmt.Errorf("receive return path from the destination: %w", err))
		}
	})
	wg.Go(func() { cancel(s.pipeline.run(ctx)) })
	err := s.openStore()
	if err == nil {
		err = s.stream(ctx)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	cancel(err)
	wg.Wait()
	s.publish()
	return errors.Join(err, s.closeStore())
}

func (s *Source) stream(ctx context.Context) error {
	var err error
	if s.batch, err = s.pipeline.next(ctx, s.pageBits); err != nil {
		return err
	}
	err = s.structure(ctx)
	switch {
	case err == nil:
		err = s.tail(ctx)
	case errors.Is(err, errForeign):
		s.stats.Opaque = true
		s.publish()
		err = s.passThrough(ctx)
	}
	return s.finish(ctx, err)
}

// tail passes on what follows the RAM section.
func (s *Source) tail(ctx context.Context) error {
	s.stats.Tail = true
	s.publish()
	if s.cfg.OnTail != nil {
		s.cfg.OnTail()
	}
	if err := s.drain(ctx); err != nil {
		return err
	}
	if err := s.pipeline.send(ctx, []byte{frameTail}); err != nil {
		return err
	}
	return s.passThrough(ctx)
}

// passThrough passes bytes on as they come until an error, which is a
// closedError when QEMU has closed its socket.
func (s *Source) passThrough(ctx context.Context) error {
	count := &s.stats.OpaqueBytes
	if s.stats.Tail {
		count = &s.stats.TailBytes
	}
	for {
		more := s.in.have()
		*count += uint64(len(more))
		s.end.write(more)
		last := s.mayShut()
		if last {
			s.answers.shut()
		}
		if err := s.pass(ctx, len(more)); err != nil {
			return err
		}
		if last {
			if err := s.flush(ctx); err != nil {
				return err
			}
		}
		if err := s.fill(ctx); err != nil {
			return err
		}
	}
}

// mayShut tells whether QEMU is done, by all that can be known while it waits.
func (s *Source) mayShut() bool {
	return s.stats.Tail && s.openReturnPath && len(s.reader.chunks) == 0 && s.end.atEnd()
}

// finish ends the frames after err has ended the stream.
func (s *Source) finish(ctx context.Context, err error) error {
	var closed closedError
	if !errors.As(err, &closed) || ctx.Err() != nil {
		return err
	}
	if err := s.emit(ctx, s.in.end); err != nil {
		return err
	}
	if err := s.drain(ctx); err != nil {
		return err
	}
	if !s.complete() {
		return fmt.Errorf("%w (after %d bytes: %w)", ErrAborted, s.stats.StreamBytes, closed)
	}
	s.ended.Store(true)
	return s.pipeline.send(ctx, binary.BigEndian.AppendUint64([]byte{frameEnd}, s.stats.StreamBytes))
}

// complete tells whether QEMU closed its socket at the end of the stream
// rather than in the middle. In doubt it is complete: a destination QEMU that
// misses bytes refuses to start.
func (s *Source) complete() bool {
	if !s.stats.Tail && !s.stats.Opaque {
		return false
	}
	own, loaded, used := s.answers.answered()
	waits := (used || s.openReturnPath) && !own // QEMU would have waited for a SHUT
	return loaded || s.end.atEnd() || !waits && s.end.last == sectionEnd && s.stats.StreamBytes > 0
}

// pass sends the first n bytes of the record as they are and steps over them.
func (s *Source) pass(ctx context.Context, n int) error {
	if err := s.emit(ctx, s.in.rec+n); err != nil {
		return err
	}
	s.in.rec += n
	return nil
}

// emit puts the input up to stop into batches as plain bytes.
func (s *Source) emit(ctx context.Context, stop int) error {
	for s.in.sent < stop {
		if !s.batch.fits(1) {
			if err := s.flush(ctx); err != nil {
				return err
			}
		}
		n := min(stop-s.in.sent, maxStream-s.batch.stream)
		s.batch.addBytes(s.in.buf[s.in.sent : s.in.sent+n])
		s.in.sent += n
	}
	return nil
}

// sum brings the batch's checksum up to the bytes it holds.
func (s *Source) sum() {
	s.crc = crc32.Update(s.crc, castagnoli, s.in.buf[s.in.summed:s.in.sent])
	s.in.summed = s.in.sent
}

// mayWait tells whether batches may wait for answers: the stop must be far, as
// what waits would then be downtime, and QEMU must not see a link that is faster
// than it is.
func (s *Source) mayWait() bool {
	return s.index != nil && s.pageBits == storeBits && !s.stats.Tail && !s.stats.Opaque &&
		s.stats.UnseenPages<<s.pageBits > s.offerAbove && s.again < laterRound
}

// flush sends the batch, if there is anything in it.
func (s *Source) flush(ctx context.Context) error {
	switch {
	case s.batch.stream == 0:
		return nil
	case s.mayWait():
		return s.put(ctx)
	}
	return s.drain(ctx)
}

// drain returns when the batch and all before it are sent.
func (s *Source) drain(ctx context.Context) error {
	b := s.batch
	b.awaited = true
	if err := s.put(ctx); err != nil {
		return err
	}
	select {
	case <-b.sent:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// put passes the batch to the pipeline and begins another.
func (s *Source) put(ctx context.Context) error {
	s.sum()
	s.batch.crc, s.crc = s.crc, 0
	s.batch.hurry = s.stats.UnseenPages == 0
	if s.batch.stream > 0 {
		if err := s.pipeline.begin(ctx); err != nil {
			return err
		}
	}
	if err := s.pipeline.put(ctx, s.batch); err != nil {
		return err
	}
	s.publish()
	var err error
	s.batch, err = s.pipeline.next(ctx, s.pageBits)
	return err
}
