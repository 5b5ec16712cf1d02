package lab

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"time"
)

const linkMTU = 1500

// path decides what becomes of each packet of one direction, in virtual time:
// it reads no clock and does no I/O, so its caller may call late without an
// effect on any later decision.
//
//	admit --> push --> queue --(one at a time, at the rate)--> loss --> pipe, held --(delay)--> pop
//	      |        \-> dropped when full                         \-> lost
//	      \-> blocked, or too big
type path struct {
	rate      int64 // bits per second, 0 is unlimited
	delay     time.Duration
	limit     int64 // of queued
	loss      lossModel
	cut       bool
	mtu       int // 0: whatever comes
	noICMP    bool
	block     []byte     // protocols
	random    *rand.Rand // of the next two, so that they do not change the losses
	reorder   float64
	duplicate float64

	queue  fifo // each with the time of its arrival
	queued int64
	free   time.Duration // when the transmitter has sent what it has begun
	pipe   fifo          // each with the time of its delivery
	latest time.Duration // the last of those: nothing overtakes it
	held   []timed       // the packets that others overtake, by the times of their delivery
	spare  [][]byte

	counters LinkCounters
}

func newPath(s LinkSettings, cut bool, stream uint64) *path {
	p := &path{}
	p.loss.random = rand.New(rand.NewPCG(s.Seed, stream))
	p.random = rand.New(rand.NewPCG(^s.Seed, stream))
	p.configure(0, s, cut)
	return p
}

// configure changes the settings from now on. What has left the queue keeps
// its time of delivery.
func (p *path) configure(now time.Duration, s LinkSettings, cut bool) {
	p.advance(now)
	p.rate = s.Rate
	p.delay = s.RTT / 2
	p.limit = s.queue()
	p.cut = cut
	p.loss.configure(s.Loss, s.Burst)
	p.mtu, p.noICMP = s.MTU, s.NoICMP
	p.block = nil
	for _, name := range s.Block {
		p.block = append(p.block, blockable[name])
	}
	p.reorder, p.duplicate = s.Reorder, s.Duplicate
}

// admit says whether a packet may go onto the path at all. If not there may be
// an answer for who has sent it.
func (p *path) admit(data []byte) (answer []byte, ok bool) {
	if len(p.block) > 0 && slices.Contains(p.block, readHeaders(data).protocol) {
		p.counters.Blocked++
		return nil, false
	}
	if p.mtu > 0 && len(data) > p.mtu {
		p.counters.TooBig++
		if p.noICMP {
			return nil, false
		}
		return tooBig(data, p.mtu), false
	}
	return nil, true
}

// push copies a packet that arrives now, or drops it.
func (p *path) push(now time.Duration, data []byte) {
	p.advance(now)
	idle := p.queue.len() == 0 && p.free <= now
	if !idle && p.queued+int64(len(data)) > p.limit {
		p.counters.Dropped++
		return
	}
	p.queue.push(timed{now, append(p.buffer(), data...)})
	p.queued += int64(len(data))
	p.advance(now)
}

// advance sends what the transmitter begins to send up to now.
func (p *path) advance(now time.Duration) {
	for p.queue.len() > 0 {
		head := p.queue.head()
		start := max(p.free, head.at)
		if start > now {
			return
		}
		data := p.queue.pop().data
		p.queued -= int64(len(data))
		p.free = start + p.sendTime(len(data))
		p.counters.Packets++
		p.counters.Bytes += uint64(len(data))
		switch {
		case p.cut:
			p.counters.Cut++
			p.recycle(data)
		case p.loss.lose():
			p.counters.Lost++
			p.recycle(data)
		default:
			p.carry(data)
		}
	}
}

// maxHold is how much later a packet is delivered that others overtake. It is
// what two ways of a router differ in, or a radio's second try takes.
const maxHold = 5 * time.Millisecond

