package netredirect

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/wanmig/wanmig/netredirect/encap"
)

const maxFlows = 200

// Flow is a connection that uses a tunnel.
type Flow struct {
	Proto string         `json:"proto"`
	From  netip.AddrPort `json:"from"`
	To    netip.AddrPort `json:"to"`
	Bytes uint64         `json:"bytes,omitempty"` // 0 where the kernel does not count
}

// Status is a redirect as an observer sees it.
type Status struct {
	Move     string     `json:"move"`
	VM       string     `json:"vm"`
	UUID     string     `json:"uuid"`
	Role     Role       `json:"role"`
	Peer     string     `json:"peer"` // site
	State    State      `json:"state"`
	Kind     Kind       `json:"kind"`
	Device   string     `json:"device"`
	Local    netip.Addr `json:"local"`
	Remote   netip.Addr `json:"remote"`
	MTU      int        `json:"mtu"`
	Mode     Mode       `json:"mode,omitempty"`
	Follows  string     `json:"follows,omitempty"` // the move that brought the VM here, where it was another
	Began    time.Time  `json:"began"`
	Switched *time.Time `json:"switched,omitempty"`
	Deadline *time.Time `json:"deadline,omitempty"` // then the tunnel goes, used or not

	Addresses []netip.Addr              `json:"addresses"`
	Mapped    map[netip.Addr]netip.Addr `json:"mapped,omitempty"`
	Names     []string                  `json:"names,omitempty"`
	Announced []netip.Prefix            `json:"announced,omitempty"`

	IdleMS   int64    `json:"idle_ms"` // since a packet of the VM passed
	Out      Counter  `json:"out"`     // into the tunnel
	In       Counter  `json:"in"`      // out of it
	Dropped  Drops    `json:"dropped"`
	Flows    []Flow   `json:"flows"`
	Waits    []string `json:"waits,omitempty"`    // why the tunnel stays
	Problems []string `json:"problems,omitempty"` // what is wrong, and what to do
	Steps    []string `json:"steps"`              // what stands, as one would type it
	Undo     []string `json:"undo"`               // and how it would be undone
}

// Counter counts packets.
type Counter struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Drops counts the packets that a tunnel kept out, by reason. Those of a tunnel
// are shared by the redirects that use it.
type Drops struct {
	Spoofed   uint64 `json:"spoofed"`   // not from the other end
	Malformed uint64 `json:"malformed"` // truncated, or no IP
	Nested    uint64 `json:"nested"`    // a tunnel in the tunnel
	Foreign   uint64 `json:"foreign"`   // for or from addresses that are no redirected VM's
	TooBig    uint64 `json:"too_big"`
	Unsent    uint64 `json:"unsent"` // the way was not there
}

// All lists the redirects of this host, oldest first.
func (m *Manager) All() []Status {
	m.mu.Lock()
	all := make([]*redirect, 0, len(m.redirects))
	for _, x := range m.redirects {
		all = append(all, x)
	}
	m.mu.Unlock()
	sort.Slice(all, func(a, b int) bool { return all[a].Began.Before(all[b].Began) })
	list := make([]Status, 0, len(all))
	for _, x := range all {
		list = append(list, x.Status())
	}
	return list
}

// Find finds the redirect of a move, or of a VM by its name.
func (m *Manager) Find(move string) (*redirect, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if x, ok := m.redirects[move]; ok {
		return x, true
	}
	var found *redirect
	for _, x := range m.redirects {
		if x.VM == move && (found == nil || x.Began.After(found.Began)) {
			found = x
		}
	}
	return found, found != nil
}

// Status returns how the redirect stands.
func (x *redirect) Status() Status {
	drops := x.drops()
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	s := x.status()
	s.Dropped = drops
	return s
}

