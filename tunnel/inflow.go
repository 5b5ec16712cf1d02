package tunnel

import "fmt"

// inflow is a channel's direction from the peer. The session's lock guards it.
type inflow struct {
	unordered bool
	window    uint64 // bytes that the peer may be ahead of the channel's user

	have    uint64           // offset before which nothing is missing
	used    uint64           // bytes that the channel's user has had
	limit   uint64           // of what the peer may send
	ready   []piece          // for the user, in order
	ahead   map[uint64]piece // behind what is missing, by offset
	waiting int              // bytes in ahead
	last    uint64           // where the direction ends, when sealed
	sealed  bool             // last is known
	reset   bool             // sealed, without a last
	cause   error            // why the user gets nothing more
	closed  bool             // the peer was told that no more is wanted
	counted int              // pieces, as the session has counted them

	arrived chan struct{} // holds a token when the user may find something new
}

// piece is what a data frame has brought.
type piece struct {
	block *block // that data is in; nil for small data
	data  []byte // nil when it is with the user already, or will not get there
	size  int
}

// smallPiece is up to which length bytes have memory of their own, so that none
// costs more than twice its length, and a little.
const smallPiece = len(block{}) / 2

func newPiece(n int) piece {
	if n <= smallPiece {
		return piece{data: make([]byte, n), size: n}
	}
	b := blocks.Get().(*block)
	return piece{b, b[:n], n}
}

func (p *piece) free() {
	if p.block != nil {
		blocks.Put(p.block)
	}
	p.block, p.data = nil, nil
}

func newInflow() *inflow {
	return &inflow{window: firstCredit, limit: firstCredit, ahead: make(map[uint64]piece), arrived: make(chan struct{}, 1)}
}

// take keeps the bytes of a data frame, unless they came before.
func (in *inflow) take(f frame, p piece) error {
	if err := in.check(f); err != nil {
		p.free()
		return err
	}
	if f.flags&flagEnd != 0 {
		in.sealed, in.last = true, f.end()
		signal(in.arrived)
	}
	if _, twice := in.ahead[f.offset]; twice || p.size == 0 || f.offset < in.have {
		p.free()
	} else {
		in.ahead[f.offset] = in.release(p)
		in.waiting += p.size
	}
	for {
		next, there := in.ahead[in.have]
		if !there {
			break
		}
		delete(in.ahead, in.have)
		in.waiting -= next.size
		in.have += uint64(next.size)
		if next.data != nil {
			in.queue(next)
			signal(in.arrived)
		}
	}
	return in.checkOverlap()
}

// queue appends a piece for the user, to the last one where both are small.
func (in *inflow) queue(p piece) {
	if n := len(in.ready); n > 0 && p.block == nil && !in.unordered {
		if last := &in.ready[n-1]; last.block == nil && len(last.data)+len(p.data) <= smallPiece {
			last.data = append(last.data, p.data...)
			last.size += p.size
			return
		}
	}
	in.ready = append(in.ready, p)
}

// pieces is how many there are, of which each costs memory beside its bytes.
func (in *inflow) pieces() int { return len(in.ready) + len(in.ahead) }

// release gives the user a frame that need not wait for others before it.
func (in *inflow) release(p piece) piece {
	switch {
	case in.closed:
		p.free()
	case in.unordered && p.data != nil:
		in.ready = append(in.ready, p)
		signal(in.arrived)
		return piece{size: p.size}
	}
	return p
}

// begin passes over the channel's header, behind which some may have come already.
func (in *inflow) begin(n int, unordered bool) {
	in.have, in.used = uint64(n), uint64(n)
	in.unordered = unordered
	for offset, p := range in.ahead {
		in.ahead[offset] = in.release(p)
	}
}

func (in *inflow) check(f frame) error {
	switch {
	case f.end() > in.limit:
		return fmt.Errorf("%w: data up to offset %d, %d was allowed", ErrFormat, f.end(), in.limit)
	case in.reset:
		return nil // what was on its way before
	case in.sealed && (f.end() > in.last || f.flags&flagEnd != 0 && f.end() < in.last):
		return fmt.Errorf("%w: data up to offset %d of a channel that ends at %d", ErrFormat, f.end(), in.last)
	case f.offset < in.have && f.end() > in.have:
		return fmt.Errorf("%w: data from offset %d to %d, and before up to %d", ErrFormat, f.offset, f.end(), in.have)
	}
	return nil
}

// checkOverlap bounds what a peer can have us keep: bytes that do not overlap fit
// between have and limit.
func (in *inflow) checkOverlap() error {
	if uint64(in.waiting) > in.limit-in.have || in.sealed && !in.reset && in.have > in.last {
		return fmt.Errorf("%w: data overlaps behind offset %d", ErrFormat, in.have)
	}
	return nil
}

// copy moves bytes to the user.
func (in *inflow) copy(p []byte) int {
	total := 0
	for total < len(p) && len(in.ready) > 0 {
		next := &in.ready[0]
		n := copy(p[total:], next.data)
		next.data = next.data[n:]
		total += n
		if len(next.data) == 0 {
			next.free()
			in.ready[0] = piece{}
			in.ready = in.ready[1:]
		}
	}
	in.used += uint64(total)
	return total
}

// frame moves a whole frame of an unordered channel to the user.
func (in *inflow) frame(buf []byte) []byte {
	next := in.ready[0]
	in.ready[0] = piece{}
	in.ready = in.ready[1:]
	in.used += uint64(next.size)
	buf = append(buf, next.data...)
	next.free()
	return buf
}

// drained says that the user has had everything there is.
func (in *inflow) drained() bool { return in.sealed && in.used == in.last }

// stop gives the user nothing more. What has come is void.
func (in *inflow) stop(cause error) {
	if in.cause == nil {
		in.cause = cause
	}
	in.closed = true
	for i := range in.ready {
		in.ready[i].free()
	}
	in.ready = nil
	for offset, p := range in.ahead {
		p.free()
		in.ahead[offset] = piece{size: p.size}
	}
	signal(in.arrived)
}

// grant returns the new limit when it is time to tell the peer.
func (in *inflow) grant() (limit uint64, due bool) {
	if in.closed || in.sealed || in.used+in.window < in.limit+in.window/4 {
		return 0, false
	}
	return in.used + in.window, true
}
