package netredirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/wanmig/wanmig/netredirect/names"
)

// findNames looks the VM's names up, and lowers their TTL if asked for.
func (x *redirect) findNames() {
	x.naming.Lock()
	defer x.naming.Unlock()
	if x.m.dns == nil || x.Mode != New || len(x.Names) > 0 && (!x.Options.LowerTTL || !x.Lowered.IsZero()) {
		return
	}
	ctx, cancel := context.WithTimeout(x.ctx, dnsPatience)
	defer cancel()
	if len(x.Names) == 0 { // a move before this one may still be giving them back
		found, err := x.m.dns.Find(ctx, x.Options.Names, addressesOf(foreignNICs(x.hostNICs())))
		x.problem("DNS", err)
		if err != nil || x.Found && len(found) == 0 {
			return
		}
		x.change(func(r *record) { r.Names, r.Found = found, true })
	}
	if x.Options.LowerTTL && len(x.Names) > 0 && x.Lowered.IsZero() {
		err := x.m.dns.LowerTTL(ctx, x.Names)
		x.problem("TTL", err)
		if err == nil {
			x.change(func(r *record) { r.Lowered = time.Now() })
		}
	}
}

// moveNames gives the VM's names its new addresses, checks every server, and
// gives them their TTL back in the end.
func (x *redirect) moveNames() {
	if x.Follows != "" {
		return // the first redirect moves them
	}
	x.findNames()
	if x.m.dns == nil || x.Mode != New || !x.Found || len(x.Names) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(x.ctx, dnsPatience)
	defer cancel()
	if x.NameMoved.IsZero() {
		if err := x.m.dns.Move(ctx, x.Names, x.Mapped); err != nil && !errors.Is(err, names.ErrReverse) {
			x.problem("DNS", err)
			return
		}
		servers, err := x.m.dns.Status(ctx, x.Names, x.Mapped)
		if err == nil {
			err = behind(servers)
		}
		x.problem("DNS", err)
		if err == nil {
			x.change(func(r *record) { r.NameMoved = time.Now() })
		}
		return
	}
	x.restoreTTL(ctx)
}

// restoreTTL gives the VM's names their TTL back when nobody has an old address
// any more, which may be after the tunnel's end.
func (x *redirect) restoreTTL(ctx context.Context) {
	x.m.mu.Lock()
	due := x.m.dns != nil && !x.Lowered.IsZero() && !x.Restored && cachedFor(time.Now(), x.Lowered, x.NameMoved, x.oldTTL(), x.m.lowTTL()) == 0
	recs := x.Names
	x.m.mu.Unlock()
	if !due {
		return
	}
	err := x.m.dns.RestoreTTL(ctx, recs)
	x.problem("TTL", err)
	if err == nil {
		x.change(func(r *record) { r.Restored = true })
	}
}

// raiseTTL gives the names of a VM that did not come their TTL back.
func (x *redirect) raiseTTL() {
	x.naming.Lock() // findNames may be lowering it
	defer x.naming.Unlock()
	if len(x.Names) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(x.m.ctx, dnsPatience)
	defer cancel()
	if err := x.m.dns.RestoreTTL(ctx, x.Names); err != nil {
		x.m.Log.Warn("the TTL of the VM's names stays low: raise it by hand", "move", x.Move, "vm", x.VM, "error", err)
	}
}

// behind names the servers that do not answer with the new addresses.
func behind(servers []names.ServerStatus) error {
	var late []string
	for _, s := range servers {
		switch {
		case s.Type == "PTR":
		case s.Problem != "":
			late = append(late, fmt.Sprintf("%s: %s", s.Server, s.Problem))
		case !s.Moved:
			late = append(late, fmt.Sprintf("%s answers %s for %s", s.Server, strings.Join(s.Answer, ", "), s.Name))
		}
	}
	if len(late) > 0 {
		return fmt.Errorf("not every server has the new addresses: %s", strings.Join(late, "; "))
	}
	return nil
}