// carry has a packet that was sent by p.free delivered after the delay.
func (p *path) carry(data []byte) {
	at := p.free + p.delay
	twice := p.chance(p.duplicate)
	if p.chance(p.reorder) {
		p.counters.Reordered++
		late := timed{at + 1 + time.Duration(p.random.Int64N(int64(maxHold))), data}
		place, _ := slices.BinarySearchFunc(p.held, late.at, func(t timed, at time.Duration) int { return cmp.Compare(t.at, at) })
		p.held = slices.Insert(p.held, place, late)
	} else {
		p.latest = max(p.latest, at)
		p.pipe.push(timed{p.latest, data})
	}
	if twice {
		p.counters.Duplicated++
		p.latest = max(p.latest, at)
		p.pipe.push(timed{p.latest, append(p.buffer(), data...)})
	}
}

func (p *path) chance(share float64) bool { return share > 0 && p.random.Float64() < share }

func (p *path) sendTime(size int) time.Duration {
	if p.rate == 0 {
		return 0
	}
	return time.Duration(int64(size) * 8 * int64(time.Second) / p.rate)
}

// pop returns the next packet to be delivered by now. The caller gives it back
// with recycle.
func (p *path) pop(now time.Duration) ([]byte, bool) {
	p.advance(now)
	if len(p.held) > 0 && p.held[0].at <= now && (p.pipe.len() == 0 || p.held[0].at < p.pipe.head().at) {
		data := p.held[0].data
		p.held = slices.Delete(p.held, 0, 1)
		return data, true
	}
	if p.pipe.len() == 0 || p.pipe.head().at > now {
		return nil, false
	}
	return p.pipe.pop().data, true
}

// next returns when pop or advance has something to do again. While a packet is
// being sent it stands in the pipe or is held, unless it is lost, so the queue
// alone matters only when both are empty.
func (p *path) next() (time.Duration, bool) {
	switch {
	case len(p.held) > 0 && p.pipe.len() > 0:
		return min(p.held[0].at, p.pipe.head().at), true
	case len(p.held) > 0:
		return p.held[0].at, true
	case p.pipe.len() > 0:
		return p.pipe.head().at, true
	case p.queue.len() > 0:
		return p.free, true
	}
	return 0, false
}

func (p *path) buffer() []byte {
	if n := len(p.spare); n > 0 {
		b := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return b
	}
	return make([]byte, 0, linkMTU)
}

func (p *path) recycle(b []byte) {
	p.spare = append(p.spare, b[:0])
}

// lossModel loses packets independently, or in bursts after Gilbert: a good
// state that loses nothing and a bad one that loses everything.
type lossModel struct {
	random *rand.Rand
	enter  float64 // probability of a loss after an arrival
	leave  float64 // probability of an arrival after a loss
	bad    bool
}

func (l *lossModel) configure(loss, burst float64) {
	if burst == 0 {
		l.enter, l.leave = loss, 1-loss
		return
	}
	l.leave = 1 / burst
	l.enter = loss * l.leave / (1 - loss)
}

func (l *lossModel) lose() bool {
	if l.bad {
		l.bad = l.random.Float64() >= l.leave
	} else {
		l.bad = l.random.Float64() < l.enter
	}
	return l.bad
}

type timed struct {
	at   time.Duration
	data []byte
}

// fifo is a ring that grows by doubling.
type fifo struct {
	ring []timed
	next int // index of the head
	n    int
}

func (f *fifo) len() int { return f.n }

func (f *fifo) head() timed { return f.ring[f.next] }

func (f *fifo) push(t timed) {
	if f.n == len(f.ring) {
		grown := make([]timed, max(64, 2*f.n))
		for i := range f.n {
			grown[i] = f.ring[(f.next+i)%len(f.ring)]
		}
		f.ring, f.next = grown, 0
	}
	f.ring[(f.next+f.n)%len(f.ring)] = t
	f.n++
}

func (f *fifo) pop() timed {
	t := f.ring[f.next]
	f.ring[f.next] = timed{}
	f.next = (f.next + 1) % len(f.ring)
	f.n--
	return t
}
