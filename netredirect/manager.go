package netredirect

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/wanmig/wanmig/netredirect/hostnet"
	"github.com/wanmig/wanmig/netredirect/names"
	"github.com/wanmig/wanmig/netredirect/routes"
)

// Config is what a manager works with.
type Config struct {
	Dir    string // folder of its journal
	Site   string // this site's name
	Egress Egress // of VMs that arrive here, where the move does not say
	Mode   Mode   // the same
	Pool   []netip.Prefix
	DNS    *names.Config  // nil: names are not this agent's to move
	BGP    *routes.Config // nil: routes are not

	// Dial connects a QUIC tunnel to the agent of a site.
	Dial func(ctx context.Context, site, peer string) (Packets, error)
	// Call asks the agent of a site to serve an operation on the redirect of a move.
	Call func(ctx context.Context, site, peer, move, op string, request, reply any) error
	// SiteOf names the site of a peer; Reach tells the address at which it is.
	SiteOf func(peer string) (site string, known bool)
	Reach  func(ctx context.Context, site, peer string) (netip.Addr, error)
	// Present tells whether a VM is still at this host.
	Present func(ctx context.Context, uuid string) (bool, error)
	// NICs are those of a VM at this host, without addresses.
	NICs func(ctx context.Context, uuid string) ([]NIC, error)
	// Settled is called when the tunnel of a redirect is gone.
	Settled func(Status)
	Log     *slog.Logger
}

// Manager keeps the redirects of one host.
type Manager struct {
	Config
	net     *hostnet.Host
	journal journal
	dns     *names.Client
	bgp     *routes.Speaker
	ctx     context.Context // the agent's life
	work    sync.WaitGroup

	mu        sync.Mutex // of what follows, and of every change of the host's network
	redirects map[string]*redirect
	tunnels   map[string]*carried // by device
}

// Start reads the journal and makes again what stood when the agent ended. The
// caller then tells with Decide how the moves ended.
func Start(ctx context.Context, c Config) (*Manager, error) {
	net, err := hostnet.Open()
	if err != nil {
		return nil, err
	}
	m := &Manager{Config: c, net: net, journal: journal{c.Dir}, ctx: ctx, redirects: map[string]*redirect{}, tunnels: map[string]*carried{}}
	records, err := m.journal.all()
	if err != nil {
		m.Log.Error("redirect not repaired", "error", err)
	}
	var announced []netip.Prefix
	slices.SortFunc(records, func(a, b *record) int { return a.Began.Compare(b.Began) })
	for _, r := range records {
		m.redirects[r.Move] = m.newRedirect(r)
		announced = append(announced, r.Announced...)
	}
	if c.DNS != nil {
		if m.dns, err = names.New(*c.DNS); err != nil {
			return nil, errors.Join(err, m.stop())
		}
	}
	if c.BGP != nil {
		if m.bgp, err = routes.New(ctx, *c.BGP, announced, c.Log); err != nil {
			return nil, errors.Join(err, m.stop())
		}
	}
	for _, r := range records { // in the order in which they were made
		m.restore(m.redirects[r.Move])
	}
	return m, nil
}

// Close leaves every redirect as it stands in the kernel: the next start of the
// agent takes them up. Tunnels that this program carries pause until then.
func (m *Manager) Close() error {
	m.mu.Lock()
	for _, x := range m.redirects {
		x.rest()
	}
	m.mu.Unlock()
	m.work.Wait()
	return m.stop()
}

func (m *Manager) stop() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for device, t := range m.tunnels {
		delete(m.tunnels, device)
		errs = append(errs, t.close())
	}
	if m.bgp != nil {
		m.bgp.Close()
	}
	m.net.Close()
	return errors.Join(errs...)
}

// restore makes again what a redirect had made. Called before the manager serves.
func (m *Manager) restore(x *redirect) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if x.State == Opening || x.Removing {
		if err := m.removeLocked(x, "its agent ended before it was ready"); err != nil {
			x.problem("removing", err)
			return
		}
		return
	}
	if x.State == Armed {
		return // its move is over, and Decide tells how
	}
	err := m.standLocked(x)
	if x.Ending {
		err = errors.Join(err, x.ended())
	}
	x.whole = err == nil
	if err != nil { // mend tries again
		x.problem("restoring", err)
		m.Log.Error("redirect not whole after the agent's start", "move", x.Move, "vm", x.VM, "error", err)
	}
}

// standLocked makes everything that the redirect's state asks for. What stands
// already is left as it is.
func (m *Manager) standLocked(x *redirect) error {
	var steps []hostnet.Step
	if x.tunnelled() {
		if err := m.carry(&x.record); err != nil {
			return err
		}
		m.dial(&x.record)
		m.openGates()
		steps = append(steps, x.Plan.Tunnel...)
	}
	steps = append(steps, x.Plan.Stay...)
	if x.tunnelled() {
		steps = append(steps, x.Plan.Arm...)
	}
	if x.State != Armed {
		steps = append(steps, x.Plan.Switch...)
	}
	ctx, cancel := m.hurry()
	defer cancel()
	_, err := m.net.ApplyAll(ctx, steps)
	return errors.Join(err, x.respond())
}

