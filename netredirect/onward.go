package netredirect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A VM that moves on to a third site, while the tunnel of its first move stands,
// is reached by two tunnels in a row. The first host then opens a tunnel of its
// own to the third, which its redirect follows to (Record.Follows there), and the
// detour ends. The host in between vouches for it: without that, any site could
// ask for the packets of a VM.

// moved tells a source where its VM has gone from the destination that it asks.
type moved struct {
	Peer string `json:"peer"` // the ID of the agent there
	Site string `json:"site"` // its name, where the destination is
}

// movedOn is where the VM has gone from here by a later redirect. Called with
// the lock held.
func (x *redirect) movedOn() *moved {
	var last *redirect
	for _, later := range x.m.redirects {
		if later.UUID == x.UUID && later.Role == Source && later.living && later.tunnelled() && x.before(later) && (last == nil || last.before(later)) {
			last = later
		}
	}
	if last == nil {
		return nil
	}
	return &moved{Peer: last.Peer, Site: last.Site}
}

// vouched are the agents that send a VM's packets here: its next host may be
// asked by them directly. Called with the lock held.
func (m *Manager) vouched(uuid string) []string {
	var all []string
	for _, x := range m.redirects {
		if x.UUID == uuid && x.Role == Destination {
			all = append(all, append([]string{x.Peer}, x.Vouched...)...)
		}
	}
	slices.Sort(all)
	all = slices.Compact(all)
	return all[:min(len(all), maxVouched)]
}

const (
	repointEvery = 15 * time.Second // after one that failed
	repointTakes = 45 * time.Second // at most
	repointGrace = 2 * time.Second  // until answers by the old way have arrived
)

// repoint begins to lead the VM's packets to where it has gone.
func (x *redirect) repoint(to moved) {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	for _, other := range x.m.redirects {
		if other.UUID == x.UUID && x.before(other) {
			return // it is done, or being done; or the VM comes home
		}
	}
	if x.repointing || time.Since(x.repointed) < repointEvery {
		return
	}
	x.repointing = true
	x.m.work.Go(func() {
		err := x.follow(to)
		if err != nil {
			err = fmt.Errorf("the VM has moved on from %s to %s, and its packets take that way: %w", x.Site, to.Site, err)
		}
		x.problem("moved on", err)
		x.m.mu.Lock()
		defer x.m.mu.Unlock()
		x.repointing, x.repointed = false, time.Now()
	})
}

// follow makes a redirect to where the VM has gone, and its packets take it.
func (x *redirect) follow(to moved) error {
	site, known := x.m.SiteOf(to.Peer)
	if !known {
		return fmt.Errorf("that is no site here: wanmig site add NAME ADDRESS --id %q, here, and this site there, lets them go directly", to.Peer)
	}
	ctx, cancel := context.WithTimeout(x.ctx, repointTakes)
	defer cancel()
	address, err := x.m.Reach(ctx, site, to.Peer)
	if err != nil {
		return err
	}
	move := onwardID(x.Move)
	call := func(ctx context.Context, op string, request, reply any) error {
		return x.m.Call(ctx, site, to.Peer, move, op, request, reply)
	}
	ask := Ask{UUID: x.UUID, Options: x.Options, Kinds: x.m.kinds(x.Options.Kind)}
	for _, n := range x.NICs {
		ask.NICs = append(ask.NICs, n.NIC)
	}
	next, err := x.m.Begin(ctx, VM{Move: move, Name: x.VM, UUID: x.UUID}, Peer{Site: site, ID: to.Peer, Address: address}, ask, Offer{Kinds: Kinds}, call)
	if err != nil {
		return err
	}
	if err := call(ctx, opStand, standRequest{}, &struct{}{}); err != nil {
		next.Undo(err.Error())
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = call(clean, opEnd, endRequest{"the source did not learn that it stands"}, &struct{}{}) // it ends there by its time, too
		return err
	}
	next.change(func(r *record) { r.Deadline = x.Deadline })
	next.Switch()
	next.stand()
	x.m.Log.Info("the VM has moved on: its packets go there directly", "move", x.Move, "vm", x.VM, "to", site, "by", move)
	return nil
}

