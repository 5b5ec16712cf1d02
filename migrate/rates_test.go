package migrate

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wanmig/wanmig/tunnel"
)

// slowLink is a session that sends as fast as it may, but no faster than most.
type slowLink struct {
	mu         sync.Mutex
	most, rate int64
	polite     bool
	sent       uint64
	lost       time.Time
	carriers   []tunnel.Carrier
}

func (s *slowLink) SetRate(r int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rate = r
}

func (s *slowLink) SetPolite(p bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.polite = p
}

func (s *slowLink) Stats() tunnel.Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return tunnel.Stats{BytesSent: s.sent, BytesReceived: 7, RTT: 5 * time.Millisecond}
}
func (s *slowLink) Link() tunnel.Link { return tunnel.Link{LostSince: s.lost, Carriers: s.carriers} }

func (s *slowLink) send(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.most
	if s.rate > 0 {
		r = min(r, s.rate)
	}
	s.sent += uint64(float64(r) * d.Seconds())
}

// TestRates lets three moves come and go under a cap that changes with the time.
func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		day := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r := newRates(func(site string, now time.Time) Cap {
			if site == "south" && now.Sub(day) > time.Minute {
				return Cap{60e6, "site south"}
			}
			return Cap{}
		})
		go r.run(ctx)
		stopped := false
		begin := func(p Priority, l Limit) (*slowLink, *Move, func()) {
			m := newMove(Status{Role: "source"}, func(error) {})
			m.limit = l
			s := &slowLink{most: 100 * mbit}
			return s, m, r.join(&sender{move: m, site: "south", session: s, weight: p.weight(),
				stopped: func() bool { return stopped && p == Low }, full: func() bool { return false }})
		}
		pass := func(d time.Duration, all ...*slowLink) {
			for range int(d / (100 * time.Millisecond)) {
				time.Sleep(100 * time.Millisecond)
				synctest.Wait()
				for _, s := range all {
					s.send(100 * time.Millisecond)
				}
			}
		}
		want := func(what string, s *slowLink, low, high int64) {
			t.Helper()
			synctest.Wait()
			if s.rate < low || s.rate > high {
				t.Errorf("%s: %g Mbit/s", what, float64(s.rate)/mbit)
			}
		}
		a, am, aEnd := begin(High, Limit{})
		pass(5*time.Second, a)
		want("alone", a, 0, 0)
		am.SetLimit(Limit{Most: 80e6})
		r.apply(time.Now())
		want("its own limit", a, 80*mbit, 80*mbit)
		am.SetLimit(Limit{Auto: true, Least: 1e6, Most: 70e6})
		r.apply(time.Now())
		want("the most of auto", a, 70*mbit, 70*mbit)
		if !a.polite || am.Status().Link.Limit.String() != "auto:1mbit-70mbit" {
			t.Errorf("polite: %v, the status says %v", a.polite, am.Status().Link.Limit)
		}
		am.SetLimit(Limit{})
		b, bm, bEnd := begin(Low, Limit{})
		pass(20*time.Second, a, b)
		want("of high priority, without a cap", a, 0, 0)
		want("of low priority", b, 10*mbit, 50*mbit)
		if by := bm.Status().Link.LimitedBy; by != otherMoves {
			t.Errorf("limited by %q", by)
		}
		pass(time.Minute, a, b)
		want("of high priority, under a cap", a, 47*mbit, 49*mbit)
		want("of low priority, under a cap", b, 11*mbit, 13*mbit)
		if st := bm.Status().Link; st.LimitedBy != "site south" || st.Allowed != b.rate {
			t.Errorf("the status says %+v", st)
		}
		stopped = true
		r.apply(time.Now())
		want("whose guest stands still", b, 59*mbit, 60*mbit)
		stopped = false
		aEnd()
		want("alone under the cap", b, 60*mbit, 60*mbit)
		bEnd()
	})
}

func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &pacer{}
		never := func() bool { return false }
		read := func(n int, urgent func() bool) time.Duration {
			began := time.Now()
			for range n {
				if err := p.wait(t.Context(), 64<<10, urgent); err != nil {
					t.Fatal(err)
				}
			}
			return time.Since(began)
		}
		if d := read(1000, never); d != 0 {
			t.Errorf("without a rate: %v", d)
		}
		p.rate.Store(64 << 20)
		if d := read(1024, never); d < 900*time.Millisecond || d > time.Second {
			t.Errorf("64 MiB at 64 MiB/s: %v", d)
		}
		time.Sleep(time.Hour)
		if d := read(1024, never); d < 900*time.Millisecond || d > time.Second {
			t.Errorf("after a rest: %v", d)
		}
		if d := read(1024, func() bool { return true }); d != 0 {
			t.Errorf("when it is urgent: %v", d)
		}
		p.rate.Store(1)
		go func() { time.Sleep(time.Second); p.rate.Store(0) }()
		if d := read(1024, never); d > time.Second+paceStep {
			t.Errorf("a new rate after a second: %v", d)
		}
		p.rate.Store(1)
		why := errors.New("over")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(why)
		if err := p.wait(ctx, 1000, never); err != why {
			t.Errorf("at the end: %v", err)
		}
	})
}
