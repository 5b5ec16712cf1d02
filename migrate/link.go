package migrate

import (
	"context"
	"sync"
	"time"

	"github.com/wanmig/wanmig/tunnel"
)

// Link is what the session to the peer has carried, in bytes on the wire, and how
// it stands.
type Link struct {
	Sent     uint64  `json:"sent"`
	Received uint64  `json:"received"`
	Resent   uint64  `json:"resent"` // of Sent: what was sent a second time, after a carrier was lost
	Rate     int64   `json:"rate"`   // sent per second
	RTTMS    float64 `json:"rtt_ms"`

	LostSince *time.Time `json:"lost_since,omitempty"` // nothing carries the session since then
	LostMS    int64      `json:"lost_ms,omitempty"`    // how long that was the case, in all

	Limit     Limit  `json:"limit,omitzero"`       // as asked for
	Allowed   int64  `json:"allowed,omitempty"`    // bytes sent per second at most, now; 0: no limit
	LimitedBy string `json:"limited_by,omitempty"` // what holds it below Limit

	Carriers []Carrier `json:"carriers,omitempty"` // now
}

// Carrier is one connection of a session.
type Carrier struct {
	Transport string  `json:"transport"` // quic or tcp
	Remote    string  `json:"remote"`
	Sent      uint64  `json:"sent"`
	Received  uint64  `json:"received"`
	RTTMS     float64 `json:"rtt_ms"`
}

// CarriersUsed is how many connections of a transport a session had at one time.
type CarriersUsed struct {
	Transport string `json:"transport"`
	Most      int    `json:"most"`
}

// linked is a session, of which only the state is of interest.
type linked interface {
	Stats() tunnel.Stats
	Link() tunnel.Link
}

// linkMeter follows how the link of a session goes.
type linkMeter struct {
	session linked

	mu    sync.Mutex
	wire  gauge
	away  time.Duration // without a carrier, before the present loss
	since time.Time     // of the present loss; zero: there is none
	used  []CarriersUsed
}

// look takes the session's counts at a time.
func (m *linkMeter) look(now time.Time) Link {
	m.mu.Lock()
	defer m.mu.Unlock()
	counts, link := m.session.Stats(), m.session.Link()
	if !m.since.IsZero() && m.since != link.LostSince {
		end := now
		if !link.LostSince.IsZero() {
			end = link.LostSince // it was up for a moment
		}
		m.away += max(end.Sub(m.since), 0)
	}
	m.since = link.LostSince
	l := Link{Sent: counts.BytesSent, Received: counts.BytesReceived, Resent: counts.BytesResent,
		Rate: m.wire.add(int64(counts.BytesSent), now), RTTMS: ms(counts.RTT)}
	away := m.away
	if !m.since.IsZero() {
		since := m.since
		l.LostSince = &since
		away += max(now.Sub(since), 0)
	}
	l.LostMS = away.Milliseconds()
	count := map[string]int{}
	for _, c := range link.Carriers {
		l.Carriers = append(l.Carriers, Carrier{Transport: c.Transport.String(), Remote: c.Remote,
			Sent: c.Sent, Received: c.Received, RTTMS: ms(c.RTT)})
		count[c.Transport.String()]++
	}
	for _, t := range []tunnel.Transport{tunnel.QUIC, tunnel.TCP} {
		m.note(t.String(), count[t.String()])
	}
	return l
}

func (m *linkMeter) note(transport string, n int) {
	for i := range m.used {
		if m.used[i].Transport == transport {
			m.used[i].Most = max(m.used[i].Most, n)
			return
		}
	}
	if n > 0 {
		m.used = append(m.used, CarriersUsed{transport, n})
	}
}

// carriersUsed are those that the session has had.
func (m *linkMeter) carriersUsed() []CarriersUsed {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]CarriersUsed(nil), m.used...)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// linkEvery is how often a status is told of the link.
const linkEvery = 500 * time.Millisecond

// watchLink keeps the status of a move up to date about its link, until ctx ends.
func (m *linkMeter) watch(ctx context.Context, move *Move) {
	ticker := time.NewTicker(linkEvery)
	defer ticker.Stop()
	for {
		m.show(move)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

func (m *linkMeter) show(move *Move) {
	l := m.look(time.Now())
	move.update(func(st *Status) {
		l.Limit, l.Allowed, l.LimitedBy = st.Link.Limit, st.Link.Allowed, st.Link.LimitedBy
		st.Link = l
	})
}