// Decide tells how the move of a redirect ended: the VM went to the destination,
// or stayed at the source. It is called after a restart, too.
func (m *Manager) Decide(move string, went bool) {
	m.mu.Lock()
	x := m.redirects[move]
	m.mu.Unlock()
	switch {
	case x == nil:
	case went && x.state() != Opening:
		x.stand()
	default:
		x.Undo("the VM stayed at its source")
	}
}

// Moves are the moves that have a redirect here.
func (m *Manager) Moves() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []string
	for move := range m.redirects {
		all = append(all, move)
	}
	return all
}

// add takes a new redirect in and gives it numbers of its own.
func (m *Manager) add(r *record) (*redirect, error) {
	if _, twice := m.redirects[r.Move]; twice {
		return nil, fmt.Errorf("move %s has a redirect here already", r.Move)
	}
	used, taken := map[int]bool{}, map[int]bool{}
	r.Priority = topPriority
	for _, x := range m.redirects {
		used[x.Slot], taken[x.Priority] = true, true
		if x.UUID == r.UUID { // its rules come before the older ones of the same VM
			r.Priority = min(r.Priority, x.Priority-rulesEach)
		}
	}
	for used[r.Slot] {
		r.Slot++
	}
	for taken[r.Priority] {
		r.Priority -= rulesEach
	}
	if r.Slot >= maxSlots || r.Priority < 1 {
		return nil, fmt.Errorf("%d redirects stand here: end some with wanmig redirect cut", len(m.redirects))
	}
	x := m.newRedirect(r)
	x.whole = true // from now on
	m.redirects[r.Move] = x
	return x, nil
}

// apply journals a plan and makes the steps that are given, which are part of it.
// Called with the lock held.
func (m *Manager) apply(ctx context.Context, x *redirect, steps []hostnet.Step) error {
	if m.redirects[x.Move] != x {
		return ErrUnknown // it was removed meanwhile
	}
	if err := m.journal.put(&x.record); err != nil {
		return err
	}
	done, err := m.net.ApplyAll(ctx, steps)
	if err != nil {
		return errors.Join(err, m.revert(x, steps[:done]))
	}
	return nil
}

// revert undoes steps, but for those that another redirect stands on as well.
// Called with the lock held.
func (m *Manager) revert(x *redirect, steps []hostnet.Step) error {
	shared := func(s hostnet.Step) bool {
		for _, other := range m.redirects {
			if other != x && slices.ContainsFunc(other.standing(), func(o hostnet.Step) bool { return reflect.DeepEqual(o, s) }) {
				return true
			}
		}
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.ctx), 30*time.Second)
	defer cancel()
	return m.net.RevertAll(ctx, slices.DeleteFunc(slices.Clone(steps), shared))
}

// rememberSysctls fills in what the settings of a plan were before: what another
// redirect that has changed them says, or what they are. Settings that are as
// wanted by themselves are left out. Called with the lock held.
func (m *Manager) rememberSysctls(steps []hostnet.Step) ([]hostnet.Step, error) {
	var all []hostnet.Step
	for _, s := range steps {
		if s.Sysctl == nil || s.Sysctl.Was != "" {
			all = append(all, s)
			continue
		}
		was, changed := m.before(s.Sysctl.Key)
		if !changed {
			var err error
			if was, err = m.net.Sysctl(s.Sysctl.Key); err != nil {
				return nil, err
			}
		}
		if was != s.Sysctl.Value {
			all = append(all, hostnet.Step{Sysctl: &hostnet.Sysctl{Key: s.Sysctl.Key, Value: s.Sysctl.Value, Was: was}})
		}
	}
	return all, nil
}

func (m *Manager) before(key string) (string, bool) {
	for _, x := range m.redirects {
		for _, s := range x.Plan.steps() {
			if s.Sysctl != nil && s.Sysctl.Key == key && s.Sysctl.Was != "" {
				return s.Sysctl.Was, true
			}
		}
	}
	return "", false
}

// removeLocked undoes everything of a redirect and forgets it.
func (m *Manager) removeLocked(x *redirect, why string) error {
	x.rest()
	x.Removing = true // whatever happens now, the next start goes on with it
	err := m.journal.put(&x.record)
	err = errors.Join(err, m.revert(x, x.standing()))
	delete(m.redirects, x.Move)
	err = errors.Join(err, m.uncarry(x.Device))
	m.openGates()
	if err != nil {
		// What is left keeps its numbers, is shown, and is tried again at the next start.
		m.redirects[x.Move] = x
		x.problem("removing", err)
		return fmt.Errorf("undo the redirect of %q: %w", x.VM, err)
	}
	level := slog.LevelInfo
	if x.State == Opening { // one of several kinds that are tried
		level = slog.LevelDebug
	}
	m.Log.Log(m.ctx, level, "redirect removed", "move", x.Move, "vm", x.VM, "kind", x.Kind, "because", why)
	return m.journal.remove(x.Move)
}

// How often a redirect is looked at while its tunnel stands, and afterwards.
const (
	pollEvery    = time.Second
	pollResident = 5 * time.Second
)
