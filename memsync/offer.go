package memsync

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/wanmig/wanmig/compress"
)

// searchers is how many offers are looked up at once.
const searchers = 2

// searcher looks pages up by their fingerprints. It tells where each was found,
// and gives the content of those that were at their page's place; nil when
// there is none.
type searcher interface {
	Search(ctx context.Context, sums []compress.Fingerprint) (found []compress.Origin, content []byte)
}

// offer is pages that the source has told the fingerprints of.
type offer struct {
	number uint32
	sums   []compress.Fingerprint
	held   []byte        // the pages that were found, one after the other
	done   chan struct{} // closed when the answer is sent
}

// offers are what the source has offered and not used yet. Pages that were found
// are kept until then: whatever is written meanwhile, these are the bytes that
// the source was told of.
type offers struct {
	have    searcher // nil: nothing is held
	answers frameWriter
	asked   chan *offer // has room for all
	open    []*offer    // in their order
	next    uint32      // number
}

func newOffers(have searcher, answers frameWriter) *offers {
	return &offers{have: have, answers: answers, asked: make(chan *offer, maxOffers)}
}

// take has an offer looked up beside what is received.
func (o *offers) take(frame []byte) error {
	sums, err := parseOffer(frame, o.next)
	if err != nil {
		return err
	}
	if len(o.open) == maxOffers {
		return fmt.Errorf("%w: offer %d, with %d that are not used", ErrFrame, o.next, len(o.open))
	}
	x := &offer{number: o.next, sums: sums, done: make(chan struct{})}
	o.next++
	o.open = append(o.open, x)
	o.asked <- x
	return nil
}

// use returns the pages that were found of the oldest offer, which ends it.
func (o *offers) use(ctx context.Context) ([]byte, error) {
	if len(o.open) == 0 {
		return nil, fmt.Errorf("%w: a batch of an offer that was not made", ErrFrame)
	}
	x := o.open[0]
	o.open[0] = nil
	o.open = o.open[1:]
	select {
	case <-x.done:
		return x.held, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run answers offers until ctx is done.
func (o *offers) run(ctx context.Context) error {
	var frame []byte
	for {
		select {
		case x := <-o.asked:
			found := o.search(ctx, x)
			frame = appendOrigins(binary.BigEndian.AppendUint32(append(frame[:0], frameHeld), x.number), found)
			if err := o.answers.Send(ctx, frame); err != nil {
				return fmt.Errorf("answer an offer of pages: %w", err)
			}
			close(x.done)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// search looks an offer up, and moves what was found together.
func (o *offers) search(ctx context.Context, x *offer) []compress.Origin {
	if o.have == nil {
		return make([]compress.Origin, len(x.sums))
	}
	found, content := o.have.Search(ctx, x.sums)
	n := 0
	for i, where := range found {
		if where != compress.Nowhere {
			n += copy(content[n:], content[i*storePage:(i+1)*storePage])
		}
	}
	x.held = content[:n]
	return found
}

// parseOffer reads an offer, which must have the number that is next.
func parseOffer(frame []byte, next uint32) ([]compress.Fingerprint, error) {
	if len(frame) < numberHeader {
		return nil, fmt.Errorf("%w: offer of %d bytes", ErrFrame, len(frame))
	}
	number, rest := binary.BigEndian.Uint32(frame[1:]), frame[numberHeader:]
	pages := len(rest) / sumSize
	if number != next || pages == 0 || pages > maxOffered || len(rest)%sumSize != 0 {
		return nil, fmt.Errorf("%w: offer %d of %d bytes, offer %d may have %d pages", ErrFrame, number, len(rest), next, maxOffered)
	}
	sums := make([]compress.Fingerprint, pages)
	for i := range sums {
		copy(sums[i][:], rest[i*sumSize:])
	}
	return sums, nil
}

// appendOrigins puts four origins into a byte, the first into its lowest bits.
func appendOrigins(dst []byte, found []compress.Origin) []byte {
	for i, o := range found {
		if i%originsPerByte == 0 {
			dst = append(dst, 0)
		}
		dst[len(dst)-1] |= byte(o) << (2 * (i % originsPerByte))
	}
	return dst
}

// parseOrigins appends n origins, which are all of p.
func parseOrigins(dst []compress.Origin, p []byte, n int) ([]compress.Origin, error) {
	if len(p) != (n+originsPerByte-1)/originsPerByte {
		return nil, fmt.Errorf("%w: %d bytes of answer to an offer of %d pages", ErrFrame, len(p), n)
	}
	for i := range originsPerByte * len(p) {
		o := compress.Origin(p[i/originsPerByte] >> (2 * (i % originsPerByte)) & 3)
		switch {
		case i < n:
			dst = append(dst, o)
		case o != compress.Nowhere:
			return nil, fmt.Errorf("%w: an answer to more than the %d pages of its offer", ErrFrame, n)
		}
	}
	return dst, nil
}
