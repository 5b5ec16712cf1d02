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
	decision, word, ok := s.learn(ctx)
	if !ok {
		return s.askAlone(sy, word)
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

// askAlone asks for the decision without the session, and hears what an operator
// says meanwhile, and has said. It gives what is read at the move's end.
func (s *source) askAlone(sy *syncer, word *said) (cause error) {
	s.log.Warn("no decision in this session: asking the destination for it", "error", s.session.Err())
	s.closeSession("the decision is asked for anew")
	sy.stop()
	u := s.undecided()
	u.step = func(ctx context.Context, ev handoff.Event, why error) error {
		before := s.entry.State
		s.verified = sy.verified()
		err := s.step(ev, why)
		if s.entry.State != before {
			cause, err = err, nil
		}
		return err
	}
	if word != nil {
		word.reply <- u.hear(s.ctx, word.event)
	}
	u.run(s.ctx)
	return cause
}

func (s *source) undecided() *undecided {
	return &undecided{Engine: s.Engine, move: s.move, entry: &s.entry, log: s.log}
}

// step applies an event of the handoff and carries its actions out. It returns
// what the operator reads: why the guest is not at the destination, or what is
// left to do here. A cancelled move does not cancel them: only the destination
// knows, from the offer on.
func (s *source) step(ev handoff.Event, cause error) error {
	before := s.entry.State
	next, actions, err := handoff.Step(before, ev)
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
			var err error
			if cause, err = s.resume(ctx, cause); err != nil {
				return unfinished{ev, fmt.Errorf("%w (%w)", err, cause)}
			}
		case handoff.Release:
			cause = s.releaseGuest(ctx)
			if cause != nil && !errors.Is(cause, errLeft) {
				return unfinished{ev, cause}
			}
		case handoff.Start:
			cause = s.startClaimed(ctx, cause)
		case handoff.GiveUp:
			s.letGo()
			if err := s.Engine.end(ctx, s.entry); err != nil {
				return err
			}
			s.standRedirect()
		}
	}
	return cause
}

// recordState makes a state durable. What ends the move waits for that, and has
// been done before; else an error means that nothing has changed.
func (s *source) recordState(next handoff.State, cause error) error {
	before := s.entry.State
	if !phaseOf(next).Final() {
		return s.record(&s.entry, next, s.move)
	}
	was := s.move.Status()
	s.entry.State = next
	s.summarise(cause)
	s.entry.State = before
	if handoff.Recurs(before, next) {
		_ = s.settle(s.log, &s.entry, next, s.move) // the next agent ends it again
		s.entry.State = next
		return nil
	}
	err := s.record(&s.entry, next, s.move)
	if err != nil {
		s.move.update(func(st *Status) { *st = was })
	}
	return err
}

// letGo ends what ties the stopped guest to this move. It stays stopped.
func (s *source) letGo() {
	s.out.Close()
	if s.memory != nil {
		s.dropMemory(s.dom.UUID)
	}
}

// startClaimed lets the guest run here, as an operator has said.
func (s *source) startClaimed(ctx context.Context, cause error) error {
	s.undoRedirect("the VM runs here, as an operator has said")
	if err := s.out.Confirm(ctx, nil, true); err != nil {
		s.log.Warn("libvirt's Confirm", "error", err)
	}
	s.letGo()
	if err := s.startHere(ctx, s.entry); err != nil {
		return fmt.Errorf("%w; and the guest is not running here: %w: say it again, or try virsh start %q", cause, err, s.dom.Name)
	}
	return cause
}

// decisionWait is how long the decision may take until the move counts as in doubt.
const decisionWait = 30 * time.Second

// learn waits for the decision. It reports false when it has to be asked for: the
// session is gone, or an operator does not wait any longer, and has said what.
func (s *source) learn(ctx context.Context) (answer, *said, bool) {
	late, stopping := time.After(decisionWait), ctx.Done()
	var inbox <-chan said
	var latest <-chan time.Time
	doubt := func(why error) {
		s.undecided().doubt(why)
		inbox = s.move.inbox
	}
	watch := time.NewTicker(time.Second)
	defer watch.Stop()
	for {
		select {
		case a, ok := <-s.answers:
			if !ok {
				return answer{}, nil, false
			}
			if a.kind == kindRunning || a.kind == kindAborted {
				return a, nil, true
			}
			s.log.Warn("unexpected control message", "kind", a.kind)
		case <-late: // its disks may still be written there
			doubt(fmt.Errorf("no answer for %v", decisionWait))
		case <-watch.C:
			if inbox == nil && s.lostFor() > doubtAfter {
				doubt(errors.New("the link is lost"))
			}
		case word := <-inbox:
			return answer{}, &word, false
		case <-stopping: // the agent ends what it can
			latest, stopping = time.After(decisionWait), nil
		case <-latest:
			return answer{}, nil, false
		}
	}
}

// unfinished is the error of a move whose end is known, and could not be carried out:
// libvirtd was away for longer than that waits. The journal has the state before.
type unfinished struct {
	event handoff.Event
	err   error
}

func (u unfinished) Error() string {
	return "libvirtd has not let the move be ended yet: " + u.err.Error()
}
func (u unfinished) Unwrap() error { return u.err }

// goOn ends a move that is unfinished, however long that takes.
func (s *source) goOn(left unfinished) {
	r := &restarted{Engine: s.Engine, move: s.move, entry: s.entry, log: s.log, why: left}
	u := &undecided{Engine: s.Engine, move: s.move, entry: &r.entry, log: s.log, step: r.step, told: left.event}
	u.doubt(left)
	u.run(s.ctx)
}

// resume lets the guest run here again, and gives the cause as an operator reads it.
// An error means that it could not be, and that it may be later.
func (s *source) resume(ctx context.Context, cause error) (error, error) {
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
		return cause, err
	}
	if err := patiently(ctx, nil, func() error { return s.restoreDefinition(ctx, s.entry) }); err != nil {
		return cause, err
	}
	s.awaitAborted()
	return cause, nil
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

// lostFor is how long nothing has carried the session.
func (s *source) lostFor() time.Duration {
	if s.session == nil || !s.lost() {
		return 0
	}
	return time.Since(s.session.Link().LostSince)
}

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
