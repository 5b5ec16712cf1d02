package tunnel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"time"
)

const (
	// DefaultOutage is how long a session lives without a link.
	DefaultOutage = 10 * time.Minute

	tendEvery = 50 * time.Millisecond
	// A carrier on which the peer was silent for pingAfter is asked for a sign of
	// life; the link counts as lost when all are silent for silence. A carrier that is
	// silent for so long while another is not, or that brings nothing for stuckAfter, is
	// given up.
	pingAfter  = time.Second
	silence    = 4 * time.Second
	stuckAfter = 20 * time.Second
	// partingTime is how long the peer has to give up a retired carrier first, which it
	// does when it has heard that everything on it has come.
	partingTime = 10 * time.Second
	// standstill is how late a tick is when the process or the host was stopped.
	standstill = time.Second

	redialTimeout = 3 * time.Second
	firstWait     = 250 * time.Millisecond
	longestWait   = 2 * time.Second
	// listenerWait is how long the side that was dialled lets the other one try.
	listenerWait = 3 * time.Second
)

// linkState is what a session knows of the line.
type linkState struct {
	heard    time.Time // when the peer last gave a sign of life
	lost     bool
	proven   bool // the peer has sent a frame
	dialling bool
	number   uint32 // of the next carrier made here, half of it
	cause    error  // of the last carrier's end, or attempt's
	changed  chan struct{}
	tended   time.Time // when the carriers were last looked at
	looked   time.Time // and were last steered
	remote   net.Addr
	local    net.Addr
}

// Link tells how a session fares.
type Link struct {
	LostSince time.Time // zero while the link is up
	Carriers  []Carrier
}

// Carrier is one connection of a session.
type Carrier struct {
	Transport Transport
	Sent      uint64 // bytes on the wire
	Received  uint64
	RTT       time.Duration // smoothed
	Remote    string
}

// Link returns how the session fares now.
func (s *Session) Link() Link {
	s.mu.Lock()
	defer s.mu.Unlock()
	var l Link
	if s.link.lost {
		l.LostSince = s.link.heard
	}
	for _, c := range s.carriers {
		st := c.conn.stats()
		l.Carriers = append(l.Carriers, Carrier{c.conn.transport(), st.sent, st.received, st.rtt, c.conn.RemoteAddr().String()})
	}
	return l
}

// Stats counts what a session or a connection for packets has carried.
type Stats struct {
	BytesSent     uint64 // on the wire
	BytesReceived uint64
	BytesResent   uint64        // of frames, because a carrier was lost or too slow
	PacketsLost   uint64        // goes down again when one arrives after all
	RTT           time.Duration // smoothed
	MinRTT        time.Duration
}

// Stats returns the counters.
func (s *Session) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.ever
	for i, c := range s.carriers {
		st := c.conn.stats()
		sum.add(st)
		if i == 0 || c == s.reserved {
			sum.rtt = st.rtt
		}
	}
	return Stats{
		BytesSent: sum.sent, BytesReceived: sum.received, BytesResent: s.resent,
		PacketsLost: sum.packetsLost, RTT: sum.rtt, MinRTT: sum.minRTT,
	}
}

func (sum *connStats) add(st connStats) {
	sum.sent += st.sent
	sum.received += st.received
	sum.packetsLost += st.packetsLost
	sum.rtt = st.rtt
	if sum.minRTT == 0 || st.minRTT > 0 && st.minRTT < sum.minRTT {
		sum.minRTT = st.minRTT
	}
}

// LocalAddr returns the address from which this host sends to the peer.
func (s *Session) LocalAddr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link.local
}

// RemoteAddr returns the peer's address.
func (s *Session) RemoteAddr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link.remote
}

// tend watches over the carriers until the session ends.
func (s *Session) tend() {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.link.changed:
		case <-tick.C:
		}
		s.look(time.Now())
	}
}

