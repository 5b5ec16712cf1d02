package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
)

// undecided is one side of a move whose end it can't tell alone: its session is
// lost with the offer out, its libvirt does not answer, or its agent was started
// anew. It asks and looks until it knows, and hears what the peer and operators say.
type undecided struct {
	*Engine
	move  *Move
	entry *handoff.Entry
	log   *slog.Logger
	// step carries an event out; the entry's state tells whether it was.
	step func(ctx context.Context, ev handoff.Event, why error) error
	told handoff.Event // how the move ends, which could not be carried out yet; 0: that is not known
}

// said is what the peer or an operator says of a move: Asked, Overruled, RunHere
// or AbandonHere.
type said struct {
	event handoff.Event
	reply chan heard // has room for one
}

// heard is what came of it: the answer to a peer, or why an operator is refused.
type heard struct {
	kind byte
	err  error
}

// found is what an attempt to learn the end has brought.
type found struct {
	event handoff.Event
	why   error
	err   error // there is no event yet
}

const (
	doubtAfter   = 5 * time.Second // of trying, a move counts as in doubt
	firstAgain   = 200 * time.Millisecond
	slowestAgain = 5 * time.Second
)

// run returns when the end is known and durable, or when the agent stops.
func (u *undecided) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	begun, pause := time.Now(), firstAgain
	results := make(chan found, 1)
	try := func() {
		entry := *u.entry
		go func() { results <- u.try(ctx, entry) }()
	}
	trying := true
	try()
	var again <-chan time.Time
	defer func() {
		cancel()
		if trying {
			<-results
		}
	}()
	for !u.entry.State.Final() {
		select {
		case f := <-results:
			trying = false
			before := u.entry.State
			if f.event != handoff.Resumed { // which is true until the guest ends
				u.told = cmp.Or(f.event, u.told)
			}
			if f.err == nil {
				f.err = u.carryOut(ctx, f.event, f.why)
			}
			if u.entry.State != before { // there is something else to try
				pause = firstAgain
			}
			if f.err != nil {
				u.log.Warn("the move has not ended, trying again", "state", u.entry.State, "error", f.err)
				if time.Since(begun) > doubtAfter && u.entry.State != handoff.Claimed {
					u.doubt(f.err)
				}
			}
			again = time.After(pause)
			pause = min(2*pause, slowestAgain)
		case <-again:
			again, trying = nil, true
			try()
		case s := <-u.move.inbox:
			before := u.entry.State
			s.reply <- u.hear(ctx, s.event)
			if u.entry.State != before && !trying {
				again, pause = time.After(0), firstAgain
			}
		case <-ctx.Done():
			if u.entry.State != handoff.Claimed {
				u.doubt(errAgentStops)
			}
			return
		}
	}
}

// carryOut is step; a move that was claimed has its guest free for another.
func (u *undecided) carryOut(ctx context.Context, ev handoff.Event, why error) error {
	err := u.step(ctx, ev, why)
	switch {
	case u.entry.State == handoff.Claimed:
		u.release(u.entry.UUID, u.move)
	case ev == handoff.Resumed && u.entry.State == handoff.Running:
		u.arrived(ctx, u.log, *u.entry)
	}
	return err
}

// arrived does what is left to do for a guest that runs here.
func (e *Engine) arrived(ctx context.Context, log *slog.Logger, entry handoff.Entry) {
	if entry.Persistent && entry.Autostart {
		if err := e.Host.SetAutostart(ctx, entry.UUID, true); err != nil {
			log.Warn("autostart not set, set it by hand", "error", err)
		}
	}
	addrs, mapped := e.Redirects.AddressesOf(entry.Move)
	e.runHook(log, AfterResume, hookEnv(entry.Move, entry.VM, entry.UUID, "destination", entry.Site, e.Site, addrs, mapped))
}

