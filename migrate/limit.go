package migrate

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/wanmig/wanmig/rate"
	"github.com/wanmig/wanmig/tunnel"
)

// Limit is how much of the link a move may use at most, of bits on the wire. The
// zero value is no limit.
type Limit struct {
	// Auto lets the move take a share that leaves room for others, and each round
	// of its memory only as much as it needs (see adaptive), from Least to Most.
	Auto  bool
	Least rate.Rate // of Auto
	Most  rate.Rate // 0: no limit
}

// leastAuto is the Least of "auto".
const leastAuto rate.Rate = 50e6

// ParseLimit reads "none", a rate, "auto" or "auto:LEAST-MOST".
func ParseLimit(s string) (Limit, error) {
	bounds, auto := strings.CutPrefix(s, "auto:")
	switch {
	case s == "none":
		return Limit{}, nil
	case s == "auto":
		return Limit{Auto: true, Least: leastAuto}, nil
	case auto:
		from, to, ok := strings.Cut(bounds, "-")
		least, err := rate.Parse(from)
		most, merr := rate.Parse(to)
		if !ok || err != nil || merr != nil || least > most {
			return Limit{}, fmt.Errorf("bad rate %.40q: want auto:LEAST-MOST, such as auto:50mbit-400mbit", s)
		}
		return Limit{Auto: true, Least: least, Most: most}, nil
	}
	r, err := rate.Parse(s)
	if err != nil {
		return Limit{}, fmt.Errorf("%w, or auto, or none", err)
	}
	return Limit{Most: r}, nil
}

func (l Limit) String() string {
	switch {
	case l == Limit{}:
		return "none"
	case l.Auto && l.Most == 0:
		return "auto"
	case l.Auto:
		return fmt.Sprintf("auto:%v-%v", l.Least, l.Most)
	}
	return l.Most.String()
}

// MarshalText writes a limit as ParseLimit reads it.
func (l Limit) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText is ParseLimit.
func (l *Limit) UnmarshalText(b []byte) (err error) {
	*l, err = ParseLimit(string(b))
	return err
}

// Priority orders moves that share a link.
type Priority string

// A move gets shares of the link by its weight.
const (
	High   Priority = "high"   // weight 4
	Normal Priority = "normal" // weight 2; also of a move that doesn't say
	Low    Priority = "low"    // weight 1
)

// Priorities are all of them, the first first.
var Priorities = []Priority{High, Normal, Low}

func (p Priority) weight() int {
	switch p {
	case High:
		return 4
	case Low:
		return 1
	}
	return 2
}

// Bounds of how long a link may be gone.
const (
	LeastOutage = 10 * time.Second
	MostOutage  = 24 * time.Hour
)

// asks is of a session that only asks.
var asks = tunnel.DialOptions{MaxOutage: 30 * time.Second}

// Validate looks for what no move can have.
func (r Request) Validate() error {
	if r.Priority != "" && !slices.Contains(Priorities, r.Priority) {
		return fmt.Errorf("priority %.20q: there are high, normal and low", r.Priority)
	}
	if r.MaxOutage != 0 && (r.MaxOutage < LeastOutage || r.MaxOutage > MostOutage) {
		return fmt.Errorf("max outage %v: want from %v to %v", r.MaxOutage, LeastOutage, MostOutage)
	}
	if r.Downtime != 0 && (r.Downtime < LeastDowntime || r.Downtime > MostDowntime) {
		return fmt.Errorf("downtime %v: want from %v to %v", r.Downtime, LeastDowntime, MostDowntime)
	}
	if r.OnStall != "" && !slices.Contains(OnStalls, r.OnStall) {
		return fmt.Errorf("on stall %.20q: there are throttle, stop, wait and fail", r.OnStall)
	}
	if r.Retries < 0 || r.Retries > MostRetries {
		return fmt.Errorf("%d retries: want from 0 to %d", r.Retries, MostRetries)
	}
	return nil
}

// downtime is the goal.
func (r Request) downtime() time.Duration {
	if r.Downtime == 0 {
		return DefaultDowntime
	}
	return r.Downtime
}

func (r Request) onStall() OnStall {
	if r.OnStall == "" {
		return StallThrottle
	}
	return r.OnStall
}

// ErrNoMove is returned when there is no such move.
var ErrNoMove = errors.New("no move")

// ErrNotSource is returned when the other host decides.
var ErrNotSource = errors.New("the source of the move limits it")

// ErrOver is returned when a move has ended.
var ErrOver = errors.New("the move is over")

// SetLimit changes how much of the link the move may use.
func (m *Move) SetLimit(l Limit) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.status.Phase.Final():
		return fmt.Errorf("%w: %s", ErrOver, m.status.Phase)
	case m.status.Role != "source":
		return fmt.Errorf("%w: run wanmig limit at %s", ErrNotSource, m.status.Peer)
	}
	m.limit, m.status.Link.Limit = l, l
	return nil
}

// Limit returns what SetLimit has set.
func (m *Move) Limit() Limit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.limit
}
