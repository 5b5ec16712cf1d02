package migrate

import (
	"sync"
	"time"
)

// recentRate is what a session has sent, in bytes per second, in the last seconds in
// which it had something to send.
type recentRate struct{ reach }

// idleRate is the part of the most below which a session was idle: what waits for
// a hook tells nothing of the link.
const idleRate = 0.1

func (r *recentRate) add(rate int64) {
	if float64(rate) >= idleRate*float64(r.most()) {
		r.reach.add(rate)
	}
}

// passed is what has been sent until a round of memory began.
type passed struct {
	at      time.Time
	round   int
	held    time.Duration // in which the stream was not read
	memory  int64         // bytes, as QEMU counts what is left
	content int64         // of these, what neither was zeros nor known at the destination
	frames  int64         // bytes sent for that
	wire    uint64        // bytes that the session has sent
}

const (
	// A round tells of the link's rate when it took so long, and of the reduction
	// when it had so much content.
	tellingRound   = 500 * time.Millisecond
	tellingContent = 1 << 20
	leastRatio     = 0.005
)

// since tells what the link takes, in bytes per second on the wire and of this
// guest's memory, by what was sent since the round before began. most is what
// it took at most lately, and ratio what a byte of content was on the wire so far.
//
// A long round has tested the link, the compression and both hosts with just what
// would be sent next. Other rounds have not, nor has one that was paced: there it is
// what the session has shown to be able to, for memory that is all content.
func (is passed) since(was passed, most int64, ratio float64, paced bool) (link, takes int64, newRatio float64) {
	if content := is.content - was.content; content >= tellingContent {
		ratio = max(float64(is.frames-was.frames)/float64(content), leastRatio)
	}
	took := is.at.Sub(was.at) - (is.held - was.held)
	if was.round < 2 || took < tellingRound || paced {
		return most, int64(float64(most) / ratio), ratio
	}
	link = int64(float64(is.wire-min(was.wire, is.wire)) / took.Seconds())
	return link, max(int64(float64(is.memory-was.memory)/took.Seconds()), 1), ratio // 0 is not known
}

// overheads are what handoffs to each site have taken beside the way of the last
// pages: libvirt and QEMU on both hosts, and the journals.
type overheads struct {
	mu   sync.Mutex
	site map[string]time.Duration
}

// Before a site has been moved to, and the bounds of what is believed of one.
const (
	usualOverhead = 150 * time.Millisecond
	mostOverhead  = 2 * time.Second
	// A handoff with a longer tail tells more of that.
	tellingTail = 100 * time.Millisecond
)

func (o *overheads) of(site string) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if known, ok := o.site[site]; ok {
		return known
	}
	return usualOverhead
}

// learn takes by how much a handoff was longer than predicted.
func (o *overheads) learn(site string, off time.Duration) {
	was := o.of(site)
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.site == nil {
		o.site = map[string]time.Duration{}
	}
	o.site[site] = min(max(was+off/2, 0), mostOverhead)
}
