package tunnel

import "time"

// linkSample is what a session sees of its link.
type linkSample struct {
	delivered uint64        // bytes that the peer has acknowledged since the session began, over all carriers
	rtt       time.Duration // newest round trip, the shortest of the carriers'
	minRTT    time.Duration // shortest that a carrier has had
	busy      bool          // frames have waited all the time since the last sample
}

// governor finds the rate at which a session fills its link and not the queue
// before it. It has no clock.
//
// Each carrier's congestion control probes for itself and needs a queue to do so:
// four kernel BBR flows keep a whole round trip's worth, NewReno fills what there is.
// One bucket over all of them, at what the link delivers, takes that queue
// away. What the link delivers is measured as by BBR (Cardwell et al., 2016);
// that queueing is held at a small target in proportion to its distance from it is
// LEDBAT's way (RFC 6817).
//
//	startup ──> delivery no longer grows ──> following <──> contended
//	   ──> the queue stays though the session sends less than is delivered
//	   <── it is gone, or a while later, to see whether it goes now
//
// A queue that stays is others', or no queue: the path has become longer. After
// tripMemory that is the round trip to compare with.
type governor struct {
	polite bool // leave others of the link at least a third

	started   bool
	rate      int64
	delivered series        // bytes
	rates     series        // of delivery, in bytes per second
	trips     series        // round trips
	minRTT    time.Duration // of the last sample

	grown   time.Duration // when delivery has last grown, in startup
	mean    float64
	best    float64 // rate of delivery then; afterwards the best mean
	others  bool
	full    time.Duration
	calm    time.Duration // since when there is hardly a queue
	floored time.Duration
	lowest  time.Duration
	dip     time.Duration // when the next begins
}

const (
	// governorInterval is about how often observe is called.
	governorInterval = 100 * time.Millisecond
	// rateSpan is what delivery is averaged over. A carrier that waits for a lost packet
	// delivers nothing for a round trip, and then all at once.
	rateSpan = time.Second
	// rateMemory is how long the best average counts.
	meanSpan   = 4 * time.Second
	rateMemory = 2 * time.Second
	// tripMemory is how long the shortest round trip counts (BBR: 10 s).
	tripMemory = 10 * time.Second
	// dipEvery is how often the queue is let go, so that there is a round trip without one
	// in tripMemory, twice. A dip takes 15 % for three round trips or so: 1 %.
	dipEvery = 5 * time.Second
	// dipDepth and most of what a queue takes off the rate.
	dipDepth = 0.85
	maxYield = 0.25
	// share of the best delivery is what a session never goes below.
	share   = 0.6
	minRate = 128 << 10
)

// observe takes a sample and returns how many bytes per second to send at most; 0
// is no limit. It is called every governorInterval or so.
func (g *governor) observe(now time.Duration, s linkSample) (rate int64) {
	g.trips.add(now, float64(s.rtt), tripMemory)
	if s.minRTT != g.minRTT {
		g.minRTT = s.minRTT
		g.trips.add(now, float64(s.minRTT), tripMemory)
	}
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
	g.mean, _ = g.delivered.slope(meanSpan)

	base := time.Duration(g.trips.least())
	g.step(now, speed, base, s.rtt-base)
	return g.rate
}

// step decides, by the rate of delivery, the round trip without a queue, and the queue.
func (g *governor) step(now time.Duration, speed float64, base, queue time.Duration) {
	most := g.rates.most()
	delay := base + governorInterval // until a change is seen
	// A tenth of a round trip is enough to never run dry.
	target := max(base/10, 3*time.Millisecond)

	if most == 0 { // the link was away
		g.started, g.best, g.rate = false, 0, 0
		return
	}
	if !g.started {
		// As in BBR: three round trips without 25 % more.
		if most > 1.25*g.best {
			g.best, g.grown = most, now
		}
		if now-g.grown < 3*base+governorInterval {
			return
		}
		g.started, g.best = true, 0
		g.dip = now + dipEvery
	}
	if queue > target/2 {
		g.calm = now
	}
	calm := now - g.calm
	if queue <= target {
		g.full = now
	}
	g.compare(speed, now-g.full > rateSpan, calm > 5*delay)

	var rate float64
	switch {
	case calm > 2*delay:
		rate = most * (1 + min(calm.Seconds()/4, 1))
	case queue > target:
		// What is delivered now is what the link gives.
		rate = speed * (1 - min(float64(queue-target)/float64(2*delay), maxYield))
	default:
		rate = most * (1 + float64(target-queue)/float64(2*delay))
	}
	if now >= g.dip {
		rate = min(rate, dipDepth*most)
		if now >= g.dip+base+2*governorInterval {
			g.dip = now + dipEvery
		}
	}
	floor := share * g.best
	if g.others {
		rate = min(rate, floor)
	}
	if rate > floor {
		g.floored = 0
	} else if rate = floor; g.floored == 0 || queue <= target {
		g.floored, g.lowest = now, queue
	}
	if waited := now - g.floored; g.floored != 0 && waited > rateMemory+delay {
		switch {
		case most < 0.95*floor:
			g.best, g.floored = most, 0
		case !g.polite && queue > g.lowest/2:
			g.trips = g.trips[len(g.trips)-1:]
			g.floored = 0
		default:
			g.floored, g.lowest = now, queue
		}
	}
	g.rate = max(int64(rate), minRate)
}

func (g *governor) compare(speed float64, full, calm bool) {
	switch {
	case g.polite && full && speed < 0.9*g.best:
		g.others = true
	case calm:
		g.others = false
	}
	if !full && !g.others {
		g.best *= 0.999
	}
	g.best = max(g.best, g.mean)
}

// series are values of the last while.
type series []struct {
	at    time.Duration
	value float64
}

// add appends a value and forgets those that are older than a while, but for one.
func (s *series) add(now time.Duration, value float64, memory time.Duration) {
	old := 0
	for old < len(*s)-1 && (*s)[old+1].at <= now-memory {
		old++
	}
	*s = append((*s)[:0], (*s)[old:]...)
	*s = append(*s, series{{now, value}}...)
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
