package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/wanmig/wanmig/blocksync/seed"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// Config is what an engine works with.
type Config struct {
	Host     *hypervisor.Host
	Journal  *handoff.Journal
	Site     string // this site's own name
	Version  string
	Spool    string // folder of the outboxes' spool files
	Memory   int64  // bytes of memory for the outboxes of one move
	SpoolMax int64  // bytes of spool for one move
	// PageStore is how many bytes of the memory of one guest that moves are kept
	// so that they need not be sent again, if the other side keeps as many.
	PageStore int64
	// Keep is how long what arrived of a move that did not end is kept, so that
	// the next attempt starts from it, and KeepSpace how many bytes of storage for
	// all of them.
	Keep      time.Duration
	KeepSpace int64
	CopyDir   string // folder of the memory of guests that have left
	// Seeds are the images whose content guests that arrive need not be sent.
	Seeds seedLibrary
	// Dial opens a session to a site by its name; Auto is the transport that the site
	// has. Known names the site of a peer.
	Dial  func(ctx context.Context, site string, o tunnel.DialOptions) (*tunnel.Session, error)
	Known func(tunnel.ID) string
	// Redirects keeps the connections of moved guests; Redirect is what a move
	// asks of it that does not say otherwise.
	Redirects *netredirect.Manager
	Redirect  netredirect.Options
	// Caps are the limits that hold at a time for all moves to a site together, and
	// for all moves (site ""); nil: none.
	Caps  func(site string, now time.Time) Cap
	Hooks Hooks
	Log   *slog.Logger
}

// seedLibrary opens the images that are indexed; who opens them closes them.
type seedLibrary interface{ Images() []*seed.Image }

// Engine moves the guests of one host.
type Engine struct {
	Config
	ctx       context.Context // the agent's life
	rates     *rates
	overheads overheads

	mu       sync.Mutex
	moves    map[string]*Move     // by move ID, both roles
	busy     map[string]string    // domain UUID: the move that has it
	incoming map[string]*incoming // guests that are arriving, by move ID
	lines    map[string]*line     // by site
	work     sync.WaitGroup       // grows by begin, or from inside
	stopping bool                 // Wait was called

	copies sync.Mutex // held while copies of disks are taken, kept or removed
}

// New makes an engine and reads the ended moves of the journal. ctx is the
// agent's life.
func New(ctx context.Context, c Config) (*Engine, error) {
	e := &Engine{Config: c, ctx: ctx, rates: newRates(c.Caps), moves: map[string]*Move{}, busy: map[string]string{}, incoming: map[string]*incoming{}, lines: map[string]*line{}}
	const kept = 1000
	if err := c.Journal.Trim(kept); err != nil {
		return nil, err
	}
	entries, err := c.Journal.All()
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if entry.State.Final() {
			e.remember(entry)
		}
	}
	return e, nil
}

// remember lists a move of the journal that needs nothing more.
func (e *Engine) remember(entry handoff.Entry) *Move {
	m := newMove(statusOf(entry), func(error) {})
	close(m.done)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.moves[entry.Move] = m
	return m
}

// statusOf is the status that a journal entry keeps, or what can be said of a
// move whose agent ended before it wrote one.
func statusOf(entry handoff.Entry) Status {
	var s Status
	if json.Unmarshal(entry.Outcome, &s) == nil && s.Move == entry.Move {
		return s
	}
	s = Status{Move: entry.Move, VM: entry.VM, UUID: entry.UUID, Peer: entry.Site, Started: entry.Started, Role: "source"}
	switch entry.State {
	case handoff.Receiver, handoff.Accepted, handoff.Running, handoff.Aborted:
		s.Role = "destination"
	}
	s.Phase = phaseOf(entry.State)
	if s.Phase.Final() {
		s.Ended = &entry.Changed
	}
	return s
}

// errStopping is returned when work comes to an engine that stops.
var errStopping = errors.New("the agent stops")