// try finds out what ends the state. It only looks.
func (u *undecided) try(ctx context.Context, entry handoff.Entry) found {
	switch entry.State {
	case handoff.Owner:
		return found{event: handoff.Failed, why: errRestarted}
	case handoff.Receiver:
		return found{event: handoff.Broken, why: errRestarted}
	case handoff.Accepted:
		if err := u.look(ctx); err != nil {
			return found{err: err}
		}
		return found{event: handoff.Resumed}
	}
	a, err := u.askOnce(ctx, entry)
	switch {
	case err != nil:
		return found{err: err}
	case a.kind == kindRunning:
		return found{event: handoff.AnswerRunning}
	case a.kind == kindAborted:
		return found{event: handoff.AnswerAborted, why: fmt.Errorf("the destination gave up: %w", peerReason(a.body))}
	}
	return found{err: peerReason(a.body)}
}

// errRestarted is why a move is rolled back that had not been offered.
var errRestarted = errors.New("the agent was restarted during the move")

// errAgentStops is returned when the agent stops before the end is known.
var errAgentStops = errors.New("the agent stops, and goes on with it when it starts")

// look returns nil when the guest that was accepted here runs. One that does
// not may have run and stopped since: nobody can tell.
func (u *undecided) look(ctx context.Context) error {
	state, err := u.Host.State(ctx, u.entry.UUID)
	switch {
	case err == nil && state == hypervisor.Running:
		return nil
	case err != nil && !errors.Is(err, hypervisor.ErrNoDomain):
		return err
	}
	return errNotSeen
}

// errNotSeen is returned when libvirt says for certain that an accepted guest does not
// run now.
var errNotSeen = errors.New("the guest was accepted here and does not run: whether it has run is not known")

// hear takes what the peer or an operator says.
func (u *undecided) hear(ctx context.Context, ev handoff.Event) heard {
	if u.entry.State == handoff.Accepted {
		// What its agent did not see the end of may have ended well. Nobody's word ends
		// a guest that may run: who says it takes it for one that does not.
		err := u.look(ctx)
		if err == nil {
			err = u.carryOut(ctx, handoff.Resumed, nil)
		}
		if err != nil && !errors.Is(err, errNotSeen) {
			return heard{kindUndecided, err}
		}
	}
	var why error
	switch ev {
	case handoff.Asked:
		why = errors.New("the source lost the session and asked for the decision")
	case handoff.Overruled:
		why = fmt.Errorf("an operator at %s has had the guest run there", u.entry.Site)
	default:
		if _, _, err := handoff.Step(u.entry.State, ev); err != nil {
			return heard{err: fmt.Errorf("%w in move %s for that word: it stands at %s here", ErrNotOpen, u.entry.Move, u.entry.State)}
		}
		if u.told == handoff.AnswerRunning {
			return heard{err: fmt.Errorf("%w in move %s: the guest runs at %s, and is being cleared here", ErrNotOpen, u.entry.Move, u.entry.Site)}
		}
		if err := u.mayHear(ctx, *u.entry, ev); err != nil {
			return heard{err: err}
		}
		why = fmt.Errorf("an operator here said: %v", ev)
	}
	err := u.carryOut(ctx, ev, why)
	if ev == handoff.RunHere && err == nil && u.entry.State == handoff.Accepted {
		if err = u.look(ctx); err == nil {
			err = u.carryOut(ctx, handoff.Resumed, nil)
		}
	}
	switch u.entry.State {
	case handoff.Running:
		return heard{kindRunning, err}
	case handoff.Aborted:
		return heard{kindAborted, err}
	}
	return heard{kindUndecided, err}
}

// doubt tells that the end is not known, why, and how an operator can decide.
func (u *undecided) doubt(err error) {
	entry := *u.entry
	u.move.update(func(s *Status) {
		s.Phase = PhaseInDoubt
		r := Result{Move: s.Move, VM: s.VM, To: s.Peer}
		if s.Result != nil {
			r = *s.Result
		}
		r.Result, r.TotalMS = "in-doubt", time.Since(s.Started).Milliseconds()
		r.Error, r.Ways = fmt.Sprintf("this agent goes on trying to end the move: %v", err), nil
		if u.told == 0 {
			r.Error, r.Ways = fmt.Sprintf("%s: %v", awaits(entry), err), ways(entry)
		}
		s.Result = &r
	})
}

