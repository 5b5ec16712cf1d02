package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/tunnel"
)

// DefaultRetries is what Request.Retries is where nobody says otherwise, MostRetries
// its bound.
const (
	DefaultRetries = 3
	MostRetries    = 100
)

const (
	retryPause   = 2 * time.Second // before a destination is asked for again
	retrySlowest = 15 * time.Second
)

// mayRetry reports whether another attempt may do better than one that ended with
// an error, the guest still here: something died on the way that can come back.
func (s *source) mayRetry(err error) bool {
	var stop refused
	switch {
	case err == nil, s.move.attempt > s.req.Retries, s.entry.State != handoff.Returned, s.move.Status().Phase == PhaseInDoubt:
		return false // an operator may have decided what was in doubt
	case errors.Is(err, ErrCancelled), errors.Is(err, errStopped), errors.Is(err, errRequest), errors.Is(err, ErrStalled), errors.As(err, &stop), s.ctx.Err() != nil:
		return false
	case errors.Is(err, ErrStillLost), errors.Is(err, hypervisor.ErrNoAnswer):
		return true
	case s.gave, s.aborted:
		return s.again
	}
	return s.session.Err() != nil
}

// nextAttempt makes the move that is the next attempt of one that failed. It is known
// before the failure is told.
func (s *source) nextAttempt() *Move {
	was := s.move.Status()
	ctx, cancel := context.WithCancelCause(s.ctx)
	next := newMove(Status{Move: newMoveID(), Role: "source", VM: was.VM, UUID: was.UUID, Peer: was.Peer, Phase: PhaseWait,
		Started: time.Now(), Priority: was.Priority, Attempt: s.move.attempt + 1, Link: Link{Limit: was.Link.Limit}}, cancel)
	next.attempt, next.ctx, next.limit = s.move.attempt+1, ctx, was.Link.Limit
	s.list(next)
	return next
}

// attempts moves a guest away, and tries again as long as that may help. Each
// attempt is a move of its own.
func (e *Engine) attempts(m *Move, dom *hypervisor.Domain, req Request) {
	for m != nil {
		next := e.moveAway(m.ctx, m, dom, req)
		if next != nil {
			e.pass(dom.UUID, m, next)
		} else {
			e.release(dom.UUID, m)
		}
		m.cancel(nil)
		close(m.done)
		if m = next; m == nil {
			return
		}
		var err error
		if dom, err = e.awaitDestination(m, dom.UUID, req); err != nil {
			e.giveUp(m, err)
			return
		}
		req.Rate = m.Status().Link.Limit
	}
}

// pass gives the domain of one move to the next.
func (e *Engine) pass(uuid string, from, to *Move) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.busy[uuid] == from.Status().Move {
		e.busy[uuid] = to.Status().Move
	}
}

// giveUp ends a move that has not begun.
func (e *Engine) giveUp(m *Move, err error) {
	m.update(func(s *Status) {
		s.Phase = PhaseRolledBack
		s.Result = &Result{Result: "rolled-back", Move: s.Move, VM: s.VM, To: s.Peer, Attempt: s.Attempt,
			TotalMS: time.Since(s.Started).Milliseconds(), Error: err.Error()}
	})
	e.Log.Info("move not begun", "move", m.Status().Move, "error", err)
	e.release(m.Status().UUID, m)
	m.cancel(nil)
	close(m.done)
}

// awaitDestination waits until the destination can be talked to again, and looks at
// the guest anew.
func (e *Engine) awaitDestination(m *Move, uuid string, req Request) (*hypervisor.Domain, error) {
	longest := req.MaxOutage
	if longest == 0 {
		longest = tunnel.DefaultOutage
	}
	late := time.After(longest)
	for pause := retryPause; ; pause = min(2*pause, retrySlowest) {
		select {
		case <-time.After(pause):
		case <-m.ctx.Done():
			return nil, context.Cause(m.ctx)
		}
		dom, err := e.readyToTry(m.ctx, uuid, req.To)
		switch {
		case err == nil:
			return dom, nil
		case errors.Is(err, hypervisor.ErrNoDomain): // somebody has taken it away
			return nil, fmt.Errorf("no other attempt is made: %w", err)
		}
		e.Log.Info("the next attempt waits", "move", m.Status().Move, "error", err)
		select {
		case <-late:
			return nil, fmt.Errorf("no other attempt could be made for %v: %w", longest, err)
		default:
		}
	}
}

// readyToTry reports nil when both hosts can serve a move.
func (e *Engine) readyToTry(ctx context.Context, uuid, site string) (*hypervisor.Domain, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	dom, err := e.Host.Domain(ctx, uuid)
	if err != nil {
		return nil, err
	}
	session, err := e.Dial(ctx, site, asks)
	if err != nil {
		return nil, err
	}
	defer session.Close("asked")
	_, theirs, err := e.greet(ctx, session)
	if err == nil && theirs.Problem != "" {
		err = errors.New(theirs.Problem)
	}
	return dom, err
}
