package netredirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/wanmig/wanmig/netredirect/hostnet"
	"github.com/wanmig/wanmig/netredirect/neighbour"
)

// redirect is a record that this host acts on.
type redirect struct {
	record
	m          *Manager
	responders []*neighbour.Responder
	stopWork   context.CancelFunc // of its goroutines
	ctx        context.Context
	living     bool       // live runs
	whole      bool       // everything of it was made again after the agent's start
	repointing bool       // to where the VM has moved on
	repointed  time.Time  // when that was last tried
	naming     sync.Mutex // one looks for names at a time

	see       sync.Mutex // of what follows
	problems  map[string]string
	seen      traffic
	waits     []string
	flows     []Flow
	peerIdle  time.Duration
	peerSeen  bool // the source sees the route
	peerWaits []string
	lastSync  time.Time
}

// traffic is when packets of the VM last passed the tunnel, by its counters.
type traffic struct {
	packets uint64
	in, out hostnet.Counter
	at      time.Time
}

func (m *Manager) newRedirect(r *record) *redirect {
	ctx, stop := context.WithCancel(m.ctx)
	return &redirect{record: *r, m: m, ctx: ctx, stopWork: stop, problems: map[string]string{}, seen: traffic{at: time.Now()}}
}

// problem notes or clears what an operator should know of.
func (x *redirect) problem(what string, err error) {
	x.see.Lock()
	defer x.see.Unlock()
	if err == nil {
		delete(x.problems, what)
		return
	}
	x.problems[what] = err.Error()
}

// standing are the steps that the redirect's state has made, or may have.
func (x *redirect) standing() []hostnet.Step {
	if !x.tunnelled() && !x.Ending {
		return slices.Concat(x.Plan.Stay, x.Plan.Switch)
	}
	return x.Plan.steps()
}

// silence ends the answers to the VM.
func (x *redirect) silence() {
	for _, r := range x.responders {
		r.Close()
	}
	x.responders = nil
}

// rest ends what runs in this program for a redirect, not what stands in the kernel.
func (x *redirect) rest() {
	x.stopWork()
	x.silence()
}

// respond starts to answer the VM's questions for its neighbours, at a destination.
func (x *redirect) respond() error {
	if x.Role != Destination || x.Follows != "" || len(x.responders) > 0 {
		return nil
	}
	for _, n := range x.hostNICs() {
		if n.home {
			continue
		}
		vm, err := parseMAC(n.MAC)
		if err != nil {
			return err
		}
		bridge, err := parseMAC(n.bridgeMAC)
		if err != nil {
			return err
		}
		r, err := neighbour.NewResponder(n.Tap, vm, bridge, n.Addresses, x.m.Log)
		if err != nil {
			x.silence()
			return fmt.Errorf("answer the VM on %s: %w", n.Tap, err)
		}
		x.responders = append(x.responders, r)
	}
	return nil
}

// tellGateways corrects the VM's entries of its gateways. What is sent while it
// is stopped is the first that it reads.
func (x *redirect) tellGateways() error {
	var errs []error
	i := 0
	for _, n := range x.hostNICs() {
		if n.home {
			continue
		}
		if i < len(x.responders) && len(n.Gateways) > 0 {
			errs = append(errs, x.responders[i].Tell(n.Gateways))
		}
		i++
	}
	return errors.Join(errs...)
}

// maxTold is how many neighbours a VM is told of when it comes home.
const maxTold = 64

// tellNeighbours corrects the entries of a VM that has come home: it was told at
// the other host that everybody is at the bridge there. Until then what it sends
// there is taken by the plan's return table.
func (x *redirect) tellNeighbours(nics []hostNIC) error {
	var errs []error
	told := 0
	for _, n := range nics {
		if !n.home || n.Served == "" {
			continue
		}
		known, err := x.m.net.Neighbours(n.Bridge)
		if err != nil {
			return err
		}
		bridge, err := x.m.net.Bridge(n.Bridge)
		if err != nil {
			return err
		}
		for _, p := range bridge.Prefixes {
			known[p.Addr()] = bridge.MAC
		}
		for a, mac := range known {
			if told < maxTold && !slices.Contains(n.Addresses, a) && validateAddress(a) == nil {
				told++
				errs = append(errs, neighbour.AnnounceOnce(n.Tap, mac, []netip.Addr{a}))
			}
		}
	}
	return errors.Join(errs...)
}

// announce tells the networks of the VM's NICs where its addresses are.
func (x *redirect) announce(at func(hostNIC) string) {
	for _, n := range x.hostNICs() {
		mac, err := parseMAC(at(n))
		if err != nil {
			continue // validated with the record
		}
		if err := neighbour.AnnounceOnce(n.Bridge, mac, n.Addresses); err != nil {
			x.problem("announcing", err)
		}
		x.m.work.Go(func() {
			if err := neighbour.Announce(x.ctx, n.Bridge, mac, n.Addresses); err != nil {
				x.m.Log.Debug("announcement", "error", err)
			}
		})
	}
}