// awaits says what a move in doubt waits for.
func awaits(entry handoff.Entry) string {
	switch entry.State {
	case handoff.Offered:
		return "the destination has the decision and has not told it; the guest stays paused here, and this agent goes on asking"
	case handoff.Accepted:
		return "the guest may have run here: the source waits, and only a person can tell"
	}
	return "this agent goes on trying to end the move"
}

// ways are the words that an operator has for a move in doubt.
func ways(entry handoff.Entry) []Way {
	say := func(word string) string { return fmt.Sprintf("wanmig recover %s --%s", entry.Move, word) }
	switch entry.State {
	case handoff.Offered:
		return []Way{
			{say(WordRunHere), fmt.Sprintf("lets the guest run here. Only when it does not run at %s, and can't: its host is off and stays so. Else it runs twice; and what it did there is not here", entry.Site)},
			{say(WordAbandonHere), fmt.Sprintf("ends the paused guest here, its disks stay. Only when it runs at %s. Else what it has in its memory is lost", entry.Site)},
		}
	case handoff.Accepted:
		return []Way{
			{say(WordRunHere), fmt.Sprintf("lets the guest run here. Only when it was not told to run at %s. If it had not run here before, what it had in its memory is lost", entry.Site)},
			{say(WordAbandonHere), fmt.Sprintf("gives the guest back to %s, where it goes on. Only when it has not run here. Else what it did here is lost", entry.Site)},
		}
	}
	return nil
}

// The words of an operator.
const (
	WordRunHere     = "run-here"
	WordAbandonHere = "abandon-here"
)

// ErrNotOpen is returned when a move is not one for an operator to decide.
var ErrNotOpen = errors.New("nothing is in doubt")

// Resolve ends a move that is in doubt as an operator says, who answers for it.
func (e *Engine) Resolve(ctx context.Context, move, word string) error {
	var ev handoff.Event
	switch word {
	case WordRunHere:
		ev = handoff.RunHere
	case WordAbandonHere:
		ev = handoff.AbandonHere
	default:
		return fmt.Errorf("%.40q is no way to end a move: use %s or %s", word, WordRunHere, WordAbandonHere)
	}
	m, ok := e.Move(move)
	if !ok {
		return fmt.Errorf("%w %q here: wanmig list shows them", ErrNoMove, move)
	}
	s := said{ev, make(chan heard, 1)}
	select {
	case <-m.Done():
		return e.resolveEnded(ctx, move, ev)
	default:
	}
	if p := m.Status().Phase; p != PhaseInDoubt && !p.Final() {
		return fmt.Errorf("%w: move %s is at %s, and ends by itself: wanmig cancel ends it now", ErrNotOpen, move, p)
	}
	select {
	case m.inbox <- s:
		select {
		case h := <-s.reply:
			return h.err
		case <-ctx.Done():
			return fmt.Errorf("move %s is still being ended as you said, wanmig status shows what comes of it: %w", move, context.Cause(ctx))
		}
	case <-m.Done():
		return e.resolveEnded(ctx, move, ev)
	case <-ctx.Done():
		return fmt.Errorf("move %s is busy, try again: %w", move, context.Cause(ctx))
	}
}

// resolveEnded starts a guest that is this host's and does not run.
func (e *Engine) resolveEnded(ctx context.Context, move string, ev handoff.Event) error {
	entry, err := e.Journal.Get(move)
	if err != nil {
		return err
	}
	if _, _, err := handoff.Step(entry.State, ev); err != nil {
		return fmt.Errorf("%w: move %s is over: %s here", ErrNotOpen, move, entry.State)
	}
	if err := e.mayHear(ctx, entry, ev); err != nil {
		return err
	}
	m := newMove(statusOf(entry), func(error) {})
	if err := e.reserve(entry.UUID, m.Status()); err != nil {
		return err
	}
	defer e.release(entry.UUID, m)
	return e.startHere(ctx, entry)
}

