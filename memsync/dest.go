package memsync

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// maxTail is how much of the tail Dest holds in memory; beyond it Dest receives
// no more until the gate is open. Device state is a few MiB.
const maxTail = 64 << 20

// ErrQEMU is returned when the destination QEMU closed its end of the stream or
// refused the state before it had all of it.
var ErrQEMU = errors.New("destination QEMU closed the RAM stream")

// DestConfig says where a Dest reads and writes. All fields but OnEnd,
// Store and Have are required.
type DestConfig struct {
	Frames frameReader // from Source
	Return frameWriter // to Source

	// Dial connects to the incoming socket of the destination QEMU. It is
	// called once, when the first frame has arrived: QEMU takes the first
	// connection for the migration. Run closes it.
	Dial func(ctx context.Context) (io.ReadWriteCloser, error)

	// Gate is called once, when the RAM section has ended; QEMU gets nothing of
	// the tail, without which it cannot start the guest, before Gate returns.
	Gate func(ctx context.Context) error

	// OnEnd is called once, when the end of the stream has arrived. It may be nil, and
	// must not block.
	OnEnd func()

	// Store is how many bytes of pages may be kept here for Source.
	Store int64

	// Have finds pages that need not be sent as they are here. It may be nil. It
	// is asked by several goroutines.
	Have searcher
}

// Dest turns the frames of a Source into the stream of the destination QEMU.
type Dest struct {
	cfg  DestConfig
	conn io.ReadWriteCloser
	in   *unbatch

	offers   *offers
	received uint64 // stream bytes
	tail     *tail

	mu       sync.Mutex
	written  uint64   // stream bytes that QEMU took
	answered messages // what QEMU said on its return path
	used     bool     // QEMU said anything
}

// NewDest returns a Dest whose Run has yet to be called, once.
func NewDest(cfg DestConfig) *Dest { return &Dest{cfg: cfg, offers: newOffers(cfg.Have, cfg.Return)} }

// Run writes the stream to QEMU and QEMU's answers to Source. It returns nil
// when the whole stream was written and QEMU has closed its side without
// complaint. Where no return path is in use QEMU cannot complain: whether it
// has loaded the state is then for the caller to ask.
func (d *Dest) Run(ctx context.Context) error {
	if err := d.start(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		<-ctx.Done()
		d.conn.Close()
	})
	returned := make(chan struct{})
	wg.Go(func() {
		defer close(returned)
		if err := d.returnPath(ctx); err != nil {
			cancel(err)
		}
	})
	for range searchers {
		wg.Go(func() { cancel(d.offers.run(ctx)) })
	}
	err := d.stream(ctx, cancel)
	if err == nil {
		select {
		case <-returned:
		case <-ctx.Done():
		}
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	cancel(err)
	wg.Wait()
	if d.tail != nil {
		d.tail.wait()
	}
	return errors.Join(err, d.in.close())
}

// start waits for the first frame and connects to QEMU.
func (d *Dest) start(ctx context.Context) error {
	frame, err := d.cfg.Frames.Recv(ctx, nil)
	if err != nil {
		return fmt.Errorf("receive memory frame: %w", err)
	}
	slots, err := d.accept(frame)
	if err != nil {
		return err
	}
	if d.in, err = newUnbatch(slots); err != nil {
		return err
	}
	d.conn, err = d.cfg.Dial(ctx)
	if err != nil {
		return errors.Join(fmt.Errorf("connect to destination QEMU: %w", err), d.in.close())
	}
	return nil
}

// accept reads the start frame: how many pages Source wants to be kept.
func (d *Dest) accept(frame []byte) (slots uint32, err error) {
	if len(frame) < 3 || frame[0] != frameStart {
		return 0, fmt.Errorf("%w: the first is not a start", ErrFrame)
	}
	if v := binary.BigEndian.Uint16(frame[1:]); v != Version {
		return 0, fmt.Errorf("%w: version %d, this side speaks %d: run the same release of wanmig at both sites", ErrFrame, v, Version)
	}
	if len(frame) != startLength {
		return 0, fmt.Errorf("%w: start of %d bytes", ErrFrame, len(frame))
	}
	slots = binary.BigEndian.Uint32(frame[3:])
	if limit := slotsIn(d.cfg.Store); slots > limit {
		return 0, fmt.Errorf("%w: the source wants %d pages kept, %d are allowed here", ErrFrame, slots, limit)
	}
	return slots, nil
}

