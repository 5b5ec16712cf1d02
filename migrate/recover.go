package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// errUndecided is returned when the destination's decision is not known yet.
var errUndecided = errors.New("the destination has the decision and has not told it: the guest stays paused here until it does")

// errAsksAgain is returned when the agent stops before it knows the decision.
var errAsksAgain = fmt.Errorf("%w: the agent stops, and asks again when it starts", errUndecided)

// errStopped is returned when the guest shut down or ended by itself.
var errStopped = errors.New("the guest itself has stopped at the source")

// Recover finishes or rolls back every move that the journal does not know the
// end of. It returns at once; what needs the peer or libvirt goes on beside.
func (e *Engine) Recover(ctx context.Context) error {
	entries, err := e.Journal.All()
	if err != nil {
		return err
	}
	e.decideRedirects(entries)
	e.dropStrayMemory(entries)
	e.work.Go(func() { e.keepSwept(ctx) })
	e.work.Go(func() { e.rates.run(ctx) })
	for _, entry := range entries {
		if entry.State.Final() {
			continue
		}
		m := newMove(statusOf(entry), func(error) {})
		if err := e.claim(entry.UUID, m); err != nil {
			e.Log.Error("move not recovered", "move", entry.Move, "error", err)
			continue
		}
		e.work.Go(func() {
			defer close(m.done)
			e.recoverMove(ctx, m, entry)
			e.release(entry.UUID, m)
		})
	}
	return nil
}

// decideRedirects takes up the redirects of moves that are over.
func (e *Engine) decideRedirects(entries []handoff.Entry) {
	known := map[string]handoff.State{}
	for _, entry := range entries {
		known[entry.Move] = entry.State
	}
	for _, move := range e.Redirects.Moves() {
		state, ok := known[move]
		if x, stands := e.Redirects.Find(move); stands && (!ok || state.Final()) {
			e.Redirects.Decide(move, hasGone(state, x.Status().State))
		}
	}
}

// hasGone tells whether the VM of a redirect went to the destination, by its
// move's final state. Where the journal has none any more the move ended long
// ago, and a redirect that has been switched is one whose VM went.
func hasGone(move handoff.State, redirect netredirect.State) bool {
	if move == "" {
		return redirect != netredirect.Opening && redirect != netredirect.Armed
	}
	return move == handoff.Released || move == handoff.Running
}

func (e *Engine) recoverMove(ctx context.Context, m *Move, entry handoff.Entry) {
	log := e.Log.With("move", entry.Move, "vm", entry.VM, "state", entry.State)
	log.Info("recovering a move that was not over when the agent ended")
	event, err := e.finishMove(ctx, m, entry)
	var final handoff.State
	if err == nil {
		final, _, err = handoff.Step(entry.State, event)
	}
	if err != nil {
		log.Error("move not recovered", "error", err)
		m.update(func(s *Status) {
			s.Phase = PhaseInDoubt
			s.Result = &Result{Result: "in-doubt", Move: s.Move, VM: s.VM, To: s.Peer, Error: err.Error()}
		})
		return
	}
	why := "the agent was restarted during the move"
	m.update(func(s *Status) {
		r := &Result{Move: s.Move, VM: s.VM, To: s.Peer, Result: "done", TotalMS: time.Since(s.Started).Milliseconds()}
		s.Phase = PhaseDone
		if final == handoff.Returned || final == handoff.Aborted {
			s.Phase, r.Result, r.Error = PhaseRolledBack, "rolled-back", why
		}
		s.Result = r
	})
	e.removeSockets(ctx, entry)
	if err := e.record(&entry, final, m); err != nil {
		log.Error("the move's end is not in the journal", "error", err)
		return
	}
	e.Redirects.Decide(entry.Move, final == handoff.Released || final == handoff.Running)
	log.Info("move recovered", "result", final)
}

