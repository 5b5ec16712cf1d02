package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

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
	e.dropStraySockets(entries)
	e.work.Go(func() { e.keepSwept(ctx) })
	e.work.Go(func() { e.rates.run(ctx) })
	for i, entry := range entries {
		switch {
		case overtaken(entry, entries[i+1:]):
			e.endOvertaken(entry)
		case !entry.State.Final():
			e.takeUp(ctx, entry)
		case entry.State == handoff.Aborted && len(entry.Created) > 0 && entry.Seq > 0: // without, an older release has discarded it
			e.work.Go(func() { e.discardLate(ctx, entry) })
		}
	}
	return nil
}

// overtaken reports whether a move that had not come to its offer has later ones of
// the same guest: it was over when they began, and its end did not reach the disk.
// What it would undo is theirs.
func overtaken(entry handoff.Entry, later []handoff.Entry) bool {
	return (entry.State == handoff.Owner || entry.State == handoff.Receiver) &&
		slices.ContainsFunc(later, func(l handoff.Entry) bool { return l.UUID == entry.UUID })
}

// endOvertaken ends a move that was overtaken, in the journal only.
func (e *Engine) endOvertaken(entry handoff.Entry) {
	ended := map[handoff.State]handoff.State{handoff.Owner: handoff.Returned, handoff.Receiver: handoff.Aborted}
	entry.State = ended[entry.State]
	if err := e.Journal.Put(entry); err != nil {
		e.Log.Warn("a move that is over is not ended in the journal, the next agent tries again", "move", entry.Move, "vm", entry.VM, "error", err)
	}
	e.remember(entry)
}

// takeUp goes on with a move where its agent left it.
func (e *Engine) takeUp(ctx context.Context, entry handoff.Entry) {
	r := &restarted{Engine: e, move: newMove(statusOf(entry), func(error) {}), entry: entry,
		log: e.Log.With("move", entry.Move, "vm", entry.VM)}
	r.move.decided = true
	r.move.ending = entry.State == handoff.Owner || entry.State == handoff.Receiver
	if entry.State != handoff.Claimed {
		r.move.phase(PhaseHandoff) // in doubt is what can't be told soon
	}
	r.log.Info("recovering a move that was not over when the agent ended", "state", entry.State)
	if entry.State == handoff.Claimed { // its guest is free
		e.list(r.move)
	} else if err := e.claim(entry.UUID, r.move); err != nil {
		r.log.Error("move not recovered", "error", err)
		return
	}
	e.work.Go(func() {
		defer close(r.move.done)
		if entry.State == handoff.Offered {
			r.fenceAgain(ctx)
		}
		u := &undecided{Engine: e, move: r.move, entry: &r.entry, log: r.log, step: r.step}
		u.run(ctx)
		e.release(entry.UUID, r.move)
	})
}

// restarted carries out the steps of a move whose agent was started anew: it has
// its journal, and what libvirt has.
type restarted struct {
	*Engine
	move  *Move
	entry handoff.Entry
	log   *slog.Logger
	left  error // an errLeft
	why   error // the move did not end, of one whose agent goes on
}

// fenceAgain takes a definition away that libvirt has written when its mirrors
// ended, after the fence, and that came to light when the host was started anew.
func (r *restarted) fenceAgain(ctx context.Context) {
	if state, err := r.Host.State(ctx, r.entry.UUID); err != nil || state.Active() {
		return
	}
	if err := r.fence(ctx, r.entry); err != nil {
		r.log.Warn("the guest can still be started here by mistake", "error", err)
	}
}

// step carries the actions of an event out. All of them can be done again.
func (r *restarted) step(ctx context.Context, ev handoff.Event, why error) error {
	before := r.entry.State
	next, actions, err := handoff.Step(before, ev)
	if err != nil {
		return err
	}
	for _, a := range actions {
		if err := r.act(ctx, a, next, why); err != nil {
			return err
		}
	}
	if next != before {
		r.log.Info("move recovered", "from", before, "event", ev, "to", next)
	}
	return nil
}

func (r *restarted) act(ctx context.Context, a handoff.Action, next handoff.State, why error) error {
	switch a {
	case handoff.Record:
		return r.recordState(ctx, next, why)
	case handoff.Resume:
		err := r.revive(ctx, r.entry)
		if errors.Is(err, errStopped) {
			err = r.bootAgain(ctx, r.entry) // it is still ours
		}
		return errors.Join(err, r.restoreDefinition(ctx, r.entry))
	case handoff.Release:
		err := r.clear(ctx, r.entry)
		if errors.Is(err, errLeft) && ctx.Err() == nil {
			r.left, err = err, nil
		}
		return err
	case handoff.Start:
		return r.startHere(ctx, r.entry)
	case handoff.GiveUp:
		return r.end(ctx, r.entry)
	case handoff.Halt:
		return r.halt(ctx, r.entry)
	case handoff.Discard:
		err := r.discardAborted(ctx, r.entry)
		if err == nil {
			r.entry.Created = nil
		}
		return err
	}
	return nil // what is told is told by who asked, and who asks is undecided
}

