package tunnel

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/quic-go/quic-go"
)

// leadSize is how much of a frame goes out together with its length. It is
// below the size at which a QUIC stream copies a write instead of waiting, so a
// small frame is one packet and costs one call.
const leadSize = 1400

// plain is a channel's bytes on one stream of the first carrier.
type plain struct {
	stream *quic.Stream
	lead   []byte // the writer's
}

func newPlain(stream *quic.Stream) *plain {
	return &plain{stream: stream, lead: make([]byte, 0, frameHead+leadSize)}
}

func (p *plain) write(ctx context.Context, head, frame []byte) (started bool, err error) {
	var sent int
	err = interruptible(ctx, p.stream.SetWriteDeadline, func() error {
		n := min(len(frame), leadSize)
		p.lead = append(append(p.lead[:0], head...), frame[:n]...)
		var err error
		if sent, err = p.stream.Write(p.lead); err != nil || n == len(frame) {
			return err
		}
		_, err = p.stream.Write(frame[n:])
		return err
	})
	return sent > 0, err
}

func (p *plain) read(ctx context.Context, b []byte) (n int, err error) {
	err = interruptible(ctx, p.stream.SetReadDeadline, func() error {
		var err error
		n, err = p.stream.Read(b)
		return err
	})
	return n, err
}

func (p *plain) endWrite() error {
	if err := p.stream.Close(); err != nil {
		return context.Cause(p.stream.Context())
	}
	return nil
}

func (p *plain) cancelWrite(code quic.StreamErrorCode) { p.stream.CancelWrite(code) }

func (p *plain) cancelRead(code quic.StreamErrorCode) { p.stream.CancelRead(code) }

var longAgo = time.Unix(1, 0)

// interruptible runs op, which reads or writes a stream, and lets ctx end it by
// setting the stream's deadline.
func interruptible(ctx context.Context, setDeadline func(time.Time) error, op func() error) error {
	if ctx.Err() != nil {
		return os.ErrDeadlineExceeded
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		setDeadline(longAgo)
		close(fired)
	})
	err := op()
	if !stop() {
		<-fired
		setDeadline(time.Time{})
	}
	return err
}

func interrupted(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
