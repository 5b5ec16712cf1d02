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
	living     bool // live runs

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
	bytes   uint64
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
	if !x.tunnelled() {
		return slices.Concat(x.Plan.Stay, x.Plan.Switch)
	}
	return x.Plan.steps()
}

// rest ends what runs in this program for a redirect, not what stands in the kernel.
func (x *redirect) rest() {
	x.stopWork()
	for _, r := range x.responders {
		r.Close()
	}
	x.responders = nil
}

// respond starts to answer the VM's questions for its neighbours, at a destination.
func (x *redirect) respond() error {
	if x.Role != Destination || len(x.responders) > 0 {
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

// tellNeighbours corrects the entries of a VM that has come home: it was told at
// the other host that everybody is at the bridge there.
func (x *redirect) tellNeighbours() error {
	var errs []error
	for _, n := range x.hostNICs() {
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
			if !slices.Contains(n.Addresses, a) && validateAddress(a) == nil {
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
	if x.State != Armed {
		return
	}
	// Its journal entry has every step since it was armed.
	if _, err := x.m.net.ApplyAll(x.m.ctx, x.Plan.Switch); err != nil {
		x.problem("switching", err)
		x.m.Log.Error("redirect not switched: connections to the VM hang", "move", x.Move, "error", err)
	}
	x.announce(func(n hostNIC) string { return n.bridgeMAC })
	x.State, x.Switched = Standing, time.Now()
	if err := x.m.journal.put(&x.record); err != nil {
		x.problem("journal", err)
	}
}

// Resuming makes the last changes before the VM runs here, at the destination.
func (x *redirect) Resuming() {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.State != Armed {
		return
	}
	_, err := x.m.net.ApplyAll(x.m.ctx, x.Plan.Switch)
	if err = errors.Join(err, x.tellGateways(), x.tellNeighbours()); err != nil {
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
}

// closePredecessors ends what earlier redirects of the same VM did here: at the
// destination of a move back those that sent its packets away.
func (m *Manager) closePredecessors(x *redirect) {
	if x.Role != Destination {
		return
	}
	for _, old := range m.redirects {
		if old != x && old.UUID == x.UUID && old.Role == Source {
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

// prefixes are the VM's addresses as host routes.
func (x *redirect) prefixes() []netip.Prefix {
	var all []netip.Prefix
	for _, a := range x.addresses() {
		all = append(all, host(a))
	}
	return all
}
