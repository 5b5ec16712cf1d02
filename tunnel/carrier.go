package tunnel

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Carriers is the most connections that a session uses for its frames, beside one
// that it reserves for those of Control channels.
const Carriers = 16

const (
	// The peer hears of what has come after so many frames or bytes, or so long.
	ackFrames = 16
	ackBytes  = 64 << 10
	ackDelay  = 10 * time.Millisecond

	maxSmall = 1200     // bytes of frames without data that go at once
	echoMost = 1200     // bytes of a control frame that two carriers bring
	unheard  = 64 << 10 // frames without data that the peer has not acknowledged
	// maxNumbers bounds the carriers that a session ever had.
	maxNumbers = 64 << 10
	// maxDeparted bounds those of which the peer does not say what they have brought.
	maxDeparted = 1 << 10
	maxChannel  = 1 << 31 // number
)

var (
	errTooMany   = errors.New("all carriers are there")
	errNoSession = errors.New("no such session of this agent")
)

// carrier is a connection of a session.
type carrier struct {
	session *Session
	number  uint32
	conn    conn
	woken   chan struct{}
	written chan struct{} // closed when nothing is written any more

	// The session's lock guards these.
	idle     bool
	hungry   time.Time // since when nothing waits for it; zero: something does
	closed   bool      // here: nothing that it brings counts any more
	retiring time.Time // since when it takes nothing more; zero: it does
	parting  bool      // the peer has retired it
	book     []*segment
	taken    uint64 // numbered frames
	acked    uint64 // of them, by the peer
	received uint64 // numbered frames
	told     uint64 // of them, to the peer
	untold   int    // bytes of those that the peer was not told of
	ackDue   bool
	ackSoon  bool
	pingDue  bool
	retires  bool // the peer is to be told
	pinged   time.Time
	heard    time.Time
	progress time.Time // when the peer last acknowledged something, or had done so with everything
	rtt      time.Duration
}

// echo is a control frame for a second carrier: whichever is faster counts.
type echo struct {
	segment *segment
	first   *carrier
}

// carry gives the session a connection, which it owns from then on.
func (s *Session) carry(conn conn, number uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return s.Err()
	}
	_, departed := s.departed[number]
	_, settled := s.settled[number]
	if departed || settled || slices.ContainsFunc(s.carriers, func(c *carrier) bool { return c.number == number }) {
		return fmt.Errorf("%w: a second carrier %d", ErrFormat, number)
	}
	now := time.Now()
	if len(s.carriers) > Carriers {
		dead := s.dead(now)
		if dead == nil {
			return errTooMany
		}
		s.depart(dead, errors.New("another one takes its place"))
	}
	c := &carrier{
		session: s, number: number, conn: conn,
		woken: make(chan struct{}, 1), written: make(chan struct{}),
		heard: now, pinged: now, progress: now,
		rtt: conn.stats().rtt,
	}
	s.carriers = append(s.carriers, c)
	s.link.local, s.link.remote = conn.LocalAddr(), conn.RemoteAddr()
	s.reserve()
	s.running.Go(c.write)
	s.running.Go(c.read)
	s.wakeAll()
	return nil
}

// dead returns the carrier that has been silent for longest, when it may be given
// up: after a link was away, all that there are may be of before.
func (s *Session) dead(now time.Time) *carrier {
	quietest := slices.MinFunc(s.carriers, func(a, b *carrier) int { return a.heard.Compare(b.heard) })
	if now.Sub(quietest.heard) < silence {
		return nil
	}
	return quietest
}

// crowded says whether a carrier that comes now is refused.
func (s *Session) crowded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.carriers) > Carriers && s.dead(time.Now()) == nil
}

