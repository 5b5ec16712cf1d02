package tunnel

import "time"

// linkSample is what a session sees of its link.
type linkSample struct {
	delivered uint64        // bytes that the peer has acknowledged since the session began, over all carriers
	rtt       time.Duration // newest round trip, the shortest of the carriers'; 0: unknown
	minRTT    time.Duration // shortest that a carrier has had; 0: unknown
	busy      bool          // frames have waited all the time since the last sample
}

// governor finds the rate at which a session fills its link but not the queue
// before it. It has no clock.
//
// A carrier's congestion control needs a queue to know that the link is full:
// four of the kernel's BBR flows keep a round trip's worth of it, NewReno fills what there is. One
// token bucket over all carriers, at what the link delivers, takes that queue away.
//
// What the link delivers is the most that was delivered lately, and the round trip without
// a queue is the shortest lately, as in BBR (Cardwell et al., ACM Queue 14-5, 2016). The rate follows
// the distance of the queue from a small target, as in LEDBAT (RFC 6817):
//
//	queue            rate
//	none for long    delivery, and the more above it the longer there was none: at most twice
//	below target     a little above the most delivered in rateMemory
//	above target     below what is delivered now, by up to maxYield
//
// Every dipEvery it goes below delivery, so that a queue of its own does not
// pass for the path's round trip.
//
// A delay-based sender starves beside one that fills the queue. So the rate never goes below
// share of the best delivery that it remembers. At that floor it sees what the queue is:
//
//	less than the floor is delivered    the link has become slower, if by a little: others
//	                                    may be stronger, so that the floor falls only below what comes
//	the queue does not fall to half     it is not ours, or the path has become longer: what
//	                                    stands there counts as the path from now on
//
// What is remembered fades, but not while there is a queue that may be others'. So the session
// yields to them down to the floor, which leaves them a third and more.
// If it is polite the floor is lower.
//
// Measured at an emulated link of 200 Mbit/s and 100 ms with a queue of one round
// trip (193 Mbit/s of payload at most), four TCP carriers with the kernel's BBR,
// for 20 s, Mbit/s of payload and round trips of a small message beside it in ms:
//
//	loss              without: rate, p50, p95    with: rate, p50, p95
//	0 %                    187   195   201            187   113   130
//	0.1 %                  189   191   263            190   116   133
//	1 %                    187   185   309            188   120   232
//	1 %, in bursts of 20   178   195   358            185   122   251
//
// (With 1 % loss the message itself is lost often enough to make that p95 without any queue.) Beside
// one flow of CUBIC it has 113 and the other 89, beside one of BBR 101 and 99.
type governor struct {
	polite bool // leave others more

	rate      int64         // as said last
	delivered series        // bytes
	rates     series        // of delivery in rateSpan, bytes per second
	trips     series        // round trips
	minRTT    time.Duration // of the last sample

	started bool          // delivery has stopped growing
	grown   time.Duration // when it grew last, before that
	best    float64       // rate of delivery, of meanSpan, that is remembered

	queued  bool          // there is more than next to no queue
	calm    time.Duration // since when there was not
	stale   time.Duration // when the round trip was last longer than minRTT by twice the target
	floored time.Duration // since when the rate is the floor, with such a queue; 0: it is not
	stood   time.Duration // the queue then
	dip     time.Duration // when the next begins
}

const (
	// governorInterval is about how often observe is called.
	governorInterval = 100 * time.Millisecond
	// rateSpan is what delivery is averaged over: a carrier that waits for a lost packet delivers nothing
	// for a round trip, and then all at once.
	rateSpan = time.Second
	// meanSpan is the same for what is remembered. After a queue has overflowed, a second's delivery
	// can be a quarter more than the link's.
	meanSpan = 4 * time.Second
	// rateMemory is how long a rate of delivery counts. A host without CPU for a second is no slower link.
	rateMemory = 4 * time.Second
	// tripMemory is how long a round trip counts.
	tripMemory = 10 * time.Second
	// dipEvery comes twice in tripMemory. A dip to dipDepth lasts for a round trip and two intervals:
	// 1 % of what the link takes, at 100 ms.
	dipEvery = 5 * time.Second
	dipDepth = 0.85
	maxYield = 0.25
	// share is what a session keeps beside others. One flow of TCP then gets a third and more.
	share       = 0.6
	politeShare = 0.5
	// bestFade is for each interval, 1 % a second, if the round trip has been near the shortest ever for
	// fadeAfter. Others' flows let it fall so low only for a moment.
	fadeAfter = 2 * time.Second
	bestFade  = 0.999
	minRate   = 16 << 10
)

// observe takes a sample and returns how many bytes per second to send at most; 0
// is no limit. It is called every governorInterval or so.
func (g *governor) observe(now time.Duration, s linkSample) (rate int64) {
	if s.minRTT != g.minRTT && s.minRTT > 0 {
		g.minRTT = s.minRTT
		g.trips.add(now, float64(s.minRTT), tripMemory)
	}
	if s.rtt <= 0 {
		return g.rate
	}
	g.trips.add(now, float64(s.rtt), tripMemory)
	if !s.busy {
		// Delivery of little tells nothing of the link. What is known of it stays.
		g.delivered = g.delivered[:0]
		g.rates.renew(now)
		return g.rate
	}
	g.delivered.add(now, float64(s.delivered), meanSpan)
	speed, ok := g.delivered.slope(rateSpan)
	if !ok {
		return g.rate
	}
	g.rates.add(now, speed, rateMemory)

	base := time.Duration(g.trips.least())
	if g.start(now, base) {
		g.follow(now, speed, base, s.rtt-base)
	}
	return g.rate
}

