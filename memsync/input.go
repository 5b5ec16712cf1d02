package memsync

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

const (
	chunkSize = 64 << 10
	inputSize = 4 * chunkSize // the longest record and two chunks

	// linger is how long a batch waits for more of the stream.
	linger = time.Millisecond
	// holdLimit is how long the beginning of a record waits for its end. It is
	// passed on then: QEMU may be waiting for an answer to what was taken for
	// the beginning of a record.
	holdLimit = 200 * time.Millisecond
)

// input holds the bytes of the stream from the record that is being parsed.
//
//	0 ..... summed ..... rec ..... sent ..... end
//
// Bytes before summed are in the batch's checksum, bytes before sent are in a
// batch. sent is beyond rec only when the beginning of a record was passed on.
type input struct {
	buf                    []byte
	summed, rec, sent, end int
}

// have returns the bytes at hand of the record and what follows it.
func (in *input) have() []byte { return in.buf[in.rec:in.end] }

// add appends p, whose room was made by compact.
func (in *input) add(p []byte) {
	in.end += copy(in.buf[in.end:], p)
}

// crowded tells whether compact is needed before the next chunk is added.
func (in *input) crowded() bool { return len(in.buf)-in.end < chunkSize }

// compact drops the bytes before the record, which must all be in the checksum.
func (in *input) compact() {
	n := in.rec
	copy(in.buf, in.buf[n:in.end])
	in.rec, in.sent, in.summed, in.end = 0, in.sent-n, in.summed-n, in.end-n
}

// reader reads the stream ahead by two chunks: enough for reading and encoding
// to overlap, too little for QEMU to overestimate the link.
type reader struct {
	conn   io.Reader
	pace   func(ctx context.Context, n int) error
	chunks chan []byte // closed at the end of the stream, err says why
	free   chan []byte
	pacing atomic.Bool
	err    error
}

func newReader(conn io.Reader, pace func(context.Context, int) error) *reader {
	const ahead = 2
	r := &reader{conn: conn, pace: pace, chunks: make(chan []byte, ahead), free: make(chan []byte, ahead)}
	for range ahead {
		r.free <- make([]byte, chunkSize)
	}
	return r
}

// closedError says how QEMU's socket ended.
type closedError struct{ error }

func (e closedError) Unwrap() error { return e.error }

func (r *reader) run(ctx context.Context) {
	defer close(r.chunks)
	n := 0
	for {
		var buf []byte
		select {
		case buf = <-r.free:
		case <-ctx.Done():
			r.err = ctx.Err()
			return
		}
		if r.pace != nil {
			r.pacing.Store(true)
			if err := r.pace(ctx, n); err != nil {
				r.err = fmt.Errorf("pace: %w", err)
				return
			}
			r.pacing.Store(false)
		}
		for n = 0; n == 0; {
			var err error
			n, err = r.conn.Read(buf[:chunkSize])
			if n > 0 {
				r.chunks <- buf[:n] // never blocks: there are as many buffers as places
			}
			if err != nil {
				r.err = closedError{err}
				return
			}
		}
	}
}

// fill waits for more of the stream. Meanwhile what is in the batch is sent.
func (s *Source) fill(ctx context.Context) error {
	chunk, err := s.nextChunk(ctx)
	if err != nil {
		return err
	}
	if s.in.crowded() {
		s.sum()
		s.in.compact()
	}
	s.in.add(chunk)
	s.stats.StreamBytes += uint64(len(chunk))
	s.reader.free <- chunk
	return nil
}

func (s *Source) nextChunk(ctx context.Context) ([]byte, error) {
	for {
		var alarm <-chan time.Time
		switch {
		case len(s.reader.chunks) > 0:
		case s.batch.stream > 0:
			s.timer.Reset(linger)
			alarm = s.timer.C
		case s.in.sent < s.in.end:
			s.timer.Reset(holdLimit)
			alarm = s.timer.C
		}
		select {
		case chunk, ok := <-s.reader.chunks:
			if !ok {
				return nil, s.reader.err
			}
			return chunk, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-alarm:
		}
		// A record that Pace withholds is not one that QEMU has stopped sending.
		if s.batch.stream == 0 && !s.reader.pacing.Load() {
			if err := s.emit(ctx, s.in.end); err != nil {
				return nil, err
			}
		}
		if err := s.flush(ctx); err != nil {
			return nil, err
		}
	}
}

// peek returns the first n bytes of the record, waiting for them if need be.
// They are valid until the next call.
func (s *Source) peek(ctx context.Context, n int) ([]byte, error) {
	for s.in.end-s.in.rec < n {
		if err := s.fill(ctx); err != nil {
			return nil, err
		}
	}
	return s.in.buf[s.in.rec : s.in.rec+n], nil
}
