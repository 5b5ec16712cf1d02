package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

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
	// same share of each carrier, packet by packet.
	Disk
)

func (p Priority) apply(stream *quic.Stream) {
	urgency := int8(3)
	if p == Control {
		urgency = 0
	}
	stream.SetPriority(urgency, true)
}

// byteStream is a sequence of bytes in each direction. What a context has
// interrupted fails with os.ErrDeadlineExceeded.
type byteStream interface {
	write(ctx context.Context, head, frame []byte) (started bool, err error)
	read(ctx context.Context, p []byte) (int, error)
	endWrite() error
	cancelWrite(quic.StreamErrorCode)
	cancelRead(quic.StreamErrorCode)
}

// Channel carries frames in both directions, each whole and in order. One
// goroutine may receive while any number send.
type Channel struct {
	session *Session
	stream  byteStream
	name    string

	sending chan struct{} // holds a token while a frame is written
	ended   atomic.Bool   // CloseSend was called
}

func newChannel(s *Session, stream byteStream, name string) *Channel {
	return &Channel{session: s, stream: stream, name: name, sending: make(chan struct{}, 1)}
}

// Name returns the name that the opener gave the channel.
func (c *Channel) Name() string { return c.name }

// Send writes one frame of at most MaxFrame bytes, and returns when all but its
// end has left: of a Control channel the last 1452 bytes, of another what each
// carrier holds, see the package's part on buffering. So a peer that does not
// receive, or a slow link, makes it wait. The frame may be used again after Send
// has returned. If ctx ends while the frame is partly sent, the channel cannot
// be used for sending any more.
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
	var head [frameHead]byte
	binary.BigEndian.PutUint32(head[:], uint32(len(frame)))
	started, err := c.stream.write(ctx, head[:], frame)
	if err != nil {
		if interrupted(err) && started {
			c.stream.cancelWrite(resetInterrupted)
		}
		return fmt.Errorf("send on channel %s: %w", c.name, c.explain(ctx, err))
	}
	return nil
}

// Recv returns the next frame, appended to buf[:0]. It returns io.EOF when the
// peer has called CloseSend and every frame was received. If ctx ends when a
// frame has partly arrived, the channel cannot be used for receiving any more.
func (c *Channel) Recv(ctx context.Context, buf []byte) ([]byte, error) {
	frame, taken, err := readFrame(channelReader{ctx, c.stream}, buf[:0])
	switch {
	case err == nil:
		return frame, nil
	case errors.Is(err, io.EOF):
		return nil, io.EOF
	case errors.Is(err, ErrFrameTooLarge), errors.Is(err, ErrFormat), errors.Is(err, io.ErrUnexpectedEOF):
		c.stream.cancelRead(resetFormat)
		c.stream.cancelWrite(resetFormat)
	case interrupted(err) && taken > 0:
		c.stream.cancelRead(resetInterrupted)
	}
	return nil, fmt.Errorf("receive on channel %s: %w", c.name, c.explain(ctx, err))
}

// channelReader reads a channel's bytes until ctx ends.
type channelReader struct {
	ctx    context.Context
	stream byteStream
}

func (r channelReader) Read(p []byte) (int, error) { return r.stream.read(r.ctx, p) }

// CloseSend says that no frame follows, after those being sent. The peer still
// gets everything that was sent, unless the session ends before.
func (c *Channel) CloseSend() error {
	c.sending <- struct{}{}
	defer func() { <-c.sending }()
	c.ended.Store(true)
	if err := c.stream.endWrite(); err != nil {
		return fmt.Errorf("end channel %s: %w", c.name, c.explain(context.Background(), err))
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
		c.stream.cancelWrite(resetClosed)
	}
	c.stream.cancelRead(resetClosed)
	return nil
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
	case errors.Is(err, ErrFrameTooLarge), errors.Is(err, ErrFormat):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the peer ended it in the middle of a frame: %w", err)
	}
	return c.session.explain(err)
}