// begin counts something that Wait has to wait for; e.work.Done ends it.
func (e *Engine) begin() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopping {
		return errStopping
	}
	e.work.Add(1)
	return nil
}

// Wait returns when every move, session and hook has ended. No other begins.
func (e *Engine) Wait() {
	e.mu.Lock()
	e.stopping = true
	e.mu.Unlock()
	e.work.Wait()
	e.hangUp()
}

// Moves lists every move known, oldest first.
func (e *Engine) Moves() []*Move {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*Move, 0, len(e.moves))
	for _, m := range e.moves {
		all = append(all, m)
	}
	sort.Slice(all, func(a, b int) bool { return all[a].Status().Started.Before(all[b].Status().Started) })
	return all
}

// Move finds a move by its ID.
func (e *Engine) Move(id string) (*Move, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	m, ok := e.moves[id]
	return m, ok
}

// Start begins to move a guest away. ctx ends the engine, not the request: the
// move goes on when the caller is gone. An error means that no move began.
func (e *Engine) Start(ctx context.Context, req Request) (*Move, error) {
	if err := e.underWay(req.VM); err != nil { // libvirt would not tell of it before the move is over
		return nil, err
	}
	dom, err := e.find(ctx, req.VM)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	m := newMove(Status{Move: newMoveID(), Role: "source", VM: dom.Name, UUID: dom.UUID, Peer: req.To,
		Phase: PhaseCheck, Started: time.Now(), Priority: req.Priority, Attempt: 1, Link: Link{Limit: req.Rate}}, cancel)
	m.ctx, m.attempt, m.limit = ctx, 1, req.Rate
	if err := e.begin(); err != nil {
		cancel(nil)
		return nil, err
	}
	e.awaitEnding(ctx, dom.UUID)
	if err := e.claim(dom.UUID, m); err != nil {
		e.work.Done()
		cancel(nil)
		return nil, err
	}
	go func() {
		defer e.work.Done()
		// What was read before the claim may stem from amid another move, whose fence
		// had taken the definition away.
		dom, err := e.Host.Domain(m.ctx, dom.UUID)
		if err != nil {
			e.giveUp(m, err)
			return
		}
		e.attempts(m, dom, req)
	}()
	return m, nil
}

// Limit changes how much of the link a move may use, by the move's ID or by the name
// of the VM of one that is not over.
func (e *Engine) Limit(name string, l Limit) error {
	m, ok := e.Move(name)
	if !ok {
		for _, o := range e.Moves() {
			if s := o.Status(); s.VM == name && !s.Phase.Final() {
				m, ok = o, true
			}
		}
	}
	if !ok {
		return fmt.Errorf("%w %q here: wanmig list shows them", ErrNoMove, name)
	}
	if err := m.SetLimit(l); err != nil {
		return err
	}
	e.Log.Info("limit of a move changed", "move", m.Status().Move, "rate", l)
	e.rates.apply(time.Now())
	return nil
}

// endingWait is how long what a move has left to clear may take when its end has
// been told.
const endingWait = 10 * time.Second

// awaitEnding waits for a move of a domain whose end has been told, and which has
// something left to clear here: whoever was told may start the next one at once.
func (e *Engine) awaitEnding(ctx context.Context, uuid string) {
	ending := func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		m := e.moves[e.busy[uuid]]
		return m != nil && (m.ending || m.Status().Phase.Final())
	}
	for until := time.Now().Add(endingWait); ending() && time.Now().Before(until); {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

// errHereBefore is returned when the ID of a move is not new.
var errHereBefore = errors.New("this move was here before")

// claim reserves a domain for a move and lists the move.
func (e *Engine) claim(uuid string, m *Move) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := m.Status()
	if _, again := e.moves[s.Move]; again {
		return fmt.Errorf("%w: %s: start a new one", errHereBefore, s.Move)
	}
	if err := e.take(uuid, s); err != nil {
		return err
	}
	e.moves[s.Move] = m
	return nil
}

// reserve keeps a domain from being moved, without a move.
func (e *Engine) reserve(uuid string, s Status) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.take(uuid, s)
}