// moveRoutes announces the VM's addresses from here, and learns that the
// network has them.
func (x *redirect) moveRoutes() {
	if x.m.bgp == nil || x.Mode != Keep || x.home() {
		return
	}
	if len(x.Announced) == 0 {
		// In the journal first: what was announced must be withdrawn some day.
		x.change(func(r *record) { r.Announced = x.prefixes() })
	}
	var errs []error
	for _, p := range x.Announced { // one that can't be announced does not keep the others
		errs = append(errs, x.m.bgp.Announce(x.ctx, []netip.Prefix{p}))
	}
	for _, p := range x.m.bgp.Peers() {
		if p.Problem != "" {
			errs = append(errs, fmt.Errorf("peer %s: %s", p.Peer, p.Problem))
		}
	}
	x.problem("BGP", errors.Join(errs...))
	x.see.Lock()
	seen := x.peerSeen
	x.see.Unlock()
	if x.RouteSeen.IsZero() && (seen || x.routeSeen()) {
		x.change(func(r *record) { r.RouteSeen = time.Now() })
	}
}

// routeSeen reports whether the network has the route to each address of the VM
// at its destination, as far as the BGP peers here tell.
func (x *redirect) routeSeen() bool {
	if x.m.bgp == nil {
		return false
	}
	for _, p := range x.prefixes() {
		arrived, err := x.m.bgp.Arrived(p, x.Role == Destination)
		x.problem("routes seen", err)
		if err != nil || !arrived {
			return false
		}
	}
	return true
}

// retireRoutes withdraws what this host announces of a VM that has moved on by
// redirect x.
func (m *Manager) retireRoutes(x *redirect) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, old := range m.redirects {
		if old.UUID == x.UUID && old.Role == Destination && old.before(x) && len(old.Announced) > 0 && m.bgp != nil {
			errs = append(errs, m.bgp.Withdraw(m.ctx, old.Announced))
		}
	}
	return errors.Join(errs...)
}

// retireNames gives the names of a VM that lived here at new addresses, and has
// left by redirect x, their old ones. It returns what is not done yet.
func (m *Manager) retireNames(x *redirect) (waits []string) {
	ctx, cancel := context.WithTimeout(x.ctx, dnsPatience)
	defer cancel()
	m.mu.Lock()
	olds := map[*redirect]record{}
	for _, old := range m.redirects {
		if old.UUID == x.UUID && old.Role == Destination && old.Mode == New && old.before(x) && len(old.Names) > 0 && m.dns != nil {
			olds[old] = old.record
		}
	}
	m.mu.Unlock()
	for o, old := range olds {
		if old.NameBack.IsZero() {
			var err error
			if !old.Lowered.IsZero() && !old.Restored { // before a later redirect finds the names at their old addresses
				err = m.dns.RestoreTTL(ctx, old.Names)
			}
			if err == nil {
				err = m.dns.MoveBack(ctx, old.Names, old.Mapped)
			}
			if err != nil && !errors.Is(err, names.ErrReverse) {
				x.problem("DNS", err)
				waits = append(waits, "the VM's names are not back at its own addresses yet")
				continue
			}
			x.problem("DNS", nil)
			old.NameBack = time.Now()
			o.change(func(r *record) { r.NameBack = old.NameBack })
		}
		if left := time.Until(old.NameBack.Add(old.oldTTL())); left > 0 {
			waits = append(waits, fmt.Sprintf("caches may have the addresses that the VM had here for %v more", left.Round(time.Second)))
		}
	}
	return waits
}

// dnsPatience is for everything that is asked of DNS at a time.
const dnsPatience = 30 * time.Second

func (r *record) oldTTL() time.Duration {
	var most uint32
	for _, n := range r.Names {
		most = max(most, n.TTL)
	}
	return time.Duration(most) * time.Second
}

func (m *Manager) lowTTL() time.Duration {
	if m.DNS == nil || m.DNS.TTL == 0 {
		return names.DefaultTTL
	}
	return m.DNS.TTL
}
