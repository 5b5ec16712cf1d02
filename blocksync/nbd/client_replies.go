package nbd

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// maxPieces bounds what a scattered reply to one read makes the client remember.
const maxPieces = 4096

// readReplies hands replies to their calls until the connection is lost, and then ends every
// call that still waits.
func (c *Client) readReplies() {
	var err error
	for err == nil {
		err = c.readReply()
	}
	err = c.fail(fmt.Errorf("connection lost: read reply: %w", err))
	c.mu.Lock()
	defer c.mu.Unlock()
	for cookie, q := range c.pending {
		q.err = err
		c.finish(cookie, q)
	}
}

// finish ends a call; c.mu is held.
func (c *Client) finish(cookie uint64, q *call) {
	delete(c.pending, cookie)
	close(q.done)
}

// readReply reads one simple reply or one chunk.
func (c *Client) readReply() error {
	var b [chunkHeaderSize]byte
	if _, err := io.ReadFull(c.in, b[:4]); err != nil {
		return err
	}
	switch magic := binary.BigEndian.Uint32(b[:]); {
	case magic == magicSimple:
		if _, err := io.ReadFull(c.in, b[4:simpleReplySize]); err != nil {
			return noEOF(err)
		}
		d := cursor{b: b[4:simpleReplySize]}
		return c.takeSimple(d.u32(), d.u64())
	case magic == magicChunk && c.structured:
		if _, err := io.ReadFull(c.in, b[4:]); err != nil {
			return noEOF(err)
		}
		d := cursor{b: b[4:]}
		flags, t, cookie, length := d.u16(), chunkType(d.u16()), d.u64(), d.u32()
		return c.takeChunk(flags, t, cookie, length)
	default:
		return protocolErrorf("reply begins with %#x", magic)
	}
}

// noEOF keeps a cut inside a message apart from an end between two.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (c *Client) lookup(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if q := c.pending[cookie]; q != nil {
		return q, nil
	}
	return nil, protocolErrorf("reply to cookie %d, which nobody waits for", cookie)
}

func (c *Client) takeSimple(code uint32, cookie uint64) error {
	q, err := c.lookup(cookie)
	switch {
	case err != nil:
		return err
	case q.cmd == cmdBlockStatus && code == 0:
		return protocolErrorf("simple reply to a block status")
	case q.cmd == cmdRead && c.structured:
		return protocolErrorf("simple reply to a read, after structured replies were agreed")
	case q.extents != nil || q.err != nil:
		return protocolErrorf("simple reply after a chunk")
	case code != 0:
		q.err = errnoOf(code)
	case q.cmd == cmdRead:
		if err := c.fill(q, 0, q.length, false); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finish(cookie, q)
	return nil
}

func (c *Client) takeChunk(flags uint16, t chunkType, cookie uint64, length uint32) error {
	q, err := c.lookup(cookie)
	if err != nil {
		return err
	}
	last := flags&chunkDone != 0
	switch {
	case t == chunkNone && length == 0 && last:
	case t == chunkData && q.cmd == cmdRead:
		err = c.takeData(q, length)
	case t == chunkHole && q.cmd == cmdRead:
		err = c.takeHole(q, length)
	case t == chunkBlockStatus && q.cmd == cmdBlockStatus && q.extents == nil:
		err = c.takeStates(q, length)
	case t&chunkIsError != 0:
		err = c.takeError(q, t, length)
	default:
		err = protocolErrorf("chunk of type %d and %d bytes in reply to a %v", t, length, q.cmd)
	}
	if err != nil || !last {
		return err
	}
	switch {
	case q.err != nil:
		q.extents = nil
	case q.cmd == cmdRead && !q.filled.whole(q.length):
		return protocolErrorf("reply to a read that does not give each of its %d bytes once", q.length)
	case q.cmd == cmdBlockStatus && q.extents == nil:
		return protocolErrorf("reply to a block status without one")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finish(cookie, q)
	return nil
}

func (c *Client) takeData(q *call, length uint32) error {
	var b [8]byte
	if length <= uint32(len(b)) {
		return protocolErrorf("data chunk of %d bytes", length)
	}
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return noEOF(err)
	}
	return c.takePiece(q, binary.BigEndian.Uint64(b[:]), length-uint32(len(b)), false)
}

func (c *Client) takeHole(q *call, length uint32) error {
	var b [12]byte
	if length != uint32(len(b)) {
		return protocolErrorf("hole chunk of %d bytes", length)
	}
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return noEOF(err)
	}
	return c.takePiece(q, binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint32(b[8:]), true)
}