// recordState makes a state durable, with the status that it is shown as.
func (r *restarted) recordState(ctx context.Context, next handoff.State, why error) error {
	was := r.move.Status()
	if shown := phaseOf(next); shown.Final() {
		r.move.update(func(s *Status) {
			result := Result{Move: s.Move, VM: s.VM, To: s.Peer, TotalMS: time.Since(s.Started).Milliseconds()}
			if s.Result != nil {
				result = *s.Result
			}
			result.Result, result.Error, result.Ways = string(shown), "", nil
			if r.why != nil && !leaves(next) {
				why = r.why
			}
			if err := errors.Join(why, r.left); err != nil {
				result.Error = err.Error()
			}
			s.Phase, s.Result = shown, &result
		})
	}
	if err := r.record(&r.entry, next, r.move); err != nil {
		r.move.update(func(s *Status) { *s = was })
		return err
	}
	if next.Final() || next == handoff.Claimed {
		r.removeSockets(ctx, r.entry)
		r.Redirects.Decide(r.entry.Move, leaves(next))
	}
	return nil
}

// bootAgain starts a guest that its libvirtd would have started with the host,
// had this move not taken its definition away.
func (e *Engine) bootAgain(ctx context.Context, entry handoff.Entry) error {
	if !entry.Autostart || entry.Boot == bootID() {
		return nil
	}
	return e.Host.Start(ctx, entry.UUID, entry.XML, entry.Persistent)
}

// bootID names the time since the host was started; "" when it is not known.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// leaves reports whether the guest has gone to the destination, or is to be
// taken for gone.
func leaves(s handoff.State) bool {
	return s == handoff.Released || s == handoff.Running || s == handoff.Abandoned
}

// phaseOf is how a state is shown that is no part of a live move any more.
func phaseOf(s handoff.State) Phase {
	switch s {
	case handoff.Released, handoff.Running:
		return PhaseDone
	case handoff.Returned, handoff.Aborted, handoff.Claimed:
		return PhaseRolledBack
	case handoff.Abandoned:
		return PhaseAbandoned
	case handoff.Split:
		return PhaseSplit
	}
	return PhaseInDoubt
}