// look decides what silence means.
func (s *Session) look(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if gap := now.Sub(s.link.tended); gap > standstill && !s.link.tended.IsZero() {
		s.forgive(gap)
	}
	s.link.tended = now
	for _, c := range s.carriers {
		if c.heard.After(s.link.heard) { // QUIC follows a peer that a NAT moves
			s.link.heard, s.link.remote = c.heard, c.conn.RemoteAddr()
		}
	}
	quiet := now.Sub(s.link.heard)
	lost := quiet > silence || len(s.carriers) == 0
	if lost != s.link.lost {
		s.link.lost = lost
		if lost {
			s.log.Warn("the link is lost", "peer", s.peer, "silent_ms", quiet.Milliseconds(), "cause", s.link.cause)
		} else {
			s.log.Info("the link is back", "peer", s.peer)
			s.steering.governor = governor{polite: s.steering.governor.polite} // of a link as it is now
			s.bucket.governor = 0
			s.steering.startup = startup{}
		}
	}
	for _, c := range slices.Clone(s.carriers) {
		silent := now.Sub(c.heard)
		switch {
		case silent > silence && quiet < pingAfter+silence/4,
			len(c.book) > 0 && now.Sub(c.progress) > stuckAfter && quiet < pingAfter+silence/4:
			s.depart(c, fmt.Errorf("%w: no answer from %s for %v", ErrLost, c.conn.RemoteAddr(), silent.Round(time.Millisecond)))
			continue
		case !c.retiring.IsZero() && len(c.book) == 0 && (c.parting || now.Sub(c.retiring) > partingTime):
			s.depart(c, errors.New("not needed"))
			continue
		}
		if silent > pingAfter && now.Sub(c.pinged) > pingAfter {
			c.pinged, c.pingDue = now, true
			signal(c.woken)
		}
	}
	switch {
	case lost && quiet > s.outage:
		cause := fmt.Errorf("%w: no answer from %s for %v: link down or agent gone", ErrLost, s.link.remote, s.outage)
		if s.link.cause != nil {
			cause = fmt.Errorf("%w: %w", cause, s.link.cause)
		}
		s.end(cause, closeLost, printable(cause.Error()))
	case lost && !s.link.dialling && s.redial != nil:
		s.link.dialling = true
		s.running.Go(s.reconnect)
	}
	if now.Sub(s.link.looked) >= governEvery {
		s.link.looked = now
		s.steer(now)
	}
}

// forgive takes the time in which this process stood still for no silence of the
// peer's.
func (s *Session) forgive(gap time.Duration) {
	s.link.heard = s.link.heard.Add(gap)
	for _, c := range s.carriers {
		c.heard, c.progress = c.heard.Add(gap), c.progress.Add(gap)
	}
}

// reconnect makes new carriers while the link is lost, with back-off, and at once
// when the network of this host changes.
func (s *Session) reconnect() {
	changed, stop := s.network()
	defer stop()
	wait := firstWait
	if !s.dialled {
		select {
		case <-s.ctx.Done():
		case <-time.After(listenerWait):
		}
	}
	for s.isLost() {
		err := s.addCarrier(s.transport)
		if errors.Is(err, errNoSession) {
			s.mu.Lock()
			s.end(fmt.Errorf("%w: the agent at %s was restarted", ErrLost, s.link.remote), closeLost, "no such session")
			s.mu.Unlock()
			return
		}
		if err != nil {
			s.mu.Lock()
			s.link.cause = err
			s.mu.Unlock()
		}
		select {
		case <-s.ctx.Done():
			return
		case <-changed:
			wait = firstWait
		case <-time.After(wait/2 + rand.N(wait/2)):
			wait = min(2*wait, longestWait)
		}
	}
	s.mu.Lock()
	s.link.dialling = false
	s.mu.Unlock()
}

func (s *Session) isLost() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link.lost && s.ctx.Err() == nil
}

// addCarrier makes one more carrier.
func (s *Session) addCarrier(t Transport) error {
	ctx, cancel := context.WithTimeout(s.ctx, redialTimeout)
	defer cancel()
	s.mu.Lock()
	s.link.number++
	number := 2 * s.link.number
	if !s.dialled {
		number++
	}
	s.mu.Unlock()
	conn, err := s.redial(ctx, t, number)
	if err != nil {
		return err
	}
	if err := s.carry(conn, number); err != nil {
		conn.close(closeLost, "not needed")
		return err
	}
	return nil
}