// status is called with the manager's lock held.
func (x *redirect) status() Status {
	s := Status{Move: x.Move, VM: x.VM, UUID: x.UUID, Role: x.Role, Peer: x.Site, State: x.State, Kind: x.Kind, Device: x.Device,
		Local: x.Local, Remote: x.Remote, MTU: x.MTU, Mode: x.Mode, Follows: x.Follows, Began: x.Began, Addresses: x.addresses(), Mapped: x.Mapped, Announced: x.Announced}
	if !x.Switched.IsZero() {
		s.Switched = &x.Switched
	}
	if !x.Deadline.IsZero() && x.tunnelled() {
		s.Deadline = &x.Deadline
	}
	for _, n := range x.Names {
		s.Names = append(s.Names, n.Name)
	}
	for _, step := range x.standing() {
		s.Steps = append(s.Steps, step.String())
		s.Undo = append(s.Undo, step.UndoString())
	}
	slices.Reverse(s.Undo)
	x.see.Lock()
	defer x.see.Unlock()
	s.IdleMS = time.Since(x.seen.at).Milliseconds()
	s.In, s.Out = Counter{x.seen.in.Packets, x.seen.in.Bytes}, Counter{x.seen.out.Packets, x.seen.out.Bytes}
	s.Flows = append([]Flow{}, x.flows...)
	for _, w := range x.waits {
		s.Waits = append(s.Waits, strings.ReplaceAll(w, "MOVE", x.Move))
	}
	for what, p := range x.problems {
		s.Problems = append(s.Problems, what+": "+p)
	}
	slices.Sort(s.Problems)
	return s
}

// drops reads what the tunnel has kept out.
func (x *redirect) drops() (d Drops) {
	x.m.mu.Lock()
	t, tunnelled, steps := x.m.tunnels[x.Device], x.tunnelled(), x.Plan.Tunnel
	x.m.mu.Unlock()
	if t != nil {
		d = dropsOf(t.user.Stats())
	}
	for _, step := range steps {
		if step.Table == nil || !tunnelled {
			continue
		}
		if c, err := x.m.net.Counters(x.m.ctx, *step.Table); err == nil {
			d.Nested += c[counterNested].Packets
			d.Foreign += c[counterForeign].Packets + c[counterLocal].Packets
		}
	}
	return d
}

func dropsOf(s encap.Stats) Drops {
	d := s.Drops
	return Drops{Spoofed: d.Spoofed, Malformed: d.Malformed, Nested: d.Nested, Foreign: d.Foreign, TooBig: d.TooBig, Unsent: d.Unsent}
}

// countFlows reads the connections that use the tunnel, at the destination.
func (x *redirect) countFlows() int {
	x.m.mu.Lock()
	addrs, slot := x.addresses(), x.Slot
	x.m.mu.Unlock()
	found, err := x.m.net.Flows(addrs, markOf(slot), markMask)
	x.problem("connections", err)
	if err != nil {
		return 0
	}
	x.see.Lock()
	defer x.see.Unlock()
	x.flows = nil
	for _, f := range found[:min(len(found), maxFlows)] {
		x.flows = append(x.flows, Flow{Proto: f.Proto, From: f.Src, To: f.Dst, Bytes: f.Bytes})
	}
	return len(found)
}

// Drain says that nothing more will move by itself: the tunnel goes as soon as
// nothing uses it.
func (x *redirect) Drain() {
	x.change(func(r *record) {
		if r.State == Standing {
			r.State = Draining
		}
	})
}

// ErrInUse is returned when connections use a tunnel that is to be cut.
type ErrInUse struct{ Flows int }

func (e ErrInUse) Error() string {
	return fmt.Sprintf("%d connections use the tunnel, and would break: --force cuts them", e.Flows)
}

// Cut removes a tunnel now, at both ends. With live connections it is refused,
// unless forced.
func (x *redirect) Cut(ctx context.Context, force bool) error {
	s := x.Status()
	switch {
	case s.State == Armed || s.State == Opening:
		return fmt.Errorf("the move %s still needs it: wanmig cancel ends both", x.Move)
	case s.State == Resident:
		return fmt.Errorf("the tunnel of %s is gone: what stands serves the VM's addresses here until it leaves", x.Move)
	}
	if flows := len(s.Flows); !force && flows > 0 && s.IdleMS < x.Options.Quiet.Milliseconds() {
		return ErrInUse{flows}
	}
	x.finish("an operator cut it")
	if x.Role == Destination {
		err := x.m.Call(ctx, x.Site, x.Peer, x.Move, opEnd, endRequest{"an operator cut it"}, &struct{}{})
		if err != nil {
			return fmt.Errorf("the tunnel is removed here and not at %s: %w: run wanmig redirect cut there", x.Site, err)
		}
	}
	return nil
}
