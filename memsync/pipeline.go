package memsync

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/wanmig/wanmig/compress"
)

const (
	// offerAbove is how much of the first pass has to be left for pages to be
	// offered, and for batches to wait for answers. Below it QEMU may have written
	// all that is left and stopped the guest: a socket buffer of 208 KiB holds
	// 23,000 zero pages.
	offerAbove = 128 << 20
	// laterRound is how many pages in a row that were sent before tell that the
	// first pass is over: a guest may tell QEMU of free pages, which are never sent.
	laterRound = 1024
	// patience is how many pages that were offered in a row may be found nowhere.
	// Beyond it only one batch in sampling is offered.
	patience = 4096
	sampling = 16
	// mayEncode is which part of the time may go into encoding. Batches are encoded
	// and sent in turn: meanwhile the link has little more than what it has queued.
	mayEncode = 0.5
)

// pipeline takes batches to the link in the order of the stream. One with pages
// that were offered waits in it for their answer; meanwhile the stream is read
// on, until maxOffers batches are on their way.
type pipeline struct {
	frames  frameWriter
	encoder *compress.Encoder
	press   press
	free    chan *batch // those not in use
	queue   chan *batch // those to be sent; both have room for all
	made    int         // batches
	turns   int         // of next
	start   []byte      // the first frame, nil when it is sent
	frame   []byte      // of an offer
	offers  uint32      // made

	mu      sync.Mutex
	waiting map[uint32]*batch // offered and not answered, by the offer's number
	misses  int               // pages found nowhere since one was found
	wire    uint64            // bytes of frames sent
	counts  Reduction         // of what is sent
}

func newPipeline(frames frameWriter, slots uint32) *pipeline {
	start := binary.BigEndian.AppendUint16([]byte{frameStart}, Version)
	encoder := compress.NewEncoder(mayEncode)
	return &pipeline{
		frames:  frames,
		encoder: encoder,
		press:   press{encode: encoder.Encode},
		free:    make(chan *batch, maxOffers),
		queue:   make(chan *batch, maxOffers),
		start:   binary.BigEndian.AppendUint32(start, slots),
		waiting: map[uint32]*batch{},
	}
}

// next returns an empty batch.
func (p *pipeline) next(ctx context.Context, pageBits uint8) (*batch, error) {
	var b *batch
	if len(p.free) == 0 && p.made < maxOffers {
		p.made++
		b = newBatch()
	} else {
		select {
		case b = <-p.free:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	b.pageBits, b.asks = pageBits, p.worthwhile()
	return b, nil
}

// put offers what is to be offered of a batch, and sends the batch after those
// before it.
func (p *pipeline) put(ctx context.Context, b *batch) error {
	if len(b.offered) > 0 {
		if err := p.send(ctx, p.offer(b)); err != nil {
			return err
		}
	}
	p.queue <- b
	return nil
}

// offer returns the frame that offers the pages of a batch.
func (p *pipeline) offer(b *batch) []byte {
	p.mu.Lock()
	p.waiting[p.offers] = b
	p.mu.Unlock()
	p.frame = binary.BigEndian.AppendUint32(append(p.frame[:0], frameOffer), p.offers)
	for i := range b.offered {
		p.frame = append(p.frame, b.offered[i].sum[:]...)
	}
	p.offers++
	return p.frame
}

// run sends the batches that were put, until ctx is done.
func (p *pipeline) run(ctx context.Context) error {
	for {
		var b *batch
		select {
		case b = <-p.queue:
		case <-ctx.Done():
			return ctx.Err()
		}
		if len(b.offered) > 0 {
			select {
			case <-b.answered:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if b.stream > 0 {
			p.encoder.Hurry(b.hurry)
			frame := p.press.seal(b)
			begun := time.Now()
			if err := p.send(ctx, frame); err != nil {
				return err
			}
			p.encoder.Sent(time.Since(begun))
			p.mu.Lock()
			p.counts = p.press.counts
			p.mu.Unlock()
		}
		if b.awaited {
			b.sent <- struct{}{}
		}
		b.reset()
		p.free <- b
	}
}

// send sends a frame.
func (p *pipeline) send(ctx context.Context, frame []byte) error {
	if err := p.frames.Send(ctx, frame); err != nil {
		return fmt.Errorf("send memory frame: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wire += uint64(len(frame))
	return nil
}

// begin sends the start, once.
func (p *pipeline) begin(ctx context.Context) error {
	if p.start == nil {
		return nil
	}
	start := p.start
	p.start = nil
	return p.send(ctx, start)
}

// held takes the destination's answer to an offer.
func (p *pipeline) held(body []byte) error {
	if len(body) < numberHeader-1 {
		return fmt.Errorf("%w: an answer of %d bytes to an offer", ErrFrame, len(body))
	}
	number, origins := binary.BigEndian.Uint32(body), body[numberHeader-1:]
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.waiting[number]
	if b == nil {
		return fmt.Errorf("%w: an answer to offer %d, which was not made or is answered", ErrFrame, number)
	}
	var err error
	if b.found, err = parseOrigins(b.found[:0], origins, len(b.offered)); err != nil {
		return err
	}
	for _, o := range b.found {
		p.misses++
		if o != compress.Nowhere {
			p.misses = 0
		}
	}
	delete(p.waiting, number)
	b.answered <- struct{}{}
	return nil
}

// worthwhile tells whether pages of the next batch are offered.
func (p *pipeline) worthwhile() bool {
	p.turns++
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.misses < patience || p.turns%sampling == 0
}

// totals returns the bytes of the frames sent, and as what pages were.
func (p *pipeline) totals() (uint64, Reduction) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wire, p.counts
}
