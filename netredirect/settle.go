package netredirect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/wanmig/wanmig/netredirect/hostnet"
)

// live watches a redirect after its VM has moved, and ends it when it is not
// needed any more. One goroutine a redirect.
func (x *redirect) live() {
	for {
		done, pause := false, pollEvery
		switch x.Role {
		case Source:
			done = x.liveSource()
		case Destination:
			done = x.liveDestination()
		}
		if done {
			return
		}
		if x.state() == Resident {
			pause = pollResident
		}
		select {
		case <-x.ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// watchTraffic notes when the VM's packets last passed the tunnel here.
func (x *redirect) watchTraffic() {
	x.m.mu.Lock()
	table := x.table()
	x.m.mu.Unlock()
	if table == nil {
		return
	}
	ctx, cancel := context.WithTimeout(x.ctx, 5*time.Second)
	defer cancel()
	counters, err := x.m.net.Counters(ctx, *table)
	x.problem("counting", err)
	if err != nil {
		return
	}
	x.see.Lock()
	defer x.see.Unlock()
	in, out := counters[counterIn], counters[counterOut]
	if n := in.Packets + out.Packets; n != x.seen.packets {
		x.seen.packets, x.seen.at = n, time.Now()
	}
	x.seen.in, x.seen.out = in, out
}

// table is the redirect's own nft table with its counters.
func (x *redirect) table() *hostnet.Table {
	for _, s := range x.Plan.Arm {
		if s.Table != nil && s.Table.Family == "inet" {
			return s.Table
		}
	}
	return nil
}

func (x *redirect) idle() time.Duration {
	x.see.Lock()
	defer x.see.Unlock()
	return time.Since(x.seen.at)
}

// liveSource asks the destination whether the tunnel is still needed.
func (x *redirect) liveSource() (done bool) {
	x.mend()
	x.watchTraffic()
	seen := x.routeSeen()
	retiring := x.m.retireNames(x)
	ctx, cancel := context.WithTimeout(x.ctx, 10*time.Second)
	defer cancel()
	var reply syncReply
	err := x.m.Call(ctx, x.Site, x.Peer, x.Move, opSync,
		syncRequest{Idle: x.idle(), RouteSeen: seen, Draining: x.state() == Draining, Waits: retiring}, &reply)
	if err == nil {
		err = reply.validate()
	}
	x.problem("destination", err)
	switch {
	case errors.Is(err, ErrUnknown):
		return x.finish("the destination does not know of it any more")
	case err == nil && reply.Remove:
		return x.finish("nothing uses it")
	case x.replaced():
		return x.finish("the VM has moved on, and its packets go there directly")
	case time.Now().After(x.Deadline):
		return x.finish("its longest time is over")
	}
	if err == nil && reply.Serving {
		x.problem("BGP", x.m.retireRoutes(x))
	}
	if err == nil && reply.Moved != nil {
		x.repoint(*reply.Moved)
	}
	if err == nil {
		x.see.Lock()
		x.waits, x.flows = reply.Waits, reply.Flows
		x.see.Unlock()
	}
	return false
}

func bounded(texts []string) []string {
	texts = slices.Clone(texts[:min(len(texts), 20)])
	for i, t := range texts {
		texts[i] = fmt.Sprintf("%.*s", maxText, t)
	}
	return texts
}

func (x *redirect) state() State {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	return x.State
}

// finish removes the source's end, or at the destination the tunnel's.
func (x *redirect) finish(why string) (done bool) {
	x.m.mu.Lock()
	if x.m.redirects[x.Move] != x {
		x.m.mu.Unlock()
		return true
	}
	if !x.tunnelled() { // the other side says so, too
		x.m.mu.Unlock()
		return false
	}
	status := x.status()
	var err error
	resident := false
	switch {
	case x.Role == Destination && len(x.Plan.Stay) > 0:
		err, resident = x.endTunnel(why), true
	default:
		err = x.m.removeLocked(x, why)
	}
	if err == nil && x.Role == Source {
		err = x.m.endResidence(x)
	}
	x.m.mu.Unlock()
	if err != nil {
		x.m.Log.Error("redirect not removed", "move", x.Move, "error", err)
	}
	if x.Role == Source {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(x.ctx), 10*time.Second)
		defer cancel()
		if err := x.m.Call(ctx, x.Site, x.Peer, x.Move, opEnd, endRequest{why}, &struct{}{}); err != nil && !errors.Is(err, ErrUnknown) {
			x.m.Log.Warn("the destination does not know that the tunnel is removed", "move", x.Move, "error", err)
		}
	}
	if err == nil && !x.replaced() { // else its connections go on by another
		x.m.Settled(status)
	}
	return !resident
}

// endTunnel removes what stands for the tunnel; the VM's foreign addresses are
// served on. Called with the lock held.
func (x *redirect) endTunnel(why string) error {
	if !x.tunnelled() {
		return nil
	}
	before := x.State
	x.State, x.Ending = Resident, true // whatever happens now, the next start goes on with it
	if err := x.m.journal.put(&x.record); err != nil {
		x.State, x.Ending = before, false
		return err
	}
	if err := x.ended(); err != nil {
		return err
	}
	x.m.Log.Info("tunnel removed", "move", x.Move, "vm", x.VM, "because", why)
	return nil
}

// ended undoes what stood for the tunnel of a redirect that is resident. Called
// with the lock held.
func (x *redirect) ended() error {
	err := x.m.revert(x, slices.Concat(x.Plan.Tunnel, x.Plan.Arm))
	err = errors.Join(err, x.m.uncarry(x.Device))
	x.m.openGates()
	if err != nil {
		return err // mend tries again
	}
	x.Ending = false
	return x.m.journal.put(&x.record)
}

// endResidence ends what an earlier redirect does for a VM that lived here and
// has left by redirect x. Called with the lock held.
func (m *Manager) endResidence(x *redirect) error {
	var errs []error
	for _, old := range m.redirects {
		if old.UUID == x.UUID && old.Role == Destination && old.before(x) {
			errs = append(errs, m.leave(old, "the VM has moved on"))
		}
	}
	return errors.Join(errs...)
}

// leave removes a destination's redirect with its routes. Called with the lock held.
func (m *Manager) leave(x *redirect, why string) error {
	x.stopWork() // or it announces again
	if m.bgp != nil && len(x.Announced) > 0 {
		if err := m.bgp.Withdraw(m.ctx, x.Announced); err != nil {
			return err
		}
	}
	return m.removeLocked(x, why)
}

// liveDestination moves names and routes, and judges.
func (x *redirect) liveDestination() (done bool) {
	x.mend()
	present, err := x.m.Present(x.ctx, x.UUID)
	if err == nil && !present && !x.leaving() {
		x.m.mu.Lock()
		defer x.m.mu.Unlock()
		if x.m.redirects[x.Move] == x {
			if err := x.m.leave(x, "the VM is gone from here"); err != nil {
				x.m.Log.Error("redirect not removed", "move", x.Move, "error", err)
			}
		}
		return true
	}
	leaving := x.leaving() // its names and routes are the later redirect's to move
	if x.state() == Resident {
		if !leaving {
			ctx, cancel := context.WithTimeout(x.ctx, dnsPatience)
			defer cancel()
			x.restoreTTL(ctx)
		}
		return false
	}
	x.watchTraffic()
	if leaving {
		return false
	}
	x.moveNames()
	x.moveRoutes()
	remove, waits := decide(x.situation())
	x.see.Lock()
	const patience = 30 * time.Second // the source asks every few seconds
	silent := time.Since(x.lastSync)
	if silent < patience {
		waits = append(waits, x.peerWaits...)
	}
	remove = remove && len(waits) == 0
	x.waits = waits
	x.see.Unlock()
	x.goDirect()
	if remove && silent > patience {
		x.finish("nothing uses it, and the source is silent")
	}
	return false
}

// mend makes again what could not be made at the agent's start, when a bridge was
// not there yet, say; and follows a VM that was restarted to its new taps.
func (x *redirect) mend() {
	var here []NIC
	if x.Role == Destination {
		here, _ = x.m.NICs(x.ctx, x.UUID) // its absence is judged elsewhere
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.m.redirects[x.Move] != x {
		return
	}
	moved := false
	nics := x.hostNICs()
	for i, n := range nics {
		for _, h := range here {
			if h.MAC == n.MAC && h.Tap != "" && h.Tap != n.Tap {
				nics[i].Tap, moved = h.Tap, true
			}
		}
	}
	switch {
	case moved:
		x.problem("restoring", x.retap(nics))
	case x.Ending:
		x.problem("removing", x.ended())
	case !x.whole:
		err := x.m.standLocked(x)
		x.problem("restoring", err)
		x.whole = err == nil
	}
}

// retap plans a destination anew for other taps. Called with the lock held.
func (x *redirect) retap(nics []hostNIC) error {
	err := x.m.revert(x, slices.Concat(x.Plan.Stay, x.Plan.Arm, x.Plan.Switch))
	x.silence()
	x.setNICs(nics)
	egress := x.m.egress(x.Options)
	if x.home() || x.Direct {
		egress = EgressDirect
	}
	plan := planDestination(x.needs(egress))
	var err1, err2 error
	x.Plan.Stay, err1 = x.m.rememberSysctls(plan.Stay)
	x.Plan.Arm, err2 = x.m.rememberSysctls(plan.Arm)
	x.Plan.Switch = plan.Switch
	return errors.Join(err, err1, err2, x.m.journal.put(&x.record), x.m.standLocked(x))
}

// leaving reports whether the VM has moved on from here by a later redirect,
// which still needs this one.
func (x *redirect) leaving() bool {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	for _, later := range x.m.redirects {
		if later.UUID == x.UUID && later.Role == Source && x.before(later) {
			return true
		}
	}
	return false
}

// situation is what decide judges.
func (x *redirect) situation() situation {
	flows := x.countFlows()
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	x.see.Lock()
	defer x.see.Unlock()
	left := x.Options.Max // the source may ask before this host knows that the VM has come
	if !x.Deadline.IsZero() {
		left = time.Until(x.Deadline)
	}
	first := x.first() // it moves the names of both
	s := situation{Mode: x.Mode, Home: x.home(), Relayed: x.relayed(), Drained: x.State == Draining,
		Names: len(first.Names), NamesKnown: first.Found, NameServed: !first.NameMoved.IsZero(), DNS: x.m.dns != nil,
		BGP: x.m.bgp != nil, RouteSeen: !x.RouteSeen.IsZero(),
		Idle: min(time.Since(x.seen.at), x.peerIdle+time.Since(x.lastSync)), Quiet: x.Options.Quiet, Flows: flows, Left: left}
	if s.NameServed {
		s.CachedFor = cachedFor(time.Now(), first.Lowered, first.NameMoved, first.oldTTL(), x.m.lowTTL())
	}
	return s
}

// home reports whether every address belongs to the destination's own networks.
func (r *record) home() bool {
	return !slices.ContainsFunc(r.NICs, func(n nic) bool { return !n.Home })
}

// change updates the record under the lock, durably.
func (x *redirect) change(f func(*record)) {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	f(&x.record)
	if x.m.redirects[x.Move] == x {
		x.problem("journal", x.m.journal.put(&x.record))
	}
}

// goDirect lets the VM's own new connections leave directly once new ones find
// it here: else they would need the tunnel for ever.
func (x *redirect) goDirect() {
	if x.Direct {
		return
	}
	s := x.situation()
	if !s.Drained && len(unsettled(s)) > 0 {
		return
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.m.redirects[x.Move] != x || x.home() || !x.tunnelled() {
		return
	}
	x.leaveDirect()
}

// leaveDirect has the VM's own new connections not take this tunnel. Called with
// the lock held.
func (x *redirect) leaveDirect() {
	for i, step := range x.Plan.Arm {
		if step.Table == nil || step.Table.Family != "inet" {
			continue
		}
		direct := hostnet.Step{Table: destinationTable(x.needs(EgressDirect))}
		if err := x.m.net.Replace(x.ctx, step, direct); err != nil {
			x.problem("egress", err)
			return
		}
		x.Plan.Arm[i] = direct
	}
	x.Direct = true
	x.problem("journal", x.m.journal.put(&x.record))
}

// needs are those that the destination's plan was made from.
func (x *redirect) needs(e Egress) destinationNeeds {
	return destinationNeeds{slot: x.Slot, priority: x.Priority, device: x.Device, nics: x.hostNICs(), egress: e, mapped: x.Mapped, follows: x.Follows != ""}
}