// reserve chooses the carrier that control frames have for themselves, when there
// is more than one: the one that has it, or else one over QUIC.
func (s *Session) reserve() {
	if slices.Contains(s.carriers, s.reserved) && s.reserved.retiring.IsZero() {
		if len(s.carriers) == 1 {
			s.reserved = nil
		}
		return
	}
	s.reserved = nil
	if len(s.carriers) < 2 {
		return
	}
	for _, c := range s.carriers {
		quic := c.conn.transport() == QUIC
		if c.retiring.IsZero() && (s.reserved == nil || quic && s.reserved.conn.transport() != QUIC) {
			s.reserved = c
		}
	}
}

// read takes in what the carrier brings, until it ends.
func (c *carrier) read() {
	r := bufio.NewReaderSize(c.conn, 64<<10)
	for {
		f, length, err := readFrameHead(r)
		if err == nil && f.kind == kindData {
			p := newPiece(length)
			if _, err = io.ReadFull(r, p.data); err == nil {
				f.data = p.data
				err = c.session.receive(c, f, p)
			} else {
				p.free()
			}
		} else if err == nil {
			err = c.session.receive(c, f, piece{})
		}
		if err != nil {
			c.session.fail(c, err)
			return
		}
	}
}

// write sends what the session has for the carrier, until either ends.
func (c *carrier) write() {
	defer close(c.written)
	var small []byte
	var g *segment
	for {
		var last bool
		small, g, last = c.session.next(c, small[:0], g)
		var err error
		if len(small) > 0 {
			_, err = c.conn.Write(small)
		}
		if err == nil && g != nil {
			_, err = c.conn.Write(g.wire)
		}
		if last {
			return
		}
		if err != nil {
			c.session.fail(c, err)
		}
	}
}

// fail ends a carrier, and the session when the peer broke the format.
func (s *Session) fail(c *carrier, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.closed || s.ctx.Err() != nil {
		return
	}
	if errors.Is(err, ErrFormat) || errors.Is(err, ErrFrameTooLarge) {
		reason := printable(err.Error())
		s.end(fmt.Errorf("%w here: %s", ErrClosed, reason), closeFormat, reason)
		return
	}
	err = c.conn.explain(err)
	if errors.Is(err, ErrClosedByPeer) {
		s.end(err, closeReason, "")
		return
	}
	s.depart(c, err)
}

// depart closes a carrier. What it had taken goes another way when the peer has
// said how much of it came.
func (s *Session) depart(c *carrier, cause error) {
	if c.closed {
		return
	}
	s.log.Debug("carrier is gone", "peer", s.peer, "carrier", c.number, "transport", c.conn.transport(), "cause", cause)
	c.closed = true
	s.ever.add(c.conn.stats())
	s.link.cause = cause
	s.carriers = slices.DeleteFunc(s.carriers, func(other *carrier) bool { return other == c })
	s.departed[c.number] = c
	if len(s.departed) > maxDeparted {
		reason := fmt.Sprintf("the peer does not say what %d carriers have brought", maxDeparted)
		s.end(fmt.Errorf("%w here: %w: %s", ErrClosed, ErrFormat, reason), closeFormat, reason)
		return
	}
	s.reserve()
	// Of what c had taken, the word on other carriers cannot wait for the peer's on
	// this one, which may be waiting for it on one of those.
	for _, g := range c.book {
		if g.out == nil && !g.over && kind(g.wire[0]) == kindGone {
			s.settleSegment(g)
			s.postWire(g.wire)
		}
	}
	s.post(frame{kind: kindGone, channel: c.number, offset: c.received})
	signal(c.woken)
	s.running.Go(func() { c.conn.close(closeLost, printable(fmt.Sprint(cause))) })
	signal(s.link.changed)
}