// stream writes the stream up to its end frame to QEMU.
func (d *Dest) stream(ctx context.Context, cancel context.CancelCauseFunc) error {
	var buf []byte
	for {
		frame, err := d.cfg.Frames.Recv(ctx, buf)
		if err != nil {
			return fmt.Errorf("receive memory frame: %w", err)
		}
		if len(frame) == 0 {
			return fmt.Errorf("%w: empty", ErrFrame)
		}
		buf = frame
		switch frame[0] {
		case frameBatch, frameUse:
			if frame[0] == frameUse {
				if d.in.held, err = d.offers.use(ctx); err != nil {
					return err
				}
			}
			p, err := d.in.decode(frame)
			if err != nil {
				return err
			}
			d.received += uint64(len(p))
			if err := d.put(ctx, p); err != nil {
				return err
			}
		case frameOffer:
			if d.tail != nil {
				return fmt.Errorf("%w: an offer in the tail", ErrFrame)
			}
			if err := d.offers.take(frame); err != nil {
				return err
			}
		case frameMark:
			if len(frame) != numberHeader {
				return fmt.Errorf("%w: a mark of %d bytes", ErrFrame, len(frame))
			}
			frame[0] = framePassed
			if err := d.cfg.Return.Send(ctx, frame); err != nil {
				return fmt.Errorf("answer a mark: %w", err)
			}
		case frameTail:
			if len(frame) != 1 || d.tail != nil {
				return fmt.Errorf("%w: tail out of place", ErrFrame)
			}
			d.tail = newTail(func() error { return d.cfg.Gate(ctx) }, d.write, cancel)
		case frameEnd:
			if n := len(d.offers.open); n > 0 {
				return fmt.Errorf("%w: the stream ends with %d offers that are not used", ErrFrame, n)
			}
			if len(frame) != 9 || binary.BigEndian.Uint64(frame[1:]) != d.received {
				return fmt.Errorf("%w: the stream ends at %d bytes, not where the source says", ErrFrame, d.received)
			}
			if d.cfg.OnEnd != nil {
				d.cfg.OnEnd()
			}
			return d.finish(ctx)
		default:
			return fmt.Errorf("%w: unknown type %#02x", ErrFrame, frame[0])
		}
	}
}

func (d *Dest) put(ctx context.Context, p []byte) error {
	if d.tail != nil {
		return d.tail.put(ctx, p)
	}
	return d.write(p)
}

func (d *Dest) write(p []byte) error {
	n, err := d.conn.Write(p)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.written += uint64(n)
	if err != nil {
		return d.closed(err)
	}
	return nil
}

// finish tells QEMU that there is no more, once it has everything.
func (d *Dest) finish(ctx context.Context) error {
	if d.tail != nil {
		if err := d.tail.opened(ctx); err != nil {
			return err
		}
	}
	// A QEMU that expects more fails now rather than waiting for ever. One that
	// is gone already has said why on the return path.
	if c, ok := d.conn.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
	return nil
}

// closed describes how QEMU ended the stream. The caller holds d.mu.
func (d *Dest) closed(err error) error {
	return fmt.Errorf("%w after %d bytes: see its log: %w", ErrQEMU, d.written, err)
}

// returnPath passes QEMU's answers on until QEMU closes its side.
func (d *Dest) returnPath(ctx context.Context) error {
	frame := make([]byte, 1+maxReturn)
	frame[0] = frameReturn
	for {
		n, err := d.conn.Read(frame[1:])
		if n > 0 {
			d.note(frame[1 : 1+n])
			if err := d.cfg.Return.Send(ctx, frame[:1+n]); err != nil {
				return fmt.Errorf("send return path: %w", err)
			}
		}
		if err != nil {
			return d.returnEnded(err)
		}
	}
}

func (d *Dest) note(p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.used = true
	for len(p) > 0 {
		p = p[d.answered.next(p):]
	}
}

// returnEnded judges why QEMU has closed its side. Without a return path its
// close says nothing yet: it does so as soon as it has all it wants.
func (d *Dest) returnEnded(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.answered.loaded():
		return nil
	case d.answered.shut:
		return fmt.Errorf("%w after %d bytes: it reports status %d: see its log", ErrQEMU, d.written, d.answered.status)
	case d.used || !errors.Is(err, io.EOF):
		return d.closed(err)
	}
	return nil
}