// finishMove carries out what the journal's state asks for, and tells the event
// that ends the move.
func (e *Engine) finishMove(ctx context.Context, m *Move, entry handoff.Entry) (handoff.Event, error) {
	switch entry.State {
	case handoff.Owner: // never offered, so it is ours
		err := e.revive(ctx, entry)
		if errors.Is(err, errStopped) {
			err = nil // by itself, and it is still ours
		}
		return handoff.Failed, err
	case handoff.Offered:
		a, err := e.ask(ctx, m, entry)
		switch {
		case err != nil:
			return 0, err
		case a.kind == kindAborted:
			return handoff.AnswerAborted, e.revive(ctx, entry)
		}
		return handoff.AnswerRunning, e.clear(ctx, entry)
	case handoff.Receiver: // never accepted, so it is the source's
		_, err := e.discardLeft(ctx, entry)
		return handoff.Broken, err
	}
	return handoff.Resumed, e.findAccepted(ctx, entry)
}

// removeSockets removes what an agent that was killed left for QEMU to connect to.
func (e *Engine) removeSockets(ctx context.Context, entry handoff.Entry) {
	for _, name := range []func(context.Context, string, string) (string, string, error){e.Host.SourceSockets, e.Host.DestinationSockets} {
		if ram, nbd, err := name(ctx, entry.Move, entry.VM); err == nil {
			_, _ = os.Remove(ram), os.Remove(nbd)
		}
	}
}

// findAccepted looks whether the guest that was accepted runs. One that does
// not may have run and stopped since: then only a person can say whose disks count.
func (e *Engine) findAccepted(ctx context.Context, entry handoff.Entry) error {
	state, err := e.Host.State(ctx, entry.UUID)
	switch {
	case err == nil && state == hypervisor.Running:
		return nil
	case err != nil && !errors.Is(err, hypervisor.ErrNoDomain):
		return err
	}
	return fmt.Errorf("guest %q was accepted here and does not run: if it ran here, start it here with virsh start; if it surely did not, resume it at %s with virsh resume %q",
		entry.VM, entry.Site, entry.VM)
}

// ask asks the destination for its decision until it is told.
func (e *Engine) ask(ctx context.Context, m *Move, entry handoff.Entry) (answer, error) {
	const patience, slowest = 5 * time.Second, 5 * time.Second
	begun, pause := time.Now(), 200*time.Millisecond
	for {
		a, err := e.askOnce(ctx, entry)
		if err == nil && (a.kind == kindRunning || a.kind == kindAborted) {
			return a, nil
		}
		if err == nil {
			err = peerReason(a.body)
		}
		if time.Since(begun) > patience {
			m.doubt(fmt.Sprintf("last answer: %v; this agent goes on asking", err))
		}
		e.Log.Warn("decision not known, asking again", "move", entry.Move, "error", err)
		select {
		case <-ctx.Done():
			return answer{}, errAsksAgain
		case <-time.After(pause):
			pause = min(2*pause, slowest)
		}
	}
}

// doubt tells that the decision is not known yet, and why.
func (m *Move) doubt(why string) {
	m.update(func(s *Status) {
		s.Phase = PhaseInDoubt
		s.Result = &Result{Result: "in-doubt", Move: s.Move, VM: s.VM, To: s.Peer, TotalMS: time.Since(s.Started).Milliseconds(),
			Error: fmt.Sprintf("%v; %s", errUndecided, why)}
	})
}

// askOnce asks in a session of its own.
func (e *Engine) askOnce(ctx context.Context, entry handoff.Entry) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	session, err := e.Dial(ctx, entry.Site, asks)
	if err != nil {
		return answer{}, err
	}
	defer session.Close("asked")
	if session.Peer() != tunnel.ID(entry.Peer) {
		return answer{}, fmt.Errorf("site %s is another agent now: the move was made to %s", entry.Site, entry.Peer)
	}
	ctl, _, err := e.greet(ctx, session)
	if err != nil {
		return answer{}, err
	}
	if err := ctl.send(ctx, kindQuery, query{entry.Move}); err != nil {
		return answer{}, err
	}
	kind, body, err := ctl.recv(ctx)
	return answer{kind, append([]byte(nil), body...)}, err
}