// gone takes in that the peer has closed a carrier, and how much it had brought.
func (s *Session) gone(number uint32, count uint64) error {
	if i := slices.IndexFunc(s.carriers, func(c *carrier) bool { return c.number == number }); i >= 0 {
		s.depart(s.carriers[i], errors.New("the peer has given it up"))
	}
	c, departed := s.departed[number]
	if !departed {
		if _, settled := s.settled[number]; !settled {
			if err := s.settle(number); err != nil {
				return err
			}
			s.post(frame{kind: kindGone, channel: number})
		}
		return nil
	}
	if err := s.acknowledge(c, count); err != nil {
		return err
	}
	delete(s.departed, number)
	urgent := s.urgent
	s.urgent = nil
	for _, g := range c.book {
		g.books--
		g.echoed = false
		switch {
		case g.over:
		case g.out == nil:
			s.urgent = append(s.urgent, g)
		case g.books == 0 && !g.queued: // nor does another carrier have it
			g.out.requeue(g)
		}
		g.release()
	}
	c.book = nil
	s.urgent = append(s.urgent, urgent...)
	s.wakeAll()
	return s.settle(number)
}

func (s *Session) settle(number uint32) error {
	if len(s.settled) >= maxNumbers {
		return fmt.Errorf("%w: more than %d carriers", ErrFormat, maxNumbers)
	}
	s.settled[number] = struct{}{}
	return nil
}

// acknowledge takes in how many numbered frames a carrier has brought.
func (s *Session) acknowledge(c *carrier, count uint64) error {
	if count > c.taken || count < c.acked {
		return fmt.Errorf("%w: %d frames acknowledged, after %d of %d", ErrFormat, count, c.acked, c.taken)
	}
	n := int(count - c.acked)
	if n == 0 {
		return nil
	}
	c.acked = count
	c.progress = time.Now()
	for _, g := range c.book[:n] {
		if !g.over {
			s.delivered += uint64(g.length)
			s.brought[c.conn.transport()] += uint64(g.length)
		}
		s.settleSegment(g)
		g.books--
		g.release()
	}
	clear(c.book[:n])
	c.book = c.book[n:]
	if s.stalled {
		s.stalled = false
		s.wakeAll()
	}
	return nil
}

// settleSegment notes that a segment need not be sent any more.
func (s *Session) settleSegment(g *segment) {
	if g.over {
		return
	}
	g.over = true
	if g.out == nil {
		s.small--
	} else if g.wire != nil {
		s.flight -= g.length
		s.segments--
	}
}

// post queues a frame without data, which every carrier may take.
func (s *Session) post(f frame) { s.postWire(f.append(nil)) }

func (s *Session) postWire(wire []byte) {
	s.urgent = append(s.urgent, &segment{wire: wire})
	s.small++
	s.wake(Control)
	if s.small > unheard {
		reason := fmt.Sprintf("the peer has not acknowledged %d frames", s.small)
		s.end(fmt.Errorf("%w here: %w: %s", ErrClosed, ErrFormat, reason), closeFormat, reason)
	}
}

// receive takes in a frame.
func (s *Session) receive(c *carrier, f frame, p piece) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.closed || s.ctx.Err() != nil {
		p.free()
		return nil
	}
	c.heard = time.Now()
	s.link.proven = true
	if f.kind.numbered() {
		c.received++
		c.untold += len(f.data)
		switch {
		case c.received-c.told >= ackFrames || c.untold >= ackBytes:
			c.acknowledgeNow()
		case !c.ackSoon:
			c.ackSoon = true
			time.AfterFunc(ackDelay, func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				if c.ackSoon = false; c.told < c.received {
					c.acknowledgeNow()
				}
			})
		}
	}
	switch f.kind {
	case kindData:
		return s.receiveData(f, p)
	case kindReset, kindDone, kindCredit:
		return s.receiveWord(f)
	case kindGone:
		return s.gone(f.channel, f.offset)
	case kindAck:
		return s.acknowledge(c, f.offset)
	case kindPing:
		c.acknowledgeNow()
	case kindRetire:
		c.parting = true
		c.retire()
	case kindClose:
		reason := printable(string(f.data))
		s.end(fmt.Errorf("%w: %s", ErrClosedByPeer, reason), closeReason, reason)
	}
	return nil
}

