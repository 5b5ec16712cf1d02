package tunnel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/quic-go/quic-go"
)

// stripe is a channel's bytes in both directions, over a stream on each carrier.
type stripe struct {
	session  *Session
	id       quic.StreamID // of the channel's stream on the first carrier
	priority Priority
	ours     bool // opened on this side, which then opens the streams

	in  *merger
	out *splitter

	mu    sync.Mutex
	lanes []lane
}

type lane struct {
	carrier *quic.Conn
	stream  *quic.Stream
}

func newStripe(s *Session, id quic.StreamID, p Priority, ours bool) *stripe {
	return &stripe{session: s, id: id, priority: p, ours: ours, in: newMerger(s.ctx), out: newSplitter(s.ctx)}
}

// attach lets the channel use a carrier's stream.
func (st *stripe) attach(carrier *quic.Conn, stream *quic.Stream) error {
	st.priority.apply(stream)
	st.mu.Lock()
	defer st.mu.Unlock()
	if slices.ContainsFunc(st.lanes, func(l lane) bool { return l.carrier == carrier }) {
		return fmt.Errorf("%w: second stream for channel %d", ErrFormat, st.id)
	}
	st.lanes = append(st.lanes, lane{carrier, stream})
	var reset *quic.StreamError
	if errors.As(context.Cause(st.in.ctx), &reset) {
		stream.CancelRead(resetClosed)
	}
	if errors.As(context.Cause(st.out.ctx), &reset) {
		stream.CancelWrite(resetClosed)
	}
	st.session.run(func() { st.in.follow(stream) })
	st.session.run(func() { st.out.serve(stream, carrier == st.session.first) })
	return nil
}

// extend opens the channel's stream on a carrier that has joined.
func (st *stripe) extend(carrier *quic.Conn) {
	stream, err := carrier.OpenStreamSync(st.in.ctx)
	if err != nil {
		return // the channel or the session is over
	}
	if _, err := stream.Write(laneHeader{channel: st.id}.append(nil)); err != nil {
		return
	}
	st.attach(carrier, stream) // cannot be a second one
}

// await returns when both directions are over.
func (st *stripe) await() {
	<-st.in.ctx.Done()
	<-st.out.ctx.Done()
}

func (st *stripe) write(ctx context.Context, head, frame []byte) (started bool, err error) {
	return st.out.write(ctx, head, frame)
}

func (st *stripe) read(ctx context.Context, p []byte) (int, error) {
	return st.in.read(ctx, p)
}

func (st *stripe) endWrite() error {
	st.out.stop(quic.ErrStreamClosed)
	if cause := context.Cause(st.out.ctx); cause != quic.ErrStreamClosed {
		return cause
	}
	return nil
}

func (st *stripe) cancelWrite(code quic.StreamErrorCode) {
	st.out.stop(&quic.StreamError{StreamID: st.id, ErrorCode: code})
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, l := range st.lanes {
		l.stream.CancelWrite(code)
	}
}

func (st *stripe) cancelRead(code quic.StreamErrorCode) {
	st.in.stop(&quic.StreamError{StreamID: st.id, ErrorCode: code})
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, l := range st.lanes {
		l.stream.CancelRead(code)
	}
}
