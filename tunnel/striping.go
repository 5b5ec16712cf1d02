package tunnel

import "time"

// stripeSample is how a session's carriers do, but for the one that is reserved
// for control frames.
type stripeSample struct {
	quic, tcp stripeCarriers
	busy      bool          // frames have waited all the time since the last sample
	capped    bool          // a rate limit or the link (governor.full) holds the session back, not the carriers
	rtt       time.Duration // of the path
}

// stripeCarriers are those of one transport: in arrays, QUIC's come first.
type stripeCarriers struct {
	carriers  int    // open; a session that dials one does not ask
	delivered uint64 // bytes that the peer has acknowledged since the session began; never falls
	failed    bool   // could not be dialled lately, or may not be
}

// stripeAction is what a session does next with its carriers.
type stripeAction uint8

const (
	stripeNothing stripeAction = iota
	addQUIC
	addTCP
	dropQUIC
	dropTCP
)

// striping chooses how many carriers of which transport a session has. It has
// no clock.
//
// It begins with four over TCP, which with the kernel's BBR fill what most lines are, or where
// there is no TCP with one over QUIC. It wants so many of each, and says one step at a time what lacks or is too much. What it wants
// it finds by trials: it measures goodput, changes the number, waits until the new carriers
// are up to speed, measures again, and goes back if that was not worth it.
//
//	more:  the better transport's carriers doubled; worth it with 5 % more goodput
//	fewer: the worse transport's carriers halved; worth it unless goodput falls by 3 %
//
// The better transport is the one whose carriers deliver more, each. After a trial
// in vain comes a rest, and then the other kind. While the session is held back
// there is nothing to gain: after a rest it sees whether fewer do. A transport that is left without
// carriers gets another one after compareEvery.
type striping struct {
	want    [2]int // carriers, of QUIC and of TCP
	before  [2]int // the same, before the trial
	trial   stripeTrial
	fewer   bool          // the kind of the next trial
	goodput float64       // before the trial, bytes per second
	changed time.Duration // when the carriers were last not those wanted
	from    stripeSample  // the window's first sample
	since   time.Duration // and when that was
	open    bool          // there is a window
	samples int           // in the window
	capped  int           // of those, held back
	compare time.Duration // when a transport without carriers gets one
	rested  time.Duration // when the next trial may begin
	rest    time.Duration // how long it is after the next in vain
}

type stripeTrial uint8

const (
	noTrial stripeTrial = iota
	moreCarriers
	fewerCarriers
)

const (
	// maxCarriers leaves a place for the one that resumes a session whose carriers are all dead: it
	// comes while they still count.
	maxCarriers = Carriers - 1
	firstTCP    = 4
	// A window is so many round trips, and a carrier has so many to get up to speed:
	// slow start to 200 Mbit/s and 100 ms takes eleven.
	stripeWindowTrips = 20
	stripeSettleTrips = 15
	minStripeWindow   = 3 * time.Second
	minStripeSettle   = 2 * time.Second
	// A trial of more must gain, and one of fewer may lose. Goodput at 1 % loss differs by a few percent between windows.
	stripeGain = 1.05
	stripeLoss = 0.97
	// stripeChange is a fall of goodput, without a trial, that says that the link has changed.
	stripeChange = 0.8
	stripeBetter = 1.25
	// firstStripeRest doubles with each trial in vain.
	firstStripeRest = 30 * time.Second
	lastStripeRest  = 10 * time.Minute
	// compareEvery is how long a transport stays without a carrier that could have one.
	compareEvery = 5 * time.Minute
)

// observe takes a sample and returns what to do now. It is called every half second or so.
func (s *striping) observe(now time.Duration, x stripeSample) stripeAction {
	have := [2]int{x.quic.carriers, x.tcp.carriers}
	usable := [2]bool{!x.quic.failed, !x.tcp.failed}
	s.wish(now, usable, have)
	if !x.busy {
		s.open = false
		return stripeNothing
	}
	if have != s.want {
		s.changed, s.open = now, false
		return s.toward(have)
	}
	if now-s.changed < max(stripeSettleTrips*x.rtt, minStripeSettle) {
		return stripeNothing
	}
	if !s.open {
		s.open, s.from, s.since, s.samples, s.capped = true, x, now, 0, 0
		return stripeNothing
	}
	s.samples++
	if x.capped {
		s.capped++
	}
	if now-s.since < max(stripeWindowTrips*x.rtt, minStripeWindow) {
		return stripeNothing
	}
	seconds := (now - s.since).Seconds()
	rates := [2]float64{
		float64(x.quic.delivered-s.from.quic.delivered) / seconds,
		float64(x.tcp.delivered-s.from.tcp.delivered) / seconds,
	}
	s.open = false
	capped := 2*s.capped > s.samples
	s.judge(now, rates[0]+rates[1])
	if have == s.want {
		s.try(now, rates, usable, capped)
	}
	return s.toward(have)
}

