package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wanmig/wanmig/faults"
	"github.com/wanmig/wanmig/handoff"
)

// handOff gives the decision away, learns it and acts on it.
func (s *source) handOff(ctx context.Context, sy *syncer, cookie []byte) error {
	if !s.move.decide(ctx) {
		return s.step(handoff.Failed, context.Cause(ctx))
	}
	s.cookie = cookie
	if err := s.step(handoff.Ready, nil); err != nil {
		// Not durable, so not offered: the guest is still ours.
		return s.step(handoff.Failed, fmt.Errorf("%w: free some space in the state folder and try again", err))
	}
	offered := time.Now()
	decision, err := s.learn(ctx)
	if err != nil {
		return err
	}
	if decision.kind == kindAborted {
		return s.step(handoff.AnswerAborted, s.gaveUp(decision))
	}
	var r running
	if decision.body != nil {
		if err := decode(decision.body, &r); err != nil {
			s.log.Warn("the destination's account of the downtime is not readable", "error", err)
		}
	}
	s.measure(sy, offered, r)
	s.verified = sy.verified()
	return s.step(handoff.AnswerRunning, nil)
}

// step applies an event of the handoff and carries its actions out. It returns
// what the operator reads: why the guest is not at the destination, or what is
// left to do here. A cancelled move does not cancel them: only the destination
// knows, from the offer on.
func (s *source) step(ev handoff.Event, cause error) error {
	next, actions, err := handoff.Step(s.entry.State, ev)
	if err != nil {
		return errors.Join(cause, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for _, a := range actions {
		switch a {
		case handoff.Record:
			if err := s.recordState(next, cause); err != nil {
				return err
			}
		case handoff.SendOffer:
			faults.At("offer")
			if err := s.ctl.send(ctx, kindOffer, offer{Cookie: s.cookie}); err != nil {
				s.log.Warn("the offer may not have arrived, asking", "error", err)
			}
			faults.At("offer-sent")
		case handoff.Resume:
			cause = s.resume(ctx, cause)
		case handoff.Release:
			cause = s.releaseGuest(ctx)
		}
	}
	return cause
}

// recordState makes a state durable. That of a final state may fail: the next
// start of the agent finds the move and ends it again, which does no harm.
func (s *source) recordState(next handoff.State, cause error) error {
	before := s.entry.State
	if next.Final() {
		s.entry.State = next
		s.summarise(cause)
	}
	err := s.record(&s.entry, next, s.move)
	if err == nil {
		return nil
	}
	if !next.Final() {
		s.entry.State = before
		return err
	}
	s.log.Error("the move's end is not in the journal", "error", err)
	return nil
}

// decisionWait is how long the decision may take until the move counts as in doubt.
const decisionWait = 30 * time.Second

// learn waits for the decision, and asks for it when the session is gone. It
// returns an error only when the agent stops: the journal then asks again.
func (s *source) learn(ctx context.Context) (answer, error) {
	late, stopping := time.After(decisionWait), ctx.Done()
	var latest <-chan time.Time
	for open := true; open; {
		select {
		case a, ok := <-s.answers:
			if ok && (a.kind == kindRunning || a.kind == kindAborted) {
				return a, nil
			}
			if ok {
				s.log.Warn("unexpected control message", "kind", a.kind)
			}
			open = ok
		case <-late:
			s.move.doubt(fmt.Sprintf("no answer for %v; this agent goes on waiting", decisionWait))
		case <-stopping: // the agent ends what it can
			latest, stopping = time.After(decisionWait), nil
		case <-latest:
			return answer{}, errAsksAgain
		}
	}
	s.log.Warn("session lost with the offer out: asking the destination for its decision", "error", s.session.Err())
	return s.ask(ctx, s.move, s.entry)
}

// resume lets the guest run here again, and gives the cause as an operator reads it.
func (s *source) resume(ctx context.Context, cause error) error {
	if s.memory != nil {
		defer s.dropMemory(s.dom.UUID)
	}
	s.undoRedirect("the VM stays here")
	if errors.Is(cause, ErrCancelled) {
		cause = ErrCancelled // whatever part it interrupted
	}
	if s.entry.State == handoff.Owner && !s.aborted {
		s.tellCancel(ctx, cause)
	}
	faults.At("resume")
	if s.out != nil {
		if err := s.out.Confirm(ctx, nil, true); err != nil {
			s.log.Warn("libvirt's Confirm", "error", err)
		}
		s.out.Close()
	}
	switch err := s.revive(ctx, s.entry); {
	case errors.Is(err, errStopped):
		cause = fmt.Errorf("%w: %w", err, cause)
	case err != nil:
		cause = fmt.Errorf("%w; and the guest is not running here: %w: try virsh resume %q", cause, err, s.dom.Name)
	}
	s.awaitAborted()
	return cause
}

// tellCancel tells the destination why nothing more comes, if it can be told at
// once: the session's end says the same, and a guest may be waiting.
func (s *source) tellCancel(ctx context.Context, cause error) {
	if s.lost() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_ = s.ctl.send(ctx, kindCancel, reason{cause.Error()})
}

// lost reports whether nothing carries the session now.
func (s *source) lost() bool { return !s.session.Link().LostSince.IsZero() }

// awaitAborted gives the destination time to say that it has cleaned up, so
// that "rolled back" means both hosts.
func (s *source) awaitAborted() {
	if !s.listening || s.aborted {
		return
	}
	if s.lost() {
		s.log.Warn("the destination is not reached: it cleans up when it is told, or after the longest outage")
		return
	}
	late := time.After(time.Minute) // it may be starting QEMU
	for {
		select {
		case a, ok := <-s.answers:
			if ok && a.kind == kindAborted {
				s.noteAborted(a)
			}
			if !ok || s.aborted {
				return
			}
		case <-late:
			s.log.Warn("the destination did not confirm that it has cleaned up")
			return
		}
	}
}

// releaseGuest removes the guest here: it runs at the destination.
func (s *source) releaseGuest(ctx context.Context) error {
	s.move.phase(PhaseSettle)
	s.standRedirect()
	faults.At("confirm")
	if err := s.out.Confirm(ctx, nil, false); err != nil {
		s.log.Warn("libvirt's Confirm, clearing the source by hand", "error", err)
	}
	faults.At("confirmed")
	s.out.Close()
	if s.memory != nil {
		if err := s.memory.close(); err != nil {
			s.log.Warn("memory", "error", err)
		}
	}
	err := s.clear(ctx, s.entry)
	s.runHook(s.log, AfterResume, s.hookEnv())
	return err
}