// full tells whether the link, and not the carriers, limits what is delivered: a queue says so. That the bucket is
// empty does not, because the rate follows carriers closely that fill less than the link.
// It is so for most samples of a full link, and for few of another.
func (g *governor) full() bool { return g.started && g.queued }

// share is the part of the best delivery that a session does not go below.
func (g *governor) share() float64 {
	if g.polite {
		return politeShare
	}
	return share
}

// start tells whether delivery has stopped growing. Until then there is no limit,
// and again when nothing has been delivered: the link was away.
func (g *governor) start(now, base time.Duration) bool {
	most := g.rates.most()
	if most <= 0 {
		g.started, g.best, g.rate = false, 0, 0
		return false
	}
	if g.started {
		return true
	}
	// As BBR: three round trips without 25 % more.
	if most > 1.25*g.best {
		g.best, g.grown = most, now
	}
	if now-g.grown < 3*base+governorInterval {
		return false
	}
	g.started = true
	g.best = 0 // to be known from meanSpan
	g.calm, g.stale, g.floored = now, now, 0
	g.dip = now + dipEvery
	return true
}

// follow sets the rate by the rate of delivery, the round trip without a queue,
// and the queue.
func (g *governor) follow(now time.Duration, speed float64, base, queue time.Duration) {
	// A tenth of a round trip is enough to never run dry.
	target := max(base/10, 3*time.Millisecond)
	delay := base + governorInterval // until a change of the rate is seen
	if g.queued = queue > target/2; g.queued {
		g.calm = now
	}
	if base+queue > g.minRTT+2*target {
		g.stale = now
	}
	g.remember(now-g.stale > fadeAfter)

	rate := g.pace(now, speed, queue-target, delay)
	floor := g.share() * g.best
	if rate > floor {
		g.floored = 0
	} else {
		rate = floor
		g.stand(now, speed, floor, queue, target, delay)
	}
	g.rate = max(int64(rate), minRate)
}

// remember updates what the link has delivered at best.
func (g *governor) remember(fade bool) {
	if fade {
		g.best *= bestFade
	}
	if mean, ok := g.delivered.slope(meanSpan); ok {
		g.best = max(g.best, mean)
	}
}

// pace is the rate for a queue that is so much above the target.
func (g *governor) pace(now time.Duration, speed float64, above, delay time.Duration) float64 {
	most := g.rates.most()
	calm := now - g.calm
	var rate float64
	switch {
	case calm > 2*delay:
		rate = most * (1 + min(calm.Seconds()/4, 1))
	case above > 0:
		// The link is full: what it gives now is known. Half of the way in the delay does not overshoot.
		rate = speed * (1 - min(float64(above)/float64(2*delay), maxYield))
	default:
		rate = most * (1 - float64(above)/float64(delay))
	}
	if now >= g.dip {
		rate = min(rate, dipDepth*most)
		if now >= g.dip+delay+governorInterval {
			g.dip = now + dipEvery
		}
	}
	return rate
}

// stand is called while the rate is at the floor, and draws conclusions from a
// queue that stays nevertheless.
func (g *governor) stand(now time.Duration, speed, floor float64, queue, target, delay time.Duration) {
	if g.floored == 0 || queue <= target {
		g.floored, g.stood = now, queue
	}
	if now-g.floored <= 2*rateSpan+delay {
		return
	}
	switch {
	case speed < 0.8*floor:
		g.best = speed
		g.delivered.forget(now - rateSpan)
	case speed < 0.97*floor:
		g.best = 0.95 * speed / g.share()
	case queue > g.stood/2:
		g.trips = g.trips[len(g.trips)-1:]
	}
	g.floored, g.stood = now, queue
}

// series are values of the last while.
type series []struct {
	at    time.Duration
	value float64
}

// add appends a value and forgets those that are older than a while.
func (s *series) add(now time.Duration, value float64, memory time.Duration) {
	*s = append(*s, series{{now, value}}...)
	s.forget(now - memory)
}

// forget drops values that are older, but for the last of them.
func (s *series) forget(before time.Duration) {
	old := 0
	for old < len(*s)-1 && (*s)[old+1].at <= before {
		old++
	}
	*s = append((*s)[:0], (*s)[old:]...)
}

// renew makes all values as new.
func (s series) renew(now time.Duration) {
	for i := range s {
		s[i].at = now
	}
}

// slope is by how much values rise in a second, over a span; false if they do not
// reach back that far.
func (s series) slope(span time.Duration) (float64, bool) {
	last := s[len(s)-1]
	i := len(s) - 1
	for i > 0 && s[i].at > last.at-span {
		i--
	}
	first := s[i]
	if last.at-first.at < span {
		return 0, false
	}
	return (last.value - first.value) / (last.at - first.at).Seconds(), true
}

func (s series) most() float64 {
	m := s[0].value
	for _, v := range s {
		m = max(m, v.value)
	}
	return m
}

func (s series) least() float64 {
	m := s[0].value
	for _, v := range s {
		m = min(m, v.value)
	}
	return m
}