// wish wants what there is at first, never what cannot be had, and sometimes a
// carrier of the transport that has none, to compare.
func (s *striping) wish(now time.Duration, usable [2]bool, have [2]int) {
	if s.want == [2]int{} {
		s.want = have
		if usable[1] {
			s.want = [2]int{0, max(firstTCP, have[1])}
		}
		s.compare = now + compareEvery
	}
	for t := range s.want {
		if !usable[t] && have[t] < s.want[t] {
			s.want[t] = have[t]
			s.before[t] = min(s.before[t], have[t])
			s.compare = now + compareEvery
			s.afresh(now)
		}
	}
	for t := range s.want {
		none := s.want[t] == 0 && usable[t] && s.trial == noTrial
		if none && (s.want[1-t] == 0 || now >= s.compare && s.want[1-t] < maxCarriers) {
			s.want[t] = 1
			s.compare = now + compareEvery
		}
	}
}

// toward is the next step to what is wanted: first what lacks.
func (s *striping) toward(have [2]int) stripeAction {
	switch {
	case have[0] < s.want[0]:
		return addQUIC
	case have[1] < s.want[1]:
		return addTCP
	case have[0] > s.want[0]:
		return dropQUIC
	case have[1] > s.want[1]:
		return dropTCP
	}
	return stripeNothing
}

// judge ends a trial by the goodput since.
func (s *striping) judge(now time.Duration, goodput float64) {
	worth := true
	switch s.trial {
	case moreCarriers:
		worth = goodput >= stripeGain*s.goodput
	case fewerCarriers:
		worth = goodput >= stripeLoss*s.goodput
	}
	switch {
	case !worth:
		s.want = s.before
		s.fewer = s.trial == moreCarriers
		s.pause(now)
	case s.trial == moreCarriers:
		s.rest = firstStripeRest
	case s.trial == fewerCarriers:
		s.compare = now + compareEvery
	case goodput < stripeChange*s.goodput:
		s.afresh(now)
		s.compare = now
	}
	s.trial = noTrial
	s.goodput = goodput
}

// pause rests, and longer the next time.
func (s *striping) pause(now time.Duration) {
	s.rest = max(s.rest, firstStripeRest)
	s.rested = now + s.rest
	s.rest = min(2*s.rest, lastStripeRest)
}

// afresh forgets what trials have shown: something has changed.
func (s *striping) afresh(now time.Duration) {
	s.rested, s.rest, s.fewer = now, firstStripeRest, false
}

// try begins a trial, if it is time, after a window with these rates of the transports.
func (s *striping) try(now time.Duration, rates [2]float64, usable [2]bool, capped bool) {
	total := s.want[0] + s.want[1]
	if !s.fewer && total > 1 && (capped || total >= maxCarriers) {
		s.fewer = true
		if now >= s.rested {
			s.pause(now)
		}
	}
	if now < s.rested {
		return
	}
	s.before = s.want
	if s.fewer && total > 1 {
		t := s.worse(rates)
		s.want[t] /= 2
		if total == s.before[t] {
			s.want[t] = (total + 1) / 2
		}
		s.trial = fewerCarriers
		return
	}
	s.fewer = false
	t := s.better(rates, usable)
	more := min(max(s.want[t], 1), maxCarriers-total)
	if capped || more <= 0 || !usable[t] {
		return
	}
	s.want[t] += more
	s.trial = moreCarriers
}

// better is the usable transport whose carriers deliver more.
func (s *striping) better(rates [2]float64, usable [2]bool) int {
	if !usable[0] || usable[1] && s.each(1, rates) > s.each(0, rates) {
		return 1
	}
	return 0
}

// worse is the transport, of those with carriers, whose carriers deliver less. TCP's
// are kept for as much: their BBR bears a loss that may come.
func (s *striping) worse(rates [2]float64) int {
	if s.want[1] == 0 || s.want[0] > 0 && s.each(0, rates) < stripeBetter*s.each(1, rates) {
		return 0
	}
	return 1
}

// each is what a carrier of a transport delivers.
func (s *striping) each(t int, rates [2]float64) float64 {
	return rates[t] / float64(max(s.want[t], 1))
}
