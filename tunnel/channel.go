package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

// Priority orders the channels of a session when they compete for the link.
type Priority uint8

const (
	// Control goes strictly before everything else. It is for small frames.
	Control Priority = iota
	// Memory is for a guest's RAM.
	Memory
	// Disk is for blocks. Each Memory and Disk channel that has data gets the
	// same share of the link, packet by packet.
	Disk
)

func (p Priority) apply(stream *quic.Stream) {
	urgency := int8(3)
	if p == Control {
		urgency = 0
	}
	stream.SetPriority(urgency, true)
}

// leadSize is how much of a frame goes out together with its length. It is
// below the size at which a QUIC stream copies a write instead of waiting, so a
// small frame is one packet and costs one call.
const leadSize = 1400

// Channel carries frames in both directions, each whole and in order. One
// goroutine may receive while any number send.
type Channel struct {
	session *Session
	stream  *quic.Stream
	name    string

	sending chan struct{} // holds a token while a frame is written
	lead    []byte        // the writer's, under sending
	ended   atomic.Bool   // CloseSend was called
}

func newChannel(s *Session, stream *quic.Stream, h channelHeader) *Channel {
	h.priority.apply(stream)
	return &Channel{
		session: s,
		stream:  stream,
		name:    h.name,
		sending: make(chan struct{}, 1),
		lead:    make([]byte, 0, frameHead+leadSize),
	}
}

// Name returns the name that the opener gave the channel.
func (c *Channel) Name() string { return c.name }

// Send writes one frame of at most MaxFrame bytes, and returns when all but its
// last 1452 bytes have left: a peer that does not receive, or a slow link, makes
// it wait. The frame may be used again after Send has returned. If ctx ends
// while the frame is partly sent, the channel cannot be used for sending any
// more.
func (c *Channel) Send(ctx context.Context, frame []byte) error {
	if len(frame) > MaxFrame {
		return fmt.Errorf("send on channel %s: %w: %d bytes, %d allowed", c.name, ErrFrameTooLarge, len(frame), MaxFrame)
	}
	select {
	case c.sending <- struct{}{}:
		defer func() { <-c.sending }()
	case <-ctx.Done():
		return fmt.Errorf("send on channel %s: %w", c.name, context.Cause(ctx))
	}
	var sent int
	err := interruptible(ctx, c.stream.SetWriteDeadline, func() error {
		n := min(len(frame), leadSize)
		c.lead = binary.BigEndian.AppendUint32(c.lead[:0], uint32(len(frame)))
		c.lead = append(c.lead, frame[:n]...)
		var err error
		if sent, err = c.stream.Write(c.lead); err != nil || n == len(frame) {
			return err
		}
		_, err = c.stream.Write(frame[n:])
		return err
	})
	if err != nil {
		if interrupted(err) && sent > 0 {
			c.stream.CancelWrite(resetInterrupted)
		}
		return fmt.Errorf("send on channel %s: %w", c.name, c.explain(ctx, err))
	}
	return nil
}

// Recv returns the next frame, appended to buf[:0]. It returns io.EOF when the
// peer has called CloseSend and every frame was received. If ctx ends when a
// frame has partly arrived, the channel cannot be used for receiving any more.
func (c *Channel) Recv(ctx context.Context, buf []byte) ([]byte, error) {
	var frame []byte
	var taken int
	err := interruptible(ctx, c.stream.SetReadDeadline, func() error {
		var err error
		frame, taken, err = readFrame(c.stream, buf[:0])
		return err
	})
	switch {
	case err == nil:
		return frame, nil
	case errors.Is(err, io.EOF):
		return nil, io.EOF
	case errors.Is(err, ErrFrameTooLarge), errors.Is(err, io.ErrUnexpectedEOF):
		c.reset(resetFormat)
	case interrupted(err) && taken > 0:
		c.stream.CancelRead(resetInterrupted)
	}
	return nil, fmt.Errorf("receive on channel %s: %w", c.name, c.explain(ctx, err))
}

// CloseSend says that no frame follows, after those being sent. The peer still
// gets everything that was sent, unless the session ends before.
func (c *Channel) CloseSend() error {
	c.sending <- struct{}{}
	defer func() { <-c.sending }()
	c.ended.Store(true)
	if err := c.stream.Close(); err != nil {
		cause := context.Cause(c.stream.Context())
		return fmt.Errorf("end channel %s: %w", c.name, c.explain(context.Background(), cause))
	}
	if err := c.session.Err(); err != nil {
		return fmt.Errorf("end channel %s: %w", c.name, err)
	}
	return nil
}

// Close abandons the channel, and ends a Send or Recv that waits. Frames on
// their way may be lost, except those before a CloseSend: these are delivered.
func (c *Channel) Close() error {
	if !c.ended.Load() {
		c.stream.CancelWrite(resetClosed)
	}
	c.stream.CancelRead(resetClosed)
	return nil
}

func (c *Channel) reset(code quic.StreamErrorCode) {
	c.stream.CancelRead(code)
	c.stream.CancelWrite(code)
}

// explain turns what a stream returns into this package's errors.
func (c *Channel) explain(ctx context.Context, err error) error {
	var reset *quic.StreamError
	switch {
	case interrupted(err):
		return context.Cause(ctx)
	case errors.Is(err, quic.ErrStreamClosed):
		return fmt.Errorf("%w for sending", ErrClosed)
	case errors.As(err, &reset):
		if !reset.Remote && reset.ErrorCode == resetClosed {
			return ErrClosed
		}
		if !reset.Remote {
			return fmt.Errorf("%w after an incomplete frame", ErrClosed)
		}
		switch reset.ErrorCode {
		case resetFormat:
			return fmt.Errorf("%w: it found the format broken", ErrReset)
		case resetInterrupted:
			return fmt.Errorf("%w: it stopped in the middle of a frame", ErrReset)
		}
		return ErrReset
	case errors.Is(err, ErrFrameTooLarge):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the peer ended it in the middle of a frame: %w", err)
	}
	return c.session.explain(err)
}

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
