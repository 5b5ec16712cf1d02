package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// inlet is a stream on one carrier that chunks are read from.
type inlet interface {
	io.Reader
	SetReadDeadline(time.Time) error
}

// merger makes one sequence of bytes of the chunks that arrive at its inlets.
// It holds heads of chunks only: a chunk's bytes stay in the flow-control window
// of its carrier until those before it were read. Chunks ascend within a
// carrier, so the next byte is always at the head of one.
type merger struct {
	ctx  context.Context // ends with the direction; the cause is io.EOF after its last byte
	stop context.CancelCauseFunc

	mu      sync.Mutex
	heads   []*inletHead
	base    uint64        // where the next chunk has to begin
	arrived chan struct{} // holds a token when a head has arrived

	// The reader's own.
	current   *inletHead
	remaining int
}

// inletHead is how far an inlet has come.
type inletHead struct {
	in      inlet
	ready   bool // head is known, and not taken yet
	head    chunkHead
	fetched chan struct{} // tells that the bytes behind head were read
}

func newMerger(ctx context.Context) *merger {
	m := &merger{arrived: make(chan struct{}, 1)}
	m.ctx, m.stop = context.WithCancelCause(ctx)
	return m
}

// follow reads the heads of an inlet's chunks until the inlet ends, or the
// direction does.
func (m *merger) follow(in inlet) {
	h := &inletHead{in: in, fetched: make(chan struct{}, 1)}
	m.mu.Lock()
	m.heads = append(m.heads, h)
	m.mu.Unlock()
	for {
		head, err := readChunkHead(in)
		if err == nil && head.length == 0 {
			err = expectEnd(in)
		}
		if err == nil {
			err = m.offer(h, head)
		}
		if tooLate(err) {
			m.drop(h)
			return
		}
		if err != nil {
			m.stop(cutShort(err))
			return
		}
		if head.length == 0 {
			return
		}
		select {
		case <-h.fetched:
		case <-m.ctx.Done():
			return
		}
	}
}

func expectEnd(in inlet) error {
	n, err := in.Read(make([]byte, 1))
	if n > 0 {
		return fmt.Errorf("%w: data after the end of a channel", ErrFormat)
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// tooLate says that the peer had done with the channel when the stream came.
func tooLate(err error) bool {
	var reset *quic.StreamError
	return errors.As(err, &reset) && reset.Remote && reset.ErrorCode == resetLate
}

func (m *merger) drop(h *inletHead) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.heads {
		if m.heads[i] == h {
			m.heads = append(m.heads[:i], m.heads[i+1:]...)
			return
		}
	}
}

// offer takes in the head of an inlet's next chunk. The inlet's last chunk was
// read before, so base is at its end or beyond.
func (m *merger) offer(h *inletHead, head chunkHead) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if head.offset < m.base {
		return fmt.Errorf("%w: chunk at offset %d after %d", ErrFormat, head.offset, m.base)
	}
	h.head, h.ready = head, true
	select {
	case m.arrived <- struct{}{}:
	default:
	}
	return nil
}

// next returns the inlet whose chunk comes next, or nil when it has not arrived.
func (m *merger) next() (*inletHead, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found *inletHead
	waiting := 0
	for _, h := range m.heads {
		if h.ready {
			waiting++
		}
		if h.ready && h.head.offset == m.base && (found == nil || h.head.length > 0) {
			found = h
		}
	}
	if found == nil {
		if waiting == Carriers { // no carrier is left to bring it
			return nil, fmt.Errorf("%w: no chunk at offset %d", ErrFormat, m.base)
		}
		return nil, nil
	}
	end := found.head.length == 0
	if !end {
		found.ready = false
		m.base = found.head.end()
	}
	for _, h := range m.heads {
		if h.ready && h.head.offset < m.base {
			return nil, fmt.Errorf("%w: chunks overlap at offset %d", ErrFormat, h.head.offset)
		}
		if h.ready && end && h.head.end() > m.base {
			return nil, fmt.Errorf("%w: chunk at offset %d of a channel that ends at %d", ErrFormat, h.head.offset, m.base)
		}
	}
	if end {
		return nil, io.EOF
	}
	return found, nil
}

// read reads the next bytes. There may be one reader at a time.
func (m *merger) read(ctx context.Context, p []byte) (int, error) {
	if ctx.Err() != nil {
		return 0, os.ErrDeadlineExceeded
	}
	for m.current == nil {
		if m.ctx.Err() != nil {
			return 0, context.Cause(m.ctx)
		}
		h, err := m.next()
		switch {
		case err != nil:
			m.stop(err)
		case h != nil:
			m.current, m.remaining = h, int(h.head.length)
		default:
			select {
			case <-m.arrived:
			case <-m.ctx.Done():
			case <-ctx.Done():
				return 0, os.ErrDeadlineExceeded
			}
		}
	}
	in := m.current.in
	wake := context.AfterFunc(m.ctx, func() { in.SetReadDeadline(longAgo) })
	defer wake()
	var n int
	err := interruptible(ctx, in.SetReadDeadline, func() error {
		var err error
		n, err = in.Read(p[:min(len(p), m.remaining)])
		return err
	})
	if m.ctx.Err() != nil {
		return 0, context.Cause(m.ctx)
	}
	if m.remaining -= n; m.remaining == 0 {
		m.current.fetched <- struct{}{}
		m.current = nil
		return n, nil
	}
	if err != nil && !interrupted(err) {
		m.stop(cutShort(err))
		return n, context.Cause(m.ctx)
	}
	return n, err
}