// unreserve ends reserve.
func (e *Engine) unreserve(uuid, move string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.busy[uuid] == move {
		delete(e.busy, uuid)
	}
}

// take is called with e.mu held.
func (e *Engine) take(uuid string, s Status) error {
	other, taken := e.busy[uuid]
	if !taken {
		e.busy[uuid] = s.Move
		return nil
	}
	if m := e.moves[other]; m != nil && m.Status().Phase.Final() {
		return fmt.Errorf("%q can't be moved yet: %s is over, and not cleared here or not in the journal: try again; if it stays so free some space in the agent's state folder", s.VM, other)
	}
	return movedAlready(s.VM, other)
}

func movedAlready(vm, by string) error {
	return fmt.Errorf("%q is being moved already by %s: see wanmig status %s", vm, by, by)
}

// underWay returns an error when a guest, by its name or UUID, is being moved from or to
// here.
func (e *Engine) underWay(vm string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, id := range e.busy {
		if m := e.moves[id]; m != nil {
			if s := m.Status(); !s.Phase.Final() && (s.VM == vm || s.UUID == vm) {
				return movedAlready(s.VM, id)
			}
		}
	}
	return nil
}

// list makes a move known that has no domain to itself.
func (e *Engine) list(m *Move) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.moves[m.Status().Move] = m
}

// release gives a domain free. A move that did not end keeps it: it is in doubt.
func (e *Engine) release(uuid string, m *Move) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if s := m.Status(); s.Phase.Final() && e.busy[uuid] == s.Move {
		delete(e.busy, uuid)
	}
}

// find looks a guest up, and tells which there are when it is not there.
func (e *Engine) find(ctx context.Context, vm string) (*hypervisor.Domain, error) {
	dom, err := e.Host.Domain(ctx, vm)
	if !errors.Is(err, hypervisor.ErrNoDomain) {
		return dom, err
	}
	list, lerr := e.Host.Domains(ctx)
	if lerr != nil {
		return nil, lerr
	}
	names := make([]string, len(list))
	for i, d := range list {
		names[i] = d.Name
	}
	slices.Sort(names)
	if len(names) == 0 {
		return nil, fmt.Errorf("no VM %q at %s: there is none at all", vm, e.Site)
	}
	const shown = 20
	more := ""
	if len(names) > shown {
		more = fmt.Sprintf(" and %d more", len(names)-shown)
		names = names[:shown]
	}
	return nil, fmt.Errorf("no VM %q at %s: there are %s%s", vm, e.Site, strings.Join(names, ", "), more)
}

// record makes a state durable together with the status shown. When it can't,
// the entry stays as it was. What of an entry does not change is read beside.
func (e *Engine) record(entry *handoff.Entry, state handoff.State, m *Move) error {
	before, outcome := entry.State, entry.Outcome
	entry.State = state
	if shown, err := json.Marshal(m.Status()); err == nil && phaseOf(state).Final() {
		entry.Outcome = shown
	}
	if state.Final() {
		// What the peer takes for given must not come undone with this host's power.
		if err := hypervisor.SyncDefinitions(); err != nil {
			entry.State, entry.Outcome = before, outcome
			return err
		}
	}
	if err := e.Journal.Put(*entry); err != nil {
		entry.State, entry.Outcome = before, outcome
		return fmt.Errorf("%w: free some space in the agent's state folder", err)
	}
	return nil
}

// settle makes the end of a move durable, as soon as that can be. Until then its
// guest is not moved again: an agent that starts would end the older move once
// more. It returns an error when the agent stops before.
func (e *Engine) settle(log *slog.Logger, entry *handoff.Entry, state handoff.State, m *Move) error {
	for again := false; ; again = true {
		err := e.record(entry, state, m)
		if err == nil {
			return nil
		}
		if !again {
			log.Error("the move's end is not in the journal, trying again", "state", state, "error", err)
		}
		select {
		case <-time.After(time.Second):
		case <-e.ctx.Done():
			return err
		}
	}
}