// asked gives the decision of a guest that is arriving right now.
func (in *incoming) asked() byte {
	reply := make(chan byte, 1)
	select {
	case in.events <- inEvent{event: handoff.Asked, reply: reply}:
		return <-reply
	case <-in.move.Done():
		return kindUndecided // it has ended meanwhile: the journal answers next time
	}
}

// revive makes sure that the guest runs here as it did before the move.
func (e *Engine) revive(ctx context.Context, entry handoff.Entry) error {
	const patience = 60 * time.Second // libvirtd may be starting
	for begun := time.Now(); ; {
		err := e.reviveOnce(ctx, entry)
		if err == nil || errors.Is(err, errStopped) || ctx.Err() != nil || time.Since(begun) > patience {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (e *Engine) reviveOnce(ctx context.Context, entry handoff.Entry) error {
	state, err := e.Host.State(ctx, entry.UUID)
	if errors.Is(err, hypervisor.ErrNoDomain) || err == nil && !state.Active() {
		return fmt.Errorf("%w: %q", errStopped, entry.VM)
	}
	if err != nil {
		return err
	}
	if job, err := e.Host.JobStats(ctx, entry.UUID); err == nil && job.Active {
		// A Perform that outlived its client. The guest goes on when it ends.
		if err := e.Host.Abort(ctx, entry.UUID); err != nil {
			e.Log.Debug("abort refused", "error", err)
		}
		return fmt.Errorf("libvirt still migrates %q: virsh domjobabort ends that", entry.VM)
	}
	switch {
	case state == hypervisor.Running, state == hypervisor.Paused && entry.Paused:
		return nil
	case state == hypervisor.Paused:
		return e.Host.Resume(ctx, entry.UUID)
	}
	return fmt.Errorf("guest %q is %s: look at it with virsh list", entry.VM, state)
}

// clear removes a guest that runs at the destination from its source.
func (e *Engine) clear(ctx context.Context, entry handoff.Entry) error {
	state, err := e.Host.State(ctx, entry.UUID)
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
	case err != nil:
		return fmt.Errorf("the guest runs at %s; its paused copy here is not removed: %w: use virsh destroy, then undefine", entry.Site, err)
	default:
		if state.Active() {
			if err := e.Host.Destroy(ctx, entry.UUID); err != nil {
				return err
			}
		}
		err := e.Host.Undefine(ctx, entry.UUID, false)
		if err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
			return err
		}
	}
	for i := range entry.Keep {
		entry.Keep[i].Since = time.Now()
	}
	return errors.Join(e.keepCopies(entry.Keep), e.removeDisks(ctx, entry.Remove))
}

// discardLeft removes what an aborted move left at its destination: the domain,
// unless it runs, and the disks that the move made, but for what is kept for
// the next attempt: so many bytes.
func (e *Engine) discardLeft(ctx context.Context, entry handoff.Entry) (kept int64, err error) {
	state, err := e.Host.State(ctx, entry.UUID)
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
	case err != nil:
		return 0, err
	case state == hypervisor.Running:
		return 0, fmt.Errorf("guest %q runs here though its move was aborted: nothing is removed", entry.VM)
	default:
		if err := e.Host.Destroy(ctx, entry.UUID); err != nil {
			return 0, err
		}
		if err := e.Host.Undefine(ctx, entry.UUID, true); err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
			e.Log.Debug("undefine", "error", err)
		}
	}
	remove, kept := e.keepArrived(entry)
	return kept, e.removeDisks(ctx, remove)
}

// removeDisks removes disks that no domain uses any more.
func (e *Engine) removeDisks(ctx context.Context, paths []string) error {
	var errs []error
	for _, p := range paths {
		if err := e.Host.RemoveDisk(ctx, p); err != nil {
			errs = append(errs, fmt.Errorf("%w: remove it by hand", err))
		}
	}
	return errors.Join(errs...)
}
