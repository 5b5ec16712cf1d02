package tunnel

import (
	"time"
)

// steering is how a session finds the rate that the link takes, and the carriers
// that it takes it with.
type steering struct {
	began    time.Time
	governor governor
	striping striping
	striped  time.Time
	dialling bool
	failed   [TCP + 1]time.Time // when a transport could not be dialled last
	startup  startup
}

// startup bounds what is on its way until the governor knows the link: carriers
// that begin together, each with a slow start of its own, would overflow the link's
// queue many times over. As in slow start it is twice what one round trip has brought.
type startup struct {
	at        [2]time.Time // of the last looks
	delivered [2]uint64    // and how much the peer had
	best      float64      // bytes per second
}

func (u *startup) observe(now time.Time, delivered uint64) {
	if span := now.Sub(u.at[0]).Seconds(); !u.at[0].IsZero() && span > 0 {
		u.best = max(u.best, float64(delivered-u.delivered[0])/span)
	}
	u.at = [2]time.Time{u.at[1], now}
	u.delivered = [2]uint64{u.delivered[1], delivered}
}

const (
	startFlight = 256 << 10
	startTrips  = 2
	leastTrip   = 20 * time.Millisecond // acknowledgements take their time
)

// flight is how many bytes may be on their way, over a path with that round trip.
func (u *startup) flight(rtt time.Duration) int {
	most := startFlight + startTrips*u.best*max(rtt, leastTrip).Seconds()
	return int(min(flightBytes, most))
}

const (
	governEvery = 100 * time.Millisecond
	stripeEvery = 500 * time.Millisecond
	// A transport that could not be dialled is not tried again for so long.
	failedFor = time.Minute
)

// steer looks at what the carriers have done since it looked last. The session's
// lock is held.
func (s *Session) steer(now time.Time) {
	if s.steering.began.IsZero() {
		s.steering.began = now
	}
	var sample linkSample
	var stripes stripeSample
	wire := s.ever.sent
	for _, c := range s.carriers {
		st := c.conn.stats()
		c.rtt = st.rtt
		s.starved = s.starved || c.starved(now)
		wire += st.sent
		if st.latestRTT > 0 && (sample.rtt == 0 || st.latestRTT < sample.rtt) {
			sample.rtt = st.latestRTT
		}
		if st.minRTT > 0 && (sample.minRTT == 0 || st.minRTT < sample.minRTT) {
			sample.minRTT = st.minRTT
		}
		// The only carrier will be the reserved one.
		if c == s.reserved || !c.retiring.IsZero() || len(s.carriers) == 1 {
			continue
		}
		k := &stripes.quic
		if c.conn.transport() == TCP {
			k = &stripes.tcp
		}
		k.carriers++
	}
	s.bucket.observe(wire)
	s.steering.startup.observe(now, s.delivered)
	sample.delivered, sample.busy = s.delivered, !s.starved
	if !s.link.lost {
		s.bucket.governor = float64(s.steering.governor.observe(now.Sub(s.steering.began), sample))
	}
	s.wake(Memory)

	if !s.dialled || s.redial == nil || s.steering.dialling || s.link.lost || !s.link.proven || now.Sub(s.steering.striped) < stripeEvery {
		s.starved = false
		return
	}
	stripes.busy, stripes.rtt = !s.starved, sample.rtt
	// The bucket is empty also when the governor follows carriers that fill less than the link.
	stripes.capped = s.capped && s.bucket.limited() || s.steering.governor.full()
	stripes.quic.delivered, stripes.tcp.delivered = s.brought[QUIC], s.brought[TCP]
	stripes.quic.failed = s.transport == TCP || now.Sub(s.steering.failed[QUIC]) < failedFor
	stripes.tcp.failed = s.transport == QUIC || now.Sub(s.steering.failed[TCP]) < failedFor
	s.starved, s.capped, s.steering.striped = false, false, now
	switch s.steering.striping.observe(now.Sub(s.steering.began), stripes) {
	case addQUIC:
		s.addBy(QUIC)
		s.steering.striped = time.Time{} // the next one need not wait
	case addTCP:
		s.addBy(TCP)
		s.steering.striped = time.Time{}
	case dropQUIC:
		s.retire(QUIC)
	case dropTCP:
		s.retire(TCP)
	}
}

// addBy makes one more carrier of a transport, in the background.
func (s *Session) addBy(t Transport) {
	s.steering.dialling = true
	s.running.Go(func() {
		err := s.addCarrier(t)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.steering.dialling = false
		if err != nil && s.ctx.Err() == nil {
			s.log.Debug("no further carrier", "peer", s.peer, "transport", t, "error", err)
			s.steering.failed[t] = time.Now()
		}
	})
}

// retire lets the youngest carrier of a transport finish what it has.
func (s *Session) retire(t Transport) {
	for i := len(s.carriers) - 1; i >= 0; i-- {
		if c := s.carriers[i]; c != s.reserved && c.retiring.IsZero() && c.conn.transport() == t {
			c.retire()
			c.retires = true
			signal(c.woken)
			return
		}
	}
}