// mayHear refuses what an operator can't mean.
func (e *Engine) mayHear(ctx context.Context, entry handoff.Entry, ev handoff.Event) error {
	if last, err := e.Journal.Latest(entry); err != nil || !last {
		return cmp.Or(err, fmt.Errorf("%w in move %s: the guest was moved again since; wanmig list shows its latest move", ErrNotOpen, entry.Move))
	}
	state, err := e.Host.State(ctx, entry.UUID)
	switch {
	case err != nil && !errors.Is(err, hypervisor.ErrNoDomain):
		return err
	case state == hypervisor.Running && ev == handoff.RunHere:
		return fmt.Errorf("guest %q runs here already", entry.VM)
	case state == hypervisor.Running && entry.State == handoff.Offered:
		return fmt.Errorf("guest %q runs here: somebody has resumed it; it is not ended by this (virsh destroy does that)", entry.VM)
	case err != nil && ev == handoff.RunHere && entry.XML == "":
		return fmt.Errorf("nothing of guest %q is here to be run: %w", entry.VM, err)
	}
	return nil
}

// startHere lets a guest run here: on from where it is paused, or from its disks.
func (e *Engine) startHere(ctx context.Context, entry handoff.Entry) error {
	if state, err := e.Host.State(ctx, entry.UUID); err == nil && state.Active() {
		was := entry
		was.Paused = false
		return errors.Join(e.revive(ctx, was), e.restoreDefinition(ctx, entry))
	}
	if err := e.Host.Start(ctx, entry.UUID, entry.XML, entry.Persistent); err != nil {
		return err
	}
	return e.restoreDefinition(ctx, entry)
}

// fence sees to it that nothing but this move starts the guest here again: neither
// libvirtd with the host, nor who takes it for one that is shut off. libvirt does
// not let it be done later, while it migrates the domain.
func (e *Engine) fence(ctx context.Context, entry handoff.Entry) error {
	if !entry.Persistent {
		return nil
	}
	if entry.Autostart {
		if err := e.Host.SetAutostart(ctx, entry.UUID, false); err != nil {
			return err
		}
	}
	if err := e.Host.Undefine(ctx, entry.UUID, false); err != nil {
		return err
	}
	return hypervisor.SyncDefinitions() // a host that loses power after the offer must not start it
}

// eraseDefinition removes what libvirt has written of a domain that was fenced. It
// writes the definition once more when the disks' mirrors end (qemuDomainSaveConfig,
// from the end of a block job), and its next start would find the guest here. A guest
// that has been given the name since has its own definition in that place.
func (e *Engine) eraseDefinition(ctx context.Context, entry handoff.Entry) error {
	if !entry.Persistent || entry.XML == "" {
		return nil
	}
	all, err := e.Host.Domains(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(all, func(s hypervisor.Summary) bool { return s.Name == entry.VM && s.UUID != entry.UUID }) {
		return nil
	}
	if err := e.Host.Define(ctx, entry.XML); err != nil {
		return err
	}
	return e.Host.Undefine(ctx, entry.UUID, false)
}

// restoreDefinition makes a domain that was given away as persistent as it was. One
// that has a definition keeps it: it may have been changed since.
func (e *Engine) restoreDefinition(ctx context.Context, entry handoff.Entry) error {
	if !entry.Persistent || entry.XML == "" {
		return nil
	}
	defined, err := e.Host.Persistent(ctx, entry.UUID)
	if errors.Is(err, hypervisor.ErrNoDomain) || err == nil && !defined {
		err = e.Host.Define(ctx, entry.XML)
	}
	if err == nil && entry.Autostart {
		err = e.Host.SetAutostart(ctx, entry.UUID, true)
	}
	if err != nil {
		return fmt.Errorf("guest %q is not defined here as it was before: %w", entry.VM, err)
	}
	return nil
}
