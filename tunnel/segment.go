package tunnel

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// segment is a numbered frame on its way: it waits in a queue, stands in the books
// of the carriers that have taken it, and is forgotten when the peer has
// acknowledged it on one of them.
type segment struct {
	out    *outflow // of data; nil for other frames
	offset uint64
	flags  uint8
	length int    // of the data
	block  *block // of data
	wire   []byte // the frame, once it was taken
	taken  time.Time
	users  int  // books that it stands in, and writers at work on it
	books  int  // of these, the books
	over   bool // acknowledged, or void with its channel
	echoed bool // a second carrier has it too, or had
	queued bool // once more: the carrier that had it is gone
}

func (g *segment) end() uint64 { return g.offset + uint64(g.length) }

// block holds a data frame: its head and up to maxData bytes.
type block [dataHead + maxData]byte

var blocks = sync.Pool{New: func() any { return new(block) }}

// encode fixes what the frame says.
func (g *segment) encode() {
	if g.wire != nil {
		return
	}
	head := frame{kind: kindData, flags: g.flags, channel: g.out.id, offset: g.offset}
	g.wire = head.append(g.block[:0])
	g.wire = g.block[:dataHead+g.length]
	g.wire[dataHead-2], g.wire[dataHead-1] = byte(g.length>>8), byte(g.length)
}

// release gives up one use. The bytes go when nobody can need them any more.
func (g *segment) release() {
	if g.users--; g.users == 0 && g.over && !g.queued {
		g.free()
	}
}

func (g *segment) free() {
	if g.block != nil {
		blocks.Put(g.block)
		g.block, g.wire = nil, nil
	}
}

// outflow is a channel's direction to the peer. The session's lock guards it.
type outflow struct {
	id        uint32
	priority  Priority
	unordered bool

	queue    []*segment // not taken, or to be sent again; ascending
	unsent   int        // bytes in the queue that were never taken
	offset   uint64     // of the next byte that is queued
	limit    uint64     // of what the peer lets be sent
	sealed   bool       // no byte follows
	cause    error      // why no byte can follow
	finished bool       // the peer wants no more, or has all

	room chan struct{} // holds a token when the queue has become shorter
}

// queueLimit is how much of a channel waits for the carriers: enough that the next
// one finds something, and little beside what is on its way.
const queueLimit = 64 << 10

func newOutflow(id uint32, p Priority) *outflow {
	return &outflow{id: id, priority: p, limit: firstCredit, room: make(chan struct{}, 1)}
}

// last returns the segment that still takes n more bytes, or nil.
func (o *outflow) last(n int) *segment {
	if len(o.queue) == 0 || o.unordered {
		return nil
	}
	g := o.queue[len(o.queue)-1]
	if g.wire != nil || g.over || g.flags&flagEnd != 0 || g.length+n > maxData {
		return nil
	}
	return g
}

// push queues head and p, of at most maxData bytes together, behind the others.
// They may become part of an earlier segment.
func (o *outflow) push(head, p []byte) {
	n := len(head) + len(p)
	g := o.last(n)
	if g == nil {
		g = &segment{out: o, offset: o.offset, block: blocks.Get().(*block)}
		o.queue = append(o.queue, g)
	}
	bytes := g.block[dataHead+g.length:]
	copy(bytes[copy(bytes, head):], p)
	g.length += n
	o.offset += uint64(n)
	o.unsent += n
}

// head returns the segment that may go next, or nil.
func (o *outflow) head() *segment {
	for len(o.queue) > 0 && o.queue[0].over { // another carrier has brought it after all
		if o.queue[0].users == 0 {
			o.queue[0].free()
		}
		o.queue[0].queued = false
		o.queue = o.queue[1:]
	}
	if len(o.queue) == 0 || o.queue[0].end() > o.limit {
		return nil
	}
	return o.queue[0]
}

// pop takes the head from the queue.
func (o *outflow) pop() *segment {
	g := o.queue[0]
	g.queued = false
	o.queue[0] = nil
	o.queue = o.queue[1:]
	if g.wire == nil {
		o.unsent -= g.length
		g.encode()
		signal(o.room)
	}
	return g
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// seal ends the direction behind what is queued.
func (o *outflow) seal() {
	o.sealed = true
	if g := o.last(0); g != nil {
		g.flags |= flagEnd
		return
	}
	g := &segment{out: o, offset: o.offset, flags: flagEnd, block: blocks.Get().(*block)}
	o.queue = append(o.queue, g)
}

// requeue puts segments back in their places.
func (o *outflow) requeue(g *segment) {
	g.queued = true
	at, _ := slices.BinarySearchFunc(o.queue, g.offset, func(q *segment, offset uint64) int {
		return cmp.Compare(q.offset, offset)
	})
	o.queue = slices.Insert(o.queue, at, g)
}
