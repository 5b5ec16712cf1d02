package migrate

import (
	"cmp"
	"slices"
	"time"
)

// OnStall is what a move does with a guest that dirties its memory faster than the
// link takes it.
type OnStall string

// What there is, beside the stop as soon as the predicted downtime fits its goal.
const (
	StallThrottle OnStall = "throttle" // QEMU takes CPU time from the guest, step by step; also of a move that doesn't say
	StallStop     OnStall = "stop"     // the longer downtime is accepted
	StallWait     OnStall = "wait"     // for ever
	StallFail     OnStall = "fail"     // the move is rolled back
)

// OnStalls are all of them.
var OnStalls = []OnStall{StallThrottle, StallStop, StallWait, StallFail}

// The goal of a move that doesn't say, and its bounds.
const (
	DefaultDowntime = 300 * time.Millisecond
	LeastDowntime   = 10 * time.Millisecond
	MostDowntime    = 10 * time.Minute
)

// StallPatience is how many goals the downtime of a guest may be that is throttled
// as far as it can be.
const StallPatience = 5

// convergence decides at the beginning of each round of a guest's memory whether it
// is sent while the guest runs, or the guest is stopped for it. It has no clock.
//
//	the predicted downtime fits the goal, or the memory that is left takes
//	no longer than tinyTail                              stop
//	what is left falls over the rounds                   go on
//	it no longer falls, which is a stall:   wait         go on
//	                                        fail         give up
//	                                        stop         stop near a minimum of what is left
//	                                        throttle     go on while QEMU takes more and more CPU time
//	                                                     from the guest; then as stop, if the
//	                                                     predicted downtime is within StallPatience goals
//
// To stop near a local minimum, once what is left no longer falls, is CloudNet's
// "smart stop and copy" (Wood et al., VEE 2011). Rounds during which the link was
// slower than in others lately don't count: what is left grows then, but a guest
// should not be stopped into a disturbance of the network.
//
// QEMU throttles by itself, as soon as a guest dirties in two periods of a second or more
// over half of what was sent meanwhile. See throttleInitial.
type convergence struct {
	goal    time.Duration
	onStall OnStall

	looked    time.Duration // when a round was counted last, or would have been
	links     []int64       // what the link took in the last rounds, the disturbed ones too
	rounds    []roundStart  // that count, the newest last
	disturbed bool
	stalled   bool
}

// roundStart is what is known when a round begins: QEMU has just asked which pages
// are dirty.
type roundStart struct {
	at       time.Duration // since the move's memory began
	left     int64         // bytes of memory to be sent
	link     int64         // bytes per second that the link has taken; 0: unknown
	takes    int64         // the same in bytes of memory, as they are reduced
	base     time.Duration // the downtime of a guest of which nothing is left
	throttle int           // percent of CPU time taken from the guest
}

// verdict is what convergence decides.
type verdict int

const (
	goOn verdict = iota
	throttle
	stopNow
	giveUp
)

const (
	// tinyTail is never worth another round.
	tinyTail = 20 * time.Millisecond
	// roundSpan is how far apart rounds are that count: QEMU too judges by no shorter ones.
	roundSpan = time.Second
	// In a stall the last stallRounds have not brought what is left below stallFall
	// of the least before, of stallMemory rounds in all.
	stallRounds = 4
	stallMemory = 12
	stallFall   = 0.95
	// nearLeast is how far above the least of the last rounds what is left may be at the stop.
	nearLeast = 1.1
	// disturbedLink is the part of what the link took at most in the last rounds below which
	// it is disturbed.
	disturbedLink = 0.75
	// fullThrottle is the most that QEMU takes.
	fullThrottle = 99
)

// tail is how long the memory that is left is on its way.
func (r roundStart) tail() time.Duration {
	if r.takes <= 0 {
		return 0
	}
	return time.Duration(min(float64(r.left)/float64(r.takes), 1e6) * float64(time.Second))
}

// downtime is the prediction.
func (r roundStart) downtime() time.Duration { return r.base + r.tail() }

// begin takes the beginning of a round, the second or a later one.
func (c *convergence) begin(r roundStart) verdict {
	if r.downtime() <= c.goal || r.tail() <= tinyTail {
		c.stalled = false
		return stopNow
	}
	if len(c.links) == 0 || r.at-c.looked >= roundSpan {
		c.count(r)
	}
	if !c.stalled || c.disturbed {
		return goOn
	}
	switch c.onStall {
	case StallWait:
		return goOn
	case StallFail:
		return giveUp
	case StallStop:
		if c.nearLeast(r) {
			return stopNow
		}
		return goOn
	}
	if c.throttled() && r.downtime() <= StallPatience*c.goal && c.nearLeast(r) {
		return stopNow
	}
	return throttle
}

func (c *convergence) count(r roundStart) {
	c.looked = r.at
	c.links = newest(append(c.links, r.link), stallRounds)
	if c.disturbed = float64(r.link) < disturbedLink*float64(slices.Max(c.links)); c.disturbed {
		return
	}
	c.rounds = newest(append(c.rounds, r), stallMemory)
	before := len(c.rounds) - stallRounds
	c.stalled = before > 0 && float64(least(c.rounds[before:])) > stallFall*float64(least(c.rounds[:before]))
}

func newest[T any](list []T, n int) []T { return list[max(0, len(list)-n):] }

// least is what was left at least.
func least(rounds []roundStart) int64 {
	return slices.MinFunc(rounds, func(a, b roundStart) int { return cmp.Compare(a.left, b.left) }).left
}

func (c *convergence) nearLeast(r roundStart) bool {
	return float64(r.left) <= nearLeast*float64(least(newest(c.rounds, stallRounds)))
}

// throttled tells that QEMU takes no more CPU time from the guest: it takes all
// that it may and has been seen to, or it has not taken more for long.
func (c *convergence) throttled() bool {
	n := len(c.rounds)
	now := c.rounds[n-1].throttle
	return n > 1 && c.rounds[n-2].throttle >= fullThrottle || n == stallMemory && c.rounds[0].throttle == now
}