// decideRedirects takes up the redirects of moves that are over.
func (e *Engine) decideRedirects(entries []handoff.Entry) {
	known := map[string]handoff.State{}
	for _, entry := range entries {
		known[entry.Move] = entry.State
	}
	for _, move := range e.Redirects.Moves() {
		state, ok := known[move]
		if x, stands := e.Redirects.Find(move); stands && (!ok || state.Final() || state == handoff.Claimed) {
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
	return leaves(move)
}

// dropStraySockets removes those of moves whose end is in the journal.
func (e *Engine) dropStraySockets(entries []handoff.Entry) {
	over := map[string]bool{}
	for _, entry := range entries {
		over[entry.Move] = entry.State.Final()
	}
	if err := e.Host.RemoveStraySockets(func(move string) bool { return over[move] }); err != nil {
		e.Log.Warn("something of a move is left", "error", err)
	}
}

// removeSockets removes what an agent that was killed left for QEMU to connect to.
func (e *Engine) removeSockets(ctx context.Context, entry handoff.Entry) {
	for _, name := range []func(context.Context, string, string) (string, string, error){e.Host.SourceSockets, e.Host.DestinationSockets} {
		if ram, nbd, err := name(ctx, entry.Move, entry.VM); err == nil {
			_, _ = os.Remove(ram), os.Remove(nbd)
		}
	}
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
	if err := ctl.send(ctx, kindQuery, query{Move: entry.Move, Claimed: entry.State == handoff.Claimed}); err != nil {
		return answer{}, err
	}
	kind, body, err := ctl.recv(ctx)
	return answer{kind, append([]byte(nil), body...)}, err
}

// patience is how long libvirtd may be gone for what has to be done with it.
const patience = 60 * time.Second

// patiently repeats what needs libvirtd until it is done, or fails with a certain error.
func patiently(ctx context.Context, certain error, do func() error) error {
	for begun := time.Now(); ; {
		err := do()
		if err == nil || errors.Is(err, certain) || ctx.Err() != nil || time.Since(begun) > patience {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// revive makes sure that the guest runs here as it did before the move.
func (e *Engine) revive(ctx context.Context, entry handoff.Entry) error {
	return patiently(ctx, errStopped, func() error { return e.reviveOnce(ctx, entry) })
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
	if err := patiently(ctx, nil, func() error { return e.clearDomain(ctx, entry) }); err != nil {
		return fmt.Errorf("the guest runs at %s; its paused copy here is not removed: %w: use virsh destroy, then undefine", entry.Site, err)
	}
	for i := range entry.Keep {
		entry.Keep[i].Since = time.Now()
	}
	err := e.keepCopies(entry.Keep)
	if err != nil {
		err = fmt.Errorf("%w, and is not listed as a copy: %w", errLeft, err)
	}
	return errors.Join(err, e.removeDisks(ctx, entry.Remove))
}

func (e *Engine) clearDomain(ctx context.Context, entry handoff.Entry) error {
	state, err := e.Host.State(ctx, entry.UUID)
	if err == nil && state.Active() {
		err = e.Host.Destroy(ctx, entry.UUID)
	}
	if err == nil {
		err = e.Host.Undefine(ctx, entry.UUID, false)
	}
	if err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
		return err
	}
	return e.eraseDefinition(ctx, entry)
}

// discardLeft removes what an aborted move left at its destination: the domain,
// unless it runs, and the disks that the move made, but for what is kept for
// the next attempt: so many bytes.
func (e *Engine) discardLeft(ctx context.Context, entry handoff.Entry) (kept int64, err error) {
	if err := patiently(ctx, errRuns, func() error { return e.discardDomain(ctx, entry) }); err != nil {
		return 0, err
	}
	remove, kept := e.keepArrived(entry)
	return kept, e.removeDisks(ctx, remove)
}

// errRuns is returned when a guest runs that should not.
var errRuns = errors.New("it runs here though its move was aborted: nothing is removed")

func (e *Engine) discardDomain(ctx context.Context, entry handoff.Entry) error {
	state, err := e.Host.State(ctx, entry.UUID)
	if err == nil && state == hypervisor.Running {
		return fmt.Errorf("guest %q: %w", entry.VM, errRuns)
	}
	if err == nil {
		err = e.Host.Destroy(ctx, entry.UUID)
	}
	if errors.Is(err, hypervisor.ErrNoDomain) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := e.Host.Undefine(ctx, entry.UUID, true); err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
		e.Log.Debug("undefine", "error", err)
	}
	return nil
}

// discardAborted is discardLeft of a move that is durably aborted; then nothing
// of it is left to be discarded by the next agent.
func (e *Engine) discardAborted(ctx context.Context, entry handoff.Entry) error {
	if _, err := e.discardLeft(ctx, entry); err != nil {
		return err
	}
	entry.State, entry.Created = handoff.Aborted, nil
	return e.Journal.Put(entry)
}

// discardLate removes what an agent that was killed between its record and the
// removal left, unless a later move has come for it.
func (e *Engine) discardLate(ctx context.Context, entry handoff.Entry) {
	log := e.Log.With("move", entry.Move, "vm", entry.VM)
	if last, err := e.Journal.Latest(entry); err != nil || !last {
		return
	}
	s := statusOf(entry)
	if err := e.reserve(entry.UUID, s); err != nil {
		return
	}
	defer e.unreserve(entry.UUID, s.Move)
	if err := e.discardAborted(ctx, entry); err != nil {
		log.Error("what an aborted move left is not removed", "error", err)
	}
}

// end ends a domain, and leaves its definition and its disks.
func (e *Engine) end(ctx context.Context, entry handoff.Entry) error {
	if err := e.Host.Destroy(ctx, entry.UUID); err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
		return err
	}
	if !entry.Persistent || entry.XML == "" {
		return nil
	}
	return e.Host.Define(ctx, entry.XML) // not to be started by itself: autostart stays off
}

// halt ends a domain so that nothing runs it later.
func (e *Engine) halt(ctx context.Context, entry handoff.Entry) error {
	for _, step := range []func() error{
		func() error { return e.Host.Destroy(ctx, entry.UUID) },
		func() error { return e.Host.Undefine(ctx, entry.UUID, true) },
	} {
		if err := step(); err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
			return err
		}
	}
	return nil
}

// errLeft is returned when all is done but for a disk.
var errLeft = errors.New("a disk is left")

// removeDisks removes disks that no domain uses any more.
func (e *Engine) removeDisks(ctx context.Context, paths []string) error {
	var errs []error
	for _, p := range paths {
		if err := e.Host.RemoveDisk(ctx, p); err != nil {
			errs = append(errs, fmt.Errorf("%w: %w: remove it by hand", errLeft, err))
		}
	}
	return errors.Join(errs...)
}