// Switch sends the VM's packets into the tunnel: at the source, when the VM has
// stopped. It is called once and returns in milliseconds.
func (x *redirect) Switch() {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.State != Armed || x.m.redirects[x.Move] != x {
		return
	}
	ctx, cancel := x.m.hurry()
	defer cancel()
	_, err := x.m.net.ApplyAll(ctx, x.Plan.Switch)
	x.problem("switching", err)
	if err != nil {
		// The end of the stop tries again, and so does stand.
		x.m.Log.Error("redirect not switched: connections to the VM hang", "move", x.Move, "error", err)
		return
	}
	x.announce(func(n hostNIC) string { return n.bridgeMAC })
	x.State, x.Switched = Standing, time.Now()
	// Its journal entry has every step since it was armed: this one can wait.
	x.m.work.Go(func() { x.change(func(*record) {}) })
}

// hurry is the context of changes that a stopped VM waits for. They are made
// also when the agent is told to stop.
func (m *Manager) hurry() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(m.ctx), 5*time.Second)
}

// Resuming makes the last changes before the VM runs here, at the destination.
func (x *redirect) Resuming() {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.State != Armed || x.m.redirects[x.Move] != x {
		return
	}
	ctx, cancel := x.m.hurry()
	defer cancel()
	_, err := x.m.net.ApplyAll(ctx, x.Plan.Switch)
	if err = errors.Join(err, x.tellGateways()); err != nil {
		x.problem("switching", err)
		x.m.Log.Error("redirect not whole", "move", x.Move, "error", err)
	}
	x.State, x.Switched = Standing, time.Now()
}

// stand begins what happens after the VM has moved: names, routes, drain.
func (x *redirect) stand() {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.living || x.m.redirects[x.Move] != x {
		return
	}
	x.living = true
	x.see.Lock()
	x.seen.at, x.lastSync = time.Now(), time.Now() // from here on nobody has used it, or asked
	x.see.Unlock()
	if x.State == Armed { // the agent was restarted in between
		x.State, x.Switched = Standing, time.Now()
		x.problem("restoring", x.m.standLocked(x))
	}
	if x.Deadline.IsZero() {
		x.Deadline = time.Now().Add(x.Options.Max)
	}
	if err := x.m.journal.put(&x.record); err != nil {
		x.problem("journal", err)
		x.m.Log.Error("redirect not in the journal", "move", x.Move, "error", err)
	}
	x.m.closePredecessors(x)
	if nics := x.hostNICs(); x.Role == Destination {
		x.m.work.Go(func() { x.problem("neighbours", x.tellNeighbours(nics)) })
	}
	x.m.work.Go(x.live)
}

// Undo removes a redirect whose VM stayed at the source, at either side.
func (x *redirect) Undo(why string) {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.m.redirects[x.Move] != x {
		return
	}
	switched := x.Role == Source && x.State == Standing
	if err := x.m.removeLocked(x, why); err != nil {
		x.m.Log.Error("redirect not undone: wanmig redirect show tells what is left", "error", err)
	}
	if switched { // neighbours were told that the VM is at the host
		for _, n := range x.hostNICs() {
			if mac, err := parseMAC(n.MAC); err == nil {
				_ = neighbour.AnnounceOnce(n.Bridge, mac, n.Addresses) // the VM's own traffic says it too
			}
		}
	}
	if x.Role == Destination && x.Options.LowerTTL && x.m.dns != nil {
		x.m.work.Go(x.raiseTTL)
	}
}

// closePredecessors ends what earlier redirects of the same VM did at the host
// to which it has come back: those that sent its packets away, and those that
// served it when it was here before.
func (m *Manager) closePredecessors(x *redirect) {
	if x.Role != Destination || x.Follows != "" {
		return
	}
	for _, old := range m.redirects {
		if old.UUID == x.UUID && old.before(x) && !old.stillLeads(x) {
			if err := m.removeLocked(old, "the VM is back"); err != nil {
				m.Log.Error("earlier redirect not removed", "move", old.Move, "error", err)
			}
			for _, n := range x.hostNICs() {
				if mac, err := parseMAC(n.MAC); err == nil && n.home {
					_ = neighbour.AnnounceOnce(n.Bridge, mac, n.Addresses) // the VM's own traffic says it too
				}
			}
		}
	}
}

// stillLeads reports whether a redirect of a VM that has come back to a host
// where it is foreign leads there again: another host's tunnel to here does.
func (x *redirect) stillLeads(back *redirect) bool {
	return x.Role == Destination && x.tunnelled() && x.Peer != back.Peer && !back.home()
}

// before reports whether a redirect is an earlier one.
func (x *redirect) before(other *redirect) bool { return x != other && x.Began.Before(other.Began) }

// prefixes are the VM's addresses as host routes, without those that are at home
// at the destination, as it knows.
func (x *redirect) prefixes() []netip.Prefix {
	var all []netip.Prefix
	for _, a := range addressesOf(foreignNICs(x.hostNICs())) {
		all = append(all, host(a))
	}
	return all
}
