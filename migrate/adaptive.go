package migrate

// adaptive chooses how fast the rounds of a guest's memory are read, as in Clark
// et al., "Live Migration of Virtual Machines" (NSDI 2005), section 5.2, "dynamic
// rate limiting": a round goes at the rate at which the last one was dirtied and an
// increment, so that rounds get shorter, and no faster, so that guests and others on
// the link notice little. When that is more than a round may take, or little is left,
// more rounds are of no use: the rest is read at full speed, and QEMU stops the
// guest. It has no clock.
//
// The first pass and the disks are not paced: they take the session's polite share.
// Rates are of QEMU's stream, in bytes per second, which no more than that many bytes
// on the wire carry.
type adaptive struct {
	least, most int64 // most 0: what the link gives
	rate        int64 // of this round; 0: full speed
	round       int
	short       int  // samples in a row in which the link gave less than the rate
	last        bool // no more rounds are paced
}

// roundSample is what is known of a round while it lasts, once a second.
type roundSample struct {
	round int   // 1 is the first pass
	dirty int64 // bytes per second that the guest dirties, as last measured
	left  int64 // bytes of the round
	got   int64 // bytes per second that were read lately
	held  bool  // not read just now, for the disks
}

const (
	// increment is Clark's 50 Mbit/s.
	increment = 50e6 / 8
	// littleLeft is Clark's 256 KiB, of a round that begins.
	littleLeft = 256 << 10
	// shortOf and shortFor are how much less than its rate a round gets, for so many
	// samples, when the link has no more.
	shortOf  = 0.8
	shortFor = 3
)

// follow takes a sample and returns the rate; 0 is full speed. fullSpeed tells
// that the rest goes beyond the polite share too.
func (a *adaptive) follow(s roundSample) (rate int64, fullSpeed bool) {
	if s.round <= 1 || a.last {
		return 0, a.last
	}
	little := false
	if s.round != a.round {
		// Later on what is left is of this round alone, beside what the next will have.
		little = s.left <= littleLeft
		a.round, a.short = s.round, 0
		a.rate = max(s.dirty+increment, a.least)
	}
	if s.held || float64(s.got) >= shortOf*float64(a.rate) {
		a.short = 0
	} else {
		a.short++
	}
	if a.most > 0 && a.rate > a.most || little || a.short >= shortFor {
		a.rate, a.last = 0, true
	}
	return a.rate, a.last
}
