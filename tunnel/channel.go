package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Priority orders the channels of a session when they compete for the link. Each
// goes strictly before the next, but Memory and Disk, whose channels take turns,
// 16 KiB at a time.
type Priority uint8

const (
	// Control is for small frames that somebody waits for. Of several carriers
	// one has nothing else to carry.
	Control Priority = iota
	// Tail is for the last of a guest's memory, while the guest stands still.
	Tail
	// Memory is for a guest's RAM.
	Memory
	// Disk is for blocks.
	Disk
	// Background is for what nobody waits for.
	Background
)

// Channel carries frames in both directions, each whole, and in order unless it
// is unordered. One goroutine may receive while any number send.
type Channel struct {
	session *Session
	id      uint32
	name    string
	out     *outflow
	in      *inflow

	sending chan struct{} // holds a token while a frame is queued
}

func newChannel(s *Session, id uint32, p Priority) *Channel {
	return &Channel{
		session: s,
		id:      id,
		out:     newOutflow(id, p),
		in:      newInflow(),
		sending: make(chan struct{}, 1),
	}
}

// Name returns the name that the opener gave the channel.
func (c *Channel) Name() string { return c.name }

// Send takes one frame, of at most MaxFrame bytes or, of an unordered channel,
// MaxUnordered and not empty, and returns when all but its last 64 KiB has left. So a peer that
// does not receive, a slow link or none makes it wait. The frame may be used again
// after Send has returned. If ctx ends while the frame is partly sent, the channel
// cannot be used for sending any more.
func (c *Channel) Send(ctx context.Context, frame []byte) error {
	most := MaxFrame
	if c.out.unordered {
		most = MaxUnordered
	}
	if c.out.unordered && len(frame) == 0 {
		return fmt.Errorf("send on channel %s: an unordered channel has no empty frames", c.name)
	}
	if len(frame) > most {
		return fmt.Errorf("send on channel %s: %w: %d bytes, %d allowed", c.name, ErrFrameTooLarge, len(frame), most)
	}
	select {
	case c.sending <- struct{}{}:
		defer func() { <-c.sending }()
	case <-ctx.Done():
		return fmt.Errorf("send on channel %s: %w", c.name, context.Cause(ctx))
	}
	started, err := c.queue(ctx, frame)
	if err != nil {
		if started && ctx.Err() != nil {
			c.session.resetChannel(c, resetInterrupted, fmt.Errorf("%w after an incomplete frame", ErrClosed))
		}
		return fmt.Errorf("send on channel %s: %w", c.name, err)
	}
	return nil
}

// queue hands a frame to the carriers, and says whether some of it was.
func (c *Channel) queue(ctx context.Context, frame []byte) (started bool, err error) {
	if c.out.unordered {
		return false, c.session.queue(ctx, c.out, nil, frame)
	}
	var head [frameHead]byte
	binary.BigEndian.PutUint32(head[:], uint32(len(frame)))
	n := min(len(frame), maxData-frameHead)
	if err := c.session.queue(ctx, c.out, head[:], frame[:n]); err != nil {
		return false, err
	}
	for frame = frame[n:]; len(frame) > 0; frame = frame[n:] {
		n = min(len(frame), maxData)
		if err := c.session.queue(ctx, c.out, nil, frame[:n]); err != nil {
			return true, err
		}
	}
	return true, nil
}

// Recv returns the next frame, appended to buf[:0]. It returns io.EOF when the
// peer has called CloseSend and every frame was received. If ctx ends when a
// frame has partly arrived, the channel cannot be used for receiving any more.
func (c *Channel) Recv(ctx context.Context, buf []byte) ([]byte, error) {
	frame, taken, err := c.next(ctx, buf[:0])
	switch {
	case err == nil:
		return frame, nil
	case errors.Is(err, io.EOF):
		return nil, io.EOF
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("the peer ended it in the middle of a frame: %w", err)
		fallthrough
	case errors.Is(err, ErrFrameTooLarge):
		c.session.stopChannel(c, resetFormat, err)
		c.session.resetChannel(c, resetFormat, err)
	case ctx.Err() != nil && taken > 0:
		c.session.stopChannel(c, resetInterrupted, fmt.Errorf("%w after an incomplete frame", ErrClosed))
	}
	return nil, fmt.Errorf("receive on channel %s: %w", c.name, err)
}

func (c *Channel) next(ctx context.Context, buf []byte) (frame []byte, taken int, err error) {
	if !c.in.unordered {
		return readFrame(channelReader{ctx, c}, buf)
	}
	err = c.session.await(ctx, c, func() { buf = c.in.frame(buf) })
	return buf, 0, err
}

// channelReader reads a channel's bytes until ctx ends.
type channelReader struct {
	ctx     context.Context
	channel *Channel
}

func (r channelReader) Read(p []byte) (n int, err error) {
	err = r.channel.session.await(r.ctx, r.channel, func() { n = r.channel.in.copy(p) })
	return n, err
}

// SetPriority changes the priority, also of what was sent and has not left.
func (c *Channel) SetPriority(p Priority) {
	c.session.mu.Lock()
	defer c.session.mu.Unlock()
	c.out.priority = p
	c.session.wakeAll()
}

// CloseSend says that no frame follows, after those being sent. The peer still
// gets everything that was sent, unless the session ends before.
func (c *Channel) CloseSend() error {
	c.sending <- struct{}{}
	defer func() { <-c.sending }()
	if err := c.session.sealChannel(c); err != nil {
		return fmt.Errorf("end channel %s: %w", c.name, err)
	}
	return nil
}

// Close abandons the channel, and ends a Send or Recv that waits. Frames on
// their way may be lost, except those before a CloseSend: these are delivered.
func (c *Channel) Close() error {
	c.session.resetUnsealed(c)
	c.session.stopChannel(c, resetClosed, ErrClosed)
	return nil
}