func (c *Client) takePiece(q *call, off uint64, length uint32, hole bool) error {
	at := off - uint64(q.offset)
	if off < uint64(q.offset) || at > uint64(q.length) || uint64(length) > uint64(q.length)-at || length == 0 {
		return protocolErrorf("%d bytes at %d in reply to a read of %d at %d", length, off, q.length, q.offset)
	}
	if !q.filled.add(int64(at), int64(length)) {
		return protocolErrorf("reply to a read in more than %d pieces", maxPieces)
	}
	return c.fill(q, int64(at), int64(length), hole)
}

// fill puts a hole's zeros, or the next n bytes of the connection, into a read's buffer; if
// its caller has left, it passes over them.
func (c *Client) fill(q *call, at, n int64, hole bool) error {
	c.mu.Lock()
	into := q.into
	q.filling = into != nil
	c.mu.Unlock()
	var err error
	switch {
	case hole && into != nil:
		clear(into[at : at+n])
	case hole:
	case into != nil:
		_, err = io.ReadFull(c.in, into[at:at+n])
	default:
		_, err = c.in.Discard(int(n))
	}
	c.mu.Lock()
	q.filling = false
	c.mu.Unlock()
	return noEOF(err)
}

func (c *Client) takeStates(q *call, length uint32) error {
	if length < 12 || length%8 != 4 || length > 4+8*maxTheirExtents {
		return protocolErrorf("block status chunk of %d bytes", length)
	}
	var b [8]byte
	if _, err := io.ReadFull(c.in, b[:4]); err != nil {
		return noEOF(err)
	}
	if id := binary.BigEndian.Uint32(b[:]); id != c.contextID {
		return protocolErrorf("block status of context %d", id)
	}
	at, end := q.offset, q.offset+q.length
	for range length / 8 {
		if _, err := io.ReadFull(c.in, b[:]); err != nil {
			return noEOF(err)
		}
		n, state := int64(binary.BigEndian.Uint32(b[:])), binary.BigEndian.Uint32(b[4:])
		if n == 0 || at == end {
			return protocolErrorf("block status with an extent of %d bytes at %d", n, at)
		}
		// The last extent may go on beyond what was asked for.
		n = min(n, end-at)
		q.extents = append(q.extents, Extent{Offset: at, Length: n, Hole: state&stateHole != 0, Zero: state&stateZero != 0})
		at += n
	}
	return nil
}

// takeError reads an error chunk; the first of a reply counts.
func (c *Client) takeError(q *call, t chunkType, length uint32) error {
	fixed := uint32(6)
	if t == chunkErrorOffset {
		fixed += 8
	}
	if length < fixed || length > fixed+maxString {
		return protocolErrorf("error chunk of %d bytes", length)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return noEOF(err)
	}
	d := cursor{b: b}
	code, text := d.u32(), d.take(int(d.u16()))
	if d.short || code == 0 {
		return protocolErrorf("error chunk %#x of %d bytes does not hold an error", t, length)
	}
	if q.err != nil {
		return nil
	}
	q.err = errnoOf(code)
	if len(text) > 0 {
		q.err = fmt.Errorf("%w (server: %q)", q.err, messageText(string(text)))
	}
	return nil
}

// coverage is the set of bytes of a read that have come, in pieces as they came.
type coverage struct{ pieces []piece }

type piece struct{ from, to int64 }

// add notes n bytes at off; false if there are too many pieces.
func (c *coverage) add(off, n int64) bool {
	if last := len(c.pieces) - 1; last >= 0 && c.pieces[last].to == off {
		c.pieces[last].to += n
		return true
	}
	c.pieces = append(c.pieces, piece{off, off + n})
	return len(c.pieces) <= maxPieces
}

// whole tells whether each of n bytes came exactly once.
func (c *coverage) whole(n int64) bool {
	slices.SortFunc(c.pieces, func(a, b piece) int { return cmp.Compare(a.from, b.from) })
	at := int64(0)
	for _, p := range c.pieces {
		if p.from != at {
			return false
		}
		at = p.to
	}
	return at == n
}
