package migrate

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"strings"
	"sync"
	"time"
)

// ErrCancelled is returned when an operator cancelled the move.
var ErrCancelled = errors.New("cancelled by the operator")

// ErrTooLate is returned when a move can't be cancelled any more.
var ErrTooLate = errors.New("the destination has the decision already: the move ends by itself in a moment")

// Move is one move at one of its hosts.
type Move struct {
	mu      sync.Mutex
	status  Status
	changed chan struct{}   // closed and replaced at each change
	ctx     context.Context // of a move that this host makes, until it ends or is cancelled
	cancel  context.CancelCauseFunc
	attempt int  // from 1
	ending  bool // it was not decided when its agent ended: nothing but clearing is left
	decided bool // the offer is made: nothing at this host stops the move
	limit   Limit
	inbox   chan said // what is said of a move whose end is open; nobody listens otherwise
	done    chan struct{}
}

func newMove(s Status, cancel context.CancelCauseFunc) *Move {
	return &Move{status: s, changed: make(chan struct{}), cancel: cancel, inbox: make(chan said), done: make(chan struct{})}
}

// newMoveID makes an ID that no other move will have.
func newMoveID() string {
	var b [5]byte
	rand.Read(b[:]) // never fails
	return "mv-" + strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}

// Status returns the move as it stands. The slices in it are not changed later.
func (m *Move) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status
}

// Changed returns the status and a channel that is closed when it is stale.
func (m *Move) Changed() (Status, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status, m.changed
}

// Done is closed when nothing more is done for the move by itself.
func (m *Move) Done() <-chan struct{} { return m.done }

// Cancel asks for the guest to stay at the source. It returns at once; ErrTooLate
// is returned when the decision is not this host's any more.
func (m *Move) Cancel(cause error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.decided || m.status.Phase.Final() {
		return ErrTooLate
	}
	m.cancel(cause)
	return nil
}

// decide marks the point of no return. It reports false when the move was
// cancelled before.
func (m *Move) decide(ctx context.Context) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ctx.Err() != nil {
		return false
	}
	m.decided = true
	return true
}

// update changes the status and wakes its watchers.
func (m *Move) update(change func(*Status)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change(&m.status)
	if m.status.Phase.Final() && m.status.Ended == nil {
		now := time.Now()
		m.status.Ended = &now
	}
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Move) phase(p Phase) { m.update(func(s *Status) { s.Phase = p }) }
