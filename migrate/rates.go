package migrate

import (
	"context"
	"sync"
	"time"

	"github.com/wanmig/wanmig/rate"
	"github.com/wanmig/wanmig/tunnel"
)

// Cap is a limit of all moves to a site together.
type Cap struct {
	Rate rate.Rate // 0: none
	What string    // for the operator, such as "site south"
}

// paced is a session as the rates see it.
type paced interface {
	SetRate(bytesPerSecond int64)
	SetPolite(bool)
	Stats() tunnel.Stats
}

// sender is a move at its source, while it has a session.
type sender struct {
	move    *Move
	site    string
	session paced
	weight  int
	stopped func() bool // the guest stands still
	full    func() bool // what is left goes at full speed, see adaptive

	sent    uint64
	used    int64 // per second, when it was last measured
	given   int64 // what was allowed then
	allowed int64 // now
}

// rates divides the link between the moves of an engine.
type rates struct {
	// caps are the limits that hold at a time for moves to a site, and for all
	// moves (site "").
	caps func(site string, now time.Time) Cap

	mu      sync.Mutex
	senders map[*sender]bool
	at      time.Time
	reached map[string]*reach
}

// reach is what the moves to a site have sent together in each of the last seconds.
type reach struct {
	last [10]int64
	next int
}

func (r *reach) add(n int64) {
	r.last[r.next] = n
	r.next = (r.next + 1) % len(r.last)
}

func (r *reach) most() (most int64) {
	for _, n := range r.last {
		most = max(most, n)
	}
	return most
}

func newRates(caps func(string, time.Time) Cap) *rates {
	if caps == nil {
		caps = func(string, time.Time) Cap { return Cap{} }
	}
	return &rates{caps: caps, senders: map[*sender]bool{}, reached: map[string]*reach{}}
}

// most is the lower of the caps of a site and of all, in bytes per second; 0: none.
func (r *rates) most(site string, now time.Time) int64 {
	least := r.caps("", now).Rate
	if c := r.caps(site, now).Rate; c > 0 && (least == 0 || c < least) {
		least = c
	}
	return least.Bytes()
}

// join lets a move send; leave ends that.
func (r *rates) join(s *sender) (leave func()) {
	r.mu.Lock()
	s.sent = s.session.Stats().BytesSent
	r.senders[s] = true
	r.mu.Unlock()
	r.apply(time.Now())
	return func() {
		r.mu.Lock()
		delete(r.senders, s)
		r.mu.Unlock()
		r.apply(time.Now())
	}
}

// run divides the link anew every second, until ctx ends.
func (r *rates) run(ctx context.Context) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case now := <-ticker.C:
			r.measure(now)
			r.apply(now)
		case <-ctx.Done():
			return
		}
	}
}

// measure takes what each move has sent since the last time.
func (r *rates) measure(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	dt, first := now.Sub(r.at).Seconds(), r.at.IsZero()
	r.at = now
	if first || dt <= 0 {
		return
	}
	total := map[string]int64{}
	for s := range r.senders {
		sent := s.session.Stats().BytesSent
		s.used = int64(float64(sent-min(s.sent, sent)) / dt)
		s.sent, s.given = sent, s.allowed
		total[s.site] += s.used
		if r.reached[s.site] == nil {
			r.reached[s.site] = &reach{}
		}
	}
	for site, reached := range r.reached {
		if _, any := total[site]; !any {
			delete(r.reached, site)
			continue
		}
		reached.add(total[site])
	}
}

// apply gives each move its share, by what is known now.
func (r *rates) apply(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*sender
	var claims []claim
	var bounds []bound
	seen := map[string]bool{}
	bind := func(site string) {
		if c := r.caps(site, now); c.Rate > 0 && !seen[site] {
			bounds = append(bounds, bound{site, c.Rate.Bytes(), c.What})
		}
		seen[site] = true
	}
	bind("")
	for s := range r.senders {
		bind(s.site)
		l := s.move.Limit()
		c := claim{site: s.site, weight: s.weight, own: l.Most.Bytes(), used: s.used, given: s.given, stopped: s.stopped()}
		if l.Auto && (c.stopped || s.full()) {
			c.own = 0 // the rest goes at full speed
		}
		all, claims = append(all, s), append(claims, c)
	}
	reached := map[string]int64{}
	for site, x := range r.reached {
		reached[site] = x.most()
	}
	for i, g := range divide(claims, bounds, reached) {
		s, l := all[i], all[i].move.Limit()
		s.allowed = g.rate
		s.session.SetRate(g.rate)
		s.session.SetPolite(l.Auto && !claims[i].stopped && !s.full())
		if now := s.move.Status().Link; now.Limit != l || now.Allowed != g.rate || now.LimitedBy != g.by {
			s.move.update(func(st *Status) {
				st.Link.Limit, st.Link.Allowed, st.Link.LimitedBy = l, g.rate, g.by
			})
		}
	}
}
