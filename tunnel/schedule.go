package tunnel

import (
	"time"
)

// next returns what a carrier writes next, and waits for it: frames without data,
// a segment, or both. done is the segment that it has written. last says that
// nothing follows.
func (s *Session) next(c *carrier, small []byte, done *segment) (_ []byte, g *segment, last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if done != nil {
		done.release()
	}
	for {
		switch {
		case c.closed:
			return nil, nil, true
		case s.farewell != nil:
			return s.farewell.append(small), nil, true
		}
		small = c.report(small)
		small = s.takeUrgent(c, small)
		g = s.pick(c)
		if g != nil || len(small) > 0 {
			return small, g, false
		}
		c.idle = true
		s.mu.Unlock()
		<-c.woken
		s.mu.Lock()
		c.idle = false
	}
}

// report appends the frames that are about the carrier itself.
func (c *carrier) report(b []byte) []byte {
	if c.ackDue {
		c.ackDue = false
		c.told, c.untold = c.received, 0
		b = frame{kind: kindAck, offset: c.received}.append(b)
	}
	if c.retires {
		c.retires = false
		b = frame{kind: kindRetire}.append(b)
	}
	if c.pingDue {
		c.pingDue = false
		b = frame{kind: kindPing}.append(b)
	}
	return b
}

func (s *Session) takeUrgent(c *carrier, b []byte) []byte {
	for len(s.urgent) > 0 && len(b) < maxSmall {
		g := s.urgent[0]
		s.urgent[0] = nil
		s.urgent = s.urgent[1:]
		c.enter(g)
		b = append(b, g.wire...)
	}
	return b
}

// enter puts a segment into the carrier's book.
func (c *carrier) enter(g *segment) {
	if len(c.book) == 0 {
		c.progress = time.Now()
	}
	g.users++
	g.books++
	c.book = append(c.book, g)
	c.taken++
}

// pick takes the segment that goes next over a carrier, or nil.
func (s *Session) pick(c *carrier) *segment {
	if !c.retiring.IsZero() {
		return nil
	}
	o, at := s.choose(c)
	if o == nil || o.priority != Control {
		if g := s.echo(c); g != nil {
			return s.repeat(c, g)
		}
	}
	if o == nil {
		if g := s.hedge(c); g != nil {
			return s.repeat(c, g)
		}
		return nil
	}
	copy(s.flows[at:], s.flows[at+1:]) // its turn comes again after the others'
	s.flows[len(s.flows)-1] = o
	first := o.queue[0].wire == nil
	g := o.pop()
	if first {
		s.flight += g.length
		s.segments++
	} else {
		s.resent += uint64(g.length)
	}
	g.users++
	c.enter(g)
	s.bucket.take(len(g.wire))
	if o.head() != nil {
		s.wake(o.priority)
	}
	if o.priority == Control && g.length <= echoMost && len(s.carriers) > 1 && first {
		if len(s.echoes) == maxEchoes {
			s.echoes = s.echoes[1:]
		}
		s.echoes = append(s.echoes, echo{g, c})
		s.wakeOther(c)
	}
	return g
}

// repeat sends a segment that another carrier has taken too.
func (s *Session) repeat(c *carrier, g *segment) *segment {
	g.echoed = true
	g.users++
	c.enter(g)
	s.bucket.take(len(g.wire))
	s.resent += uint64(g.length)
	return g
}

// rank orders priorities, of which some are equal.
func (p Priority) rank() int {
	if p >= Disk {
		return int(p) - 1
	}
	return int(p)
}

// choose finds the channel whose turn it is.
func (s *Session) choose(c *carrier) (best *outflow, at int) {
	paced, stalled := !s.bucket.ready(), false
	for i, o := range s.flows {
		g := o.head()
		if g == nil || best != nil && best.priority.rank() <= o.priority.rank() {
			continue
		}
		if o.priority != Control {
			switch {
			case c == s.reserved:
				continue
			case paced:
				s.capped = true
				continue
			case g.wire == nil && (s.flight+g.length > s.flightMost() || s.segments >= flightLimit):
				stalled, s.stalled = true, true
				continue
			}
		}
		best, at = o, i
	}
	s.note(c, best == nil && !paced && !stalled && c != s.reserved)
	return best, at
}

// note notes since when a carrier finds nothing that waits. It may be so for a
// moment while the one who sends is about to go on.
func (s *Session) note(c *carrier, hungry bool) {
	switch {
	case !hungry:
		s.starved = s.starved || c.starved(time.Now())
		c.hungry = time.Time{}
	case c.hungry.IsZero():
		c.hungry = time.Now()
	}
}

func (c *carrier) starved(now time.Time) bool {
	return !c.hungry.IsZero() && c.retiring.IsZero() && now.Sub(c.hungry) > starvedAfter
}

// flightMost is how many bytes may be on their way, at a rate that the link is known to take.
// When the link goes away, that is what it loses. Whatever the rate, some frames may go: only
// these show that it is too low.
func (s *Session) flightMost() int {
	rate := s.bucket.governor
	if rate == 0 {
		return s.steering.startup.flight(s.steering.governor.minRTT)
	}
	most := rate * max(flightTrips*s.steering.governor.minRTT, flightTime).Seconds()
	return int(max(flightLeast, min(flightBytes, most)))
}