// onwardID is the name of the redirect that follows one of a move.
func onwardID(move string) string {
	if i := strings.LastIndexByte(move, '-'); i > 0 {
		if n, err := strconv.Atoi(move[i+1:]); err == nil && n > 1 && n < 1000 {
			return fmt.Sprintf("%s-%d", move[:i], n+1)
		}
	}
	return fmt.Sprintf("%.60s-2", move)
}

// replaced reports whether a later redirect of the VM has taken its packets over.
func (x *redirect) replaced() bool {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	for _, later := range x.m.redirects {
		if later.UUID == x.UUID && later.Role == Source && x.Role == Source && later.living && x.before(later) && time.Since(later.Switched) > repointGrace {
			return true
		}
	}
	return false
}

// serveRepoint opens the end of a tunnel of an agent that has sent a VM away
// which now lives here.
func (m *Manager) serveRepoint(ctx context.Context, peer Peer, move string, ask openRequest) (any, error) {
	first := m.firstOf(ask.UUID)
	if first == nil {
		return nil, errors.New("the VM does not live here by a redirect")
	}
	m.mu.Lock()
	vouched := slices.Contains(first.Vouched, peer.ID)
	served := first.addresses()
	old := m.redirects[move]
	m.mu.Unlock()
	if !vouched {
		return nil, fmt.Errorf("the host that the VM came from did not name %s as one that sends its packets", peer.Site)
	}
	for _, a := range addresses(ask.NICs) {
		if !slices.Contains(served, a) {
			return nil, fmt.Errorf("%s is no address that is served for the VM here", a)
		}
	}
	if old != nil { // of an attempt that broke off
		if old.Peer != peer.ID || old.lives() {
			return nil, fmt.Errorf("move %s has a redirect here already", move)
		}
		old.Undo("it is opened anew")
	}
	nics, err := m.NICs(ctx, ask.UUID)
	if err != nil {
		return nil, err
	}
	arrival := Arrival{VM: VM{Move: move, Name: first.VM, UUID: first.UUID}, Peer: peer, NICs: nics}
	reply, err := m.serveOpen(ctx, arrival, ask, first.Move)
	if err != nil {
		return nil, err
	}
	m.work.Go(func() { // the other side may be gone before it stands
		select {
		case <-m.ctx.Done():
		case <-time.After(repointTakes + repointEvery):
			if x := m.of(move, peer.ID); x != nil && !x.lives() {
				x.Undo("its source did not finish it")
			}
		}
	})
	return reply, nil
}

// firstOf is the redirect by which a VM came to live here.
func (m *Manager) firstOf(uuid string) *redirect {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range m.redirects {
		if x.UUID == uuid && x.Role == Destination && x.living && x.Follows == "" && x.movedOn() == nil {
			return x
		}
	}
	return nil
}

// serveStand lets a redirect that follows another one stand, and has the VM's
// own connections take it.
func (m *Manager) serveStand(x *redirect) (any, error) {
	first := m.firstOf(x.UUID)
	if first == nil || x.state() != Armed {
		return nil, ErrUnknown
	}
	x.Resuming()
	x.stand()
	m.mu.Lock()
	defer m.mu.Unlock()
	if first.tunnelled() {
		first.leaveDirect()
	}
	return struct{}{}, nil
}

// relayed reports whether another tunnel has come for what a redirect was for,
// which came from a host where the VM was foreign as well. Called with the lock held.
func (x *redirect) relayed() bool {
	if x.Follows != "" || slices.ContainsFunc(x.NICs, func(n nic) bool { return n.Served == "" }) {
		return false
	}
	for _, other := range x.m.redirects {
		if other.Follows == x.Move && other.Role == Destination && other.living {
			return true
		}
	}
	return false
}

// first is the redirect that another one follows, or itself. Called with the
// lock held.
func (x *redirect) first() *redirect {
	if f := x.m.redirects[x.Follows]; x.Follows != "" && f != nil {
		return f
	}
	return x
}
