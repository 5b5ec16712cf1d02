package tunnel

import (
	"context"
	"io"
	"os"
	"sync/atomic"

	"github.com/quic-go/quic-go"
)

// outlet is a stream on one carrier that chunks are written to.
type outlet interface {
	io.WriteCloser
	Context() context.Context // ends with the stream, see quic.SendStream
}

// splitter cuts a sequence of bytes into chunks, each for the first outlet that
// can take it. An outlet holds one chunk, so little is queued.
type splitter struct {
	ctx  context.Context // ends with the direction; the cause is quic.ErrStreamClosed after end
	stop context.CancelCauseFunc

	idle   chan *outletChunk
	offset uint64 // of the next chunk; the writer's

	relieved atomic.Bool // another carrier has taken over from the first one
}

// outletChunk is the chunk that an outlet writes.
type outletChunk struct {
	bytes  []byte
	filled chan struct{}
}

func newSplitter(ctx context.Context) *splitter {
	s := &splitter{idle: make(chan *outletChunk, Carriers)}
	s.ctx, s.stop = context.WithCancelCause(ctx)
	return s
}

// serve writes chunks to an outlet until the direction ends. The first carrier's
// outlet has chunks only while there is no other: control frames shall find its
// congestion window free.
func (s *splitter) serve(out outlet, first bool) {
	chunk := &outletChunk{filled: make(chan struct{}, 1)}
	if !first {
		s.relieved.Store(true)
	}
	for s.next(chunk, out, first) {
		if _, err := out.Write(chunk.bytes); err != nil {
			s.fail(err)
			return
		}
	}
}

// next waits until the outlet's chunk is filled. It returns false when there is
// no more to write.
func (s *splitter) next(chunk *outletChunk, out outlet, first bool) bool {
	if !first || !s.relieved.Load() {
		s.idle <- chunk
	}
	select {
	case <-chunk.filled:
		return true
	case <-out.Context().Done():
		s.fail(context.Cause(out.Context()))
		return false
	case <-s.ctx.Done():
	}
	select {
	case <-chunk.filled: // just before the end
		return true
	default:
		s.finish(out)
		return false
	}
}

// fail ends the direction, unless the peer had done with the channel when the
// outlet came: nothing is missing then.
func (s *splitter) fail(err error) {
	if !tooLate(err) {
		s.stop(err)
	}
}

func (s *splitter) finish(out outlet) {
	if context.Cause(s.ctx) != quic.ErrStreamClosed {
		return // whoever stopped the direction resets its streams
	}
	if _, err := out.Write(chunkHead{offset: s.offset}.append(nil)); err == nil {
		out.Close()
	}
}

// write hands out the bytes of parts, and says whether some were. There may be
// one writer at a time. When it returns, the parts may be used again.
func (s *splitter) write(ctx context.Context, parts ...[]byte) (started bool, err error) {
	length := 0
	for _, p := range parts {
		length += len(p)
	}
	for length > 0 {
		if s.ctx.Err() != nil {
			return started, context.Cause(s.ctx)
		}
		if ctx.Err() != nil {
			return started, os.ErrDeadlineExceeded
		}
		var chunk *outletChunk
		select {
		case chunk = <-s.idle:
		case <-s.ctx.Done():
			continue
		case <-ctx.Done():
			continue
		}
		head := chunkHead{offset: s.offset, length: uint16(min(length, maxChunk))}
		chunk.bytes = head.append(chunk.bytes[:0])
		for full := chunkSize + int(head.length); len(chunk.bytes) < full; {
			n := min(len(parts[0]), full-len(chunk.bytes))
			chunk.bytes = append(chunk.bytes, parts[0][:n]...)
			if parts[0] = parts[0][n:]; len(parts[0]) == 0 {
				parts = parts[1:]
			}
		}
		s.offset = head.end()
		length -= int(head.length)
		started = true
		chunk.filled <- struct{}{}
	}
	return started, nil
}