// echo returns a small control frame that another carrier has taken just now.
func (s *Session) echo(c *carrier) *segment {
	for i, e := range s.echoes {
		if e.first != c {
			s.echoes = append(s.echoes[:i], s.echoes[i+1:]...)
			if e.segment.over || e.segment.echoed {
				return s.echo(c)
			}
			return e.segment
		}
	}
	return nil
}

// hedge returns a segment that has been on its way over another carrier for too
// long: an idle carrier may be faster than what a lost packet costs that one. If it
// is as quiet itself, the link is away.
func (s *Session) hedge(c *carrier) *segment {
	if c == s.reserved || !s.bucket.ready() {
		return nil
	}
	now := time.Now()
	for _, other := range s.carriers {
		quiet := now.Sub(other.progress)
		if other == c || len(other.book) == 0 || quiet < other.patience() || now.Sub(c.heard) > quiet/2 {
			continue
		}
		for _, g := range other.book[:min(len(other.book), hedgeMost)] {
			if g.out != nil && !g.over && !g.echoed {
				return g
			}
		}
	}
	return nil
}

const (
	starvedAfter = 10 * time.Millisecond

	// A carrier that has lost a packet keeps what it has for two round trips and more.
	flightTrips = 6
	flightTime  = 100 * time.Millisecond
	flightLeast = 4 * maxData

	maxEchoes  = 64
	hedgeMost  = 16
	hedgeFloor = 300 * time.Millisecond
)

// patience is how long a carrier may bring nothing before others help it.
func (c *carrier) patience() time.Duration { return max(hedgeFloor, 3*c.rtt) }

// wake has an idle carrier look for a frame of a priority.
func (s *Session) wake(p Priority) {
	if p == Control && s.reserved != nil && s.reserved.idle {
		signal(s.reserved.woken)
		return
	}
	for _, c := range s.carriers {
		if c.idle && c != s.reserved && c.retiring.IsZero() {
			c.idle = false // the next frame is for another one
			signal(c.woken)
			return
		}
	}
}

func (s *Session) wakeOther(than *carrier) {
	for _, c := range s.carriers {
		if c.idle && c != than && c.retiring.IsZero() {
			signal(c.woken)
			return
		}
	}
}

func (s *Session) wakeAll() {
	for _, c := range s.carriers {
		signal(c.woken)
	}
}

// SetRate limits what the session sends, in bytes per second on the wire of all
// its carriers; 0 is no limit. Control frames count and never wait.
func (s *Session) SetRate(bytesPerSecond int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bucket.limit = float64(max(0, bytesPerSecond))
	s.wakeAll()
}

// bucket holds frames back to a rate. Its depth is what a rate carries while a
// timer may be late.
type bucket struct {
	limit    float64 // bytes per second on the wire that the user allows; 0: all
	governor float64 // bytes per second of frames that the path takes; 0: unknown
	overhead float64 // bytes on the wire for each of a frame; 0: unknown
	passed   uint64  // bytes of frames
	measured struct{ passed, wire uint64 }

	tokens  float64
	filled  time.Time
	waiting *time.Timer
	wake    func()
}

const (
	bucketTime  = 20 * time.Millisecond
	bucketFloor = 2 * (16 << 10)

	// Bytes on the wire are compared with those of frames after so many. Those that a lossy
	// line makes a carrier send again are among them.
	overheadSpan = 256 << 10
	maxOverhead  = 2
)

// rate returns the rate in bytes of frames per second, or 0 for none.
func (b *bucket) rate() float64 {
	rate := b.governor
	if b.limit > 0 {
		limit := b.limit / max(1, b.overhead)
		if rate == 0 || limit < rate {
			rate = limit
		}
	}
	return rate
}

// observe takes how many bytes have been on the wire so far.
func (b *bucket) observe(wire uint64) {
	frames := b.passed - b.measured.passed
	if frames < overheadSpan {
		return
	}
	overhead := min(max(float64(wire-b.measured.wire)/float64(frames), 1), maxOverhead)
	if b.overhead == 0 {
		b.overhead = overhead
	}
	b.overhead += (overhead - b.overhead) / 4
	b.measured.passed, b.measured.wire = b.passed, wire
}

// limited tells whether it is the user's rate that holds frames back.
func (b *bucket) limited() bool {
	return b.limit > 0 && (b.governor == 0 || b.rate() < b.governor)
}

// ready says whether a frame may go now. If not, wake is called when one may.
func (b *bucket) ready() bool {
	rate := b.rate()
	if rate == 0 {
		b.tokens = 0
		return true
	}
	now := time.Now()
	b.tokens = min(b.tokens+now.Sub(b.filled).Seconds()*rate, max(bucketFloor, rate*bucketTime.Seconds()))
	b.filled = now
	if b.tokens > 0 {
		return true
	}
	wait := time.Duration((1 - b.tokens) / rate * float64(time.Second))
	if b.waiting == nil {
		b.waiting = time.AfterFunc(wait, b.wake)
	} else {
		b.waiting.Reset(wait)
	}
	return false
}

func (b *bucket) take(n int) {
	b.passed += uint64(n)
	if b.rate() > 0 {
		b.tokens -= float64(n)
	}
}

// SetPolite has the session leave at least a third of the link to others that use
// it.
func (s *Session) SetPolite(polite bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steering.governor.polite = polite
}