// retire has the carrier take nothing more.
func (c *carrier) retire() {
	if c.retiring.IsZero() {
		c.retiring = time.Now()
		c.session.reserve()
		c.session.wakeAll() // for what it would have taken
	}
}

func (c *carrier) acknowledgeNow() {
	c.ackDue = true
	signal(c.woken)
}

// receiveData gives bytes to their channel.
func (s *Session) receiveData(f frame, p piece) error {
	c, err := s.channel(f.channel)
	if c == nil || err != nil {
		p.free()
		return err
	}
	if f.offset == 0 && c.name == "" {
		header, n, err := parseChannelHeader(f.data)
		if err == nil && f.end() > c.in.limit {
			err = fmt.Errorf("%w: a channel begins with %d bytes", ErrFormat, f.end())
		}
		if err != nil {
			p.free()
			return err
		}
		c.begin(header, n)
		s.accepts = append(s.accepts, c)
		signal(s.accepted)
		f.offset += uint64(n)
		f.data = f.data[n:]
		p.data, p.size = f.data, len(f.data)
	}
	if err := c.in.take(f, p); err != nil {
		return err
	}
	if s.count(c); s.pieces > maxPieces {
		return fmt.Errorf("%w: more than %d frames to keep", ErrFormat, maxPieces)
	}
	s.remove(c)
	return nil
}

// begin makes a channel of what its header says.
func (c *Channel) begin(h channelHeader, n int) {
	c.name = h.name
	c.out.priority = h.priority
	c.in.begin(n, h.unordered)
	c.out.unordered = h.unordered
}

// channel returns the channel of a number, which the peer may have opened just
// now, or nil when it is over.
func (s *Session) channel(id uint32) (*Channel, error) {
	if c := s.channels[id]; c != nil {
		return c, nil
	}
	if s.own(id) {
		if id >= s.nextOwn {
			return nil, fmt.Errorf("%w: channel %d, which only this side can open", ErrFormat, id)
		}
		return nil, nil
	}
	if id < s.nextPeer {
		return nil, nil
	}
	if id > maxChannel {
		return nil, fmt.Errorf("%w: channel %d is more than %d", ErrFormat, id, maxChannel)
	}
	theirs := len(s.channels) - s.mine
	if n := (id-s.nextPeer)/2 + 1; n > 2*MaxChannels || theirs+int(n) > 2*MaxChannels {
		return nil, fmt.Errorf("%w: channel %d is more than %d allowed", ErrFormat, id, MaxChannels)
	}
	var c *Channel
	for ; s.nextPeer <= id; s.nextPeer += 2 {
		c = newChannel(s, s.nextPeer, Control)
		s.add(c)
	}
	return c, nil
}

// receiveWord takes in what a frame without data says of its channel.
func (s *Session) receiveWord(f frame) error {
	c, err := s.channel(f.channel)
	if c == nil || err != nil {
		return err
	}
	cause := ErrReset
	switch resetCode(f.code) {
	case resetFormat:
		cause = fmt.Errorf("%w: it found the format broken", ErrReset)
	case resetInterrupted:
		cause = fmt.Errorf("%w: it stopped in the middle of a frame", ErrReset)
	}
	switch f.kind {
	case kindCredit:
		if f.offset > maxOffset {
			return fmt.Errorf("%w: credit up to %d", ErrFormat, f.offset)
		}
		if f.offset > c.out.limit {
			c.out.limit = f.offset
			s.wakeAll()
		}
	case kindReset:
		c.in.sealed, c.in.reset = true, true
		s.stop(c, resetClosed, cause)
		if c.name == "" { // nobody will ever accept it
			s.reset(c, resetClosed, ErrClosed)
		}
	case kindDone:
		if resetCode(f.code) != doneAll && !(c.out.cause != nil) {
			s.reset(c, resetClosed, cause)
		}
		if !c.out.finished {
			c.out.finished = true
			s.void(c.out)
		}
	}
	s.remove(c)
	return nil
}
