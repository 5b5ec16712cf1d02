package netredirect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// ErrUnknown is returned when the other side has no redirect of a move.
var ErrUnknown = errors.New("no redirect of that move stands there")

// Arrival is a VM that is about to arrive here: what a source may ask a redirect for.
type Arrival struct {
	VM
	Peer Peer
	NICs []NIC // at this host, without addresses
}

// Answer tells a source what a redirect to this host would be. nics are the
// VM's at this host as far as they are known; from is the source's address as
// this host sees it.
func (m *Manager) Answer(ask Ask, nics []NIC, from netip.Addr) (Offer, error) {
	if err := ask.validate(); err != nil {
		return Offer{}, err
	}
	if ask.Options.Kind == None || len(ask.NICs) == 0 {
		return Offer{}, nil
	}
	o := Offer{Kinds: Kinds, NAT: from != ask.Outer, Mode: m.mode(ask.Options), Findings: m.hostFindings()}
	_, outer, _, err := m.net.RouteTo(from)
	if err != nil {
		return o, err
	}
	o.Outer = outer
	if kind := ask.Options.Kind; o.NAT && kind != Auto && kind != QUIC {
		o.Findings = append(o.Findings, Finding{Check: "redirect", Problem: fmt.Sprintf("--redirect %s: %s is seen as %s at %s, and address translation passes no IP-in-IP", kind, ask.Outer, from, m.Site),
			Remedy: "--redirect quic, or auto", Fatal: true})
	}
	if err := m.checkClaims(ask.UUID, ask.NICs, from); err != nil {
		o.Findings = append(o.Findings, Finding{Check: "redirect", Problem: fmt.Sprintf("connections break, at %s: %v", m.Site, err), Remedy: "name the VM's addresses with --address"})
		return o, nil
	}
	here, err := m.place(ask.UUID, ask.NICs, nics)
	if err != nil {
		o.Findings = append(o.Findings, Finding{Check: "redirect", Problem: fmt.Sprintf("connections break: %v", err), Remedy: "attach the VM to a Linux bridge there with --network"})
		return o, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(foreignNICs(here)) == 0 {
		o.Mode = Keep // at home it needs no others
	}
	if o.Mode == New {
		if o.Mapped, err = m.map1to1(here); err != nil {
			o.Findings = append(o.Findings, Finding{Check: "addresses", Problem: err.Error(), Remedy: "enlarge addresses.pool there, or --addresses keep", Fatal: true})
			return o, nil
		}
	}
	kind := ask.Options.Kind
	if kind == Auto {
		kind = IPIP
	}
	for i := range here {
		here[i].Tap = cmp.Or(here[i].Tap, "vnetN") // its number is known when it is made
	}
	device := deviceName("", kind)
	plan := planDestination(destinationNeeds{priority: topPriority, device: device, nics: here, egress: m.egress(ask.Options), mapped: o.Mapped})
	plan.Tunnel = planTunnel(tunnelFacts{kind: kind, device: device, local: outer, remote: from, mtu: tunnelMTU(kind, from, 0)})
	o.Steps = m.typed(plan)
	_, o.Findings = m.routable(NIC{Addresses: addressesOf(here)}, o.Findings)
	o.Findings = append(o.Findings, m.settleFindings(o.Mode, here)...)
	return o, nil
}

// settleFindings tell what an operator will have to do by hand.
func (m *Manager) settleFindings(mode Mode, nics []hostNIC) []Finding {
	s := situation{Mode: mode, DNS: m.dns != nil, NamesKnown: true, Names: 1, NameServed: true, BGP: m.bgp != nil, RouteSeen: true, Home: len(foreignNICs(nics)) == 0}
	var all []Finding
	for _, w := range unsettled(s) {
		what, remedy, _ := strings.Cut(w, ": ")
		all = append(all, Finding{Check: "redirect", Problem: "the tunnel stays up to its longest time: " + what, Remedy: remedy})
	}
	return all
}

func (m *Manager) mode(o Options) Mode {
	switch {
	case o.Mode != "":
		return o.Mode
	case m.Mode != "":
		return m.Mode
	}
	return Keep
}

func (m *Manager) egress(o Options) Egress {
	switch {
	case o.Egress != "":
		return o.Egress
	case m.Egress != "":
		return m.Egress
	}
	return EgressTunnel
}

// place finds each of the VM's NICs, with its addresses, on this host's bridges.
func (m *Manager) place(uuid string, there, here []NIC) ([]hostNIC, error) {
	var all []hostNIC
	for _, t := range there {
		i := slices.IndexFunc(here, func(n NIC) bool { return strings.EqualFold(n.MAC, t.MAC) })
		if i < 0 {
			return nil, fmt.Errorf("the VM has no interface %s here", t.MAC)
		}
		n := here[i]
		n.Addresses, n.Gateways, n.Served = t.Addresses, t.Gateways, t.Served
		b, err := m.bridge(n)
		if err != nil {
			return nil, err
		}
		home := !slices.ContainsFunc(n.Addresses, func(a netip.Addr) bool {
			return !slices.ContainsFunc(b.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
		})
		all = append(all, hostNIC{NIC: n, bridgeMAC: b.MAC.String(), home: home || m.leftFrom(uuid, n), networks: b.Prefixes})
	}
	return all, nil
}

// leftFrom reports whether a VM has left this host from the same bridge, where it
// was at home: the bridge itself need have no address.
func (m *Manager) leftFrom(uuid string, n NIC) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range m.redirects {
		if x.UUID == uuid && x.Role == Source && slices.ContainsFunc(x.NICs, func(o nic) bool {
			return strings.EqualFold(o.MAC, n.MAC) && o.Bridge == n.Bridge && o.Served == ""
		}) {
			return true
		}
	}
	return false
}

// map1to1 chooses a free address of the pool for each foreign one of the VM, of
// its bridge's own network if the pool has one. Called with the lock held.
func (m *Manager) map1to1(nics []hostNIC) (map[netip.Addr]netip.Addr, error) {
	hosts, err := m.reserved("", netip.Addr{})
	if err != nil {
		return nil, err
	}
	taken := map[netip.Addr]bool{}
	for a := range hosts {
		taken[a] = true
	}
	for _, x := range m.redirects {
		for _, to := range x.Mapped {
			taken[to] = true
		}
	}
	for _, n := range nics {
		known, err := m.net.Neighbours(n.Bridge)
		if err != nil {
			return nil, err
		}
		for a := range known {
			taken[a] = true
		}
	}
	mapped := map[netip.Addr]netip.Addr{}
	for _, n := range foreignNICs(nics) {
		pool := append(within(m.Pool, n.networks), m.Pool...)
		for _, a := range n.Addresses {
			to, ok := free(pool, a.Is4(), taken)
			if !ok {
				return nil, fmt.Errorf("no free address of the pool for %s", a)
			}
			taken[to], mapped[a] = true, to
		}
	}
	return mapped, nil
}

// within are the parts of a pool that belong to one of the networks.
func within(pool, networks []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(pool), func(p netip.Prefix) bool {
		return !slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Bits() <= p.Bits() && n.Contains(p.Addr()) })
	})
}

// free finds the first address of a family that is not taken. Those that a
// network keeps for itself are left out.
func free(pool []netip.Prefix, v4 bool, taken map[netip.Addr]bool) (netip.Addr, bool) {
	for _, p := range pool {
		if p.Addr().Is4() != v4 {
			continue
		}
		const most = 1 << 16
		a := p.Addr()
		for range most {
			if !p.Contains(a) {
				break
			}
			if !taken[a] && (p.Bits() >= a.BitLen()-1 || a != p.Addr() && (!v4 || p.Contains(a.Next()))) {
				return a, true
			}
			a = a.Next()
		}
	}
	return netip.Addr{}, false
}

// Serve carries out an operation that the source of an arriving VM asks for.
func (m *Manager) Serve(ctx context.Context, a Arrival, op string, body []byte) (any, error) {
	switch op {
	case opOpen:
		r, err := decode[openRequest](body)
		if err == nil {
			err = r.validate()
		}
		if err != nil {
			return nil, err
		}
		return m.serveOpen(ctx, a, r, "")
	case opResize:
		r, err := decode[resizeRequest](body)
		if err == nil && (r.MTU < minMTU || r.MTU > maxMTU) {
			err = fmt.Errorf("tunnel MTU %d is out of bounds", r.MTU)
		}
		if err != nil {
			return nil, err
		}
		x := m.of(a.Move, a.Peer.ID)
		if x == nil {
			return nil, ErrUnknown
		}
		return struct{}{}, m.resize(ctx, x, r.MTU)
	case opArm:
		x := m.of(a.Move, a.Peer.ID)
		if x == nil {
			return nil, ErrUnknown
		}
		return m.serveArm(ctx, x, a)
	case opEnd:
		if x := m.of(a.Move, a.Peer.ID); x != nil {
			r, _ := decode[endRequest](body) // only a reason
			x.Undo(fmt.Sprintf("the source ends it: %.*s", maxText, r.Reason))
		}
		return struct{}{}, nil
	}
	return nil, fmt.Errorf("operation %.20q on a redirect is not known here: update this agent", op)
}

// of finds the redirect of a move with a peer.
func (m *Manager) of(move, peer string) *redirect {
	m.mu.Lock()
	defer m.mu.Unlock()
	if x := m.redirects[move]; x != nil && x.Peer == peer {
		return x
	}
	return nil
}

// serveOpen makes the end of the tunnel of a VM that arrives, or has arrived by
// the move that this redirect follows.
func (m *Manager) serveOpen(ctx context.Context, a Arrival, ask openRequest, follows string) (any, error) {
	_, local, _, err := m.net.RouteTo(a.Peer.Address)
	if err != nil {
		return nil, err
	}
	if err := m.checkClaims(a.UUID, ask.NICs, a.Peer.Address); err != nil {
		return nil, err
	}
	here, err := m.place(a.UUID, ask.NICs, a.NICs)
	if err != nil {
		return nil, err
	}
	r := &record{Move: a.Move, VM: a.Name, UUID: a.UUID, Site: a.Peer.Site, Peer: a.Peer.ID, Role: Destination, State: Opening,
		Options: ask.Options, Kind: ask.Kind, Device: deviceName(a.Peer.ID, ask.Kind), Local: local, Remote: a.Peer.Address, MTU: ask.MTU, Began: time.Now(),
		Vouched: ask.Vouched, Follows: follows}
	r.setNICs(here)
	if r.Mode = m.mode(ask.Options); r.home() {
		r.Mode = Keep // at home it needs no others
	}
	if follows != "" {
		m.mu.Lock()
		if f := m.redirects[follows]; f != nil {
			r.Mode = f.Mode
		}
		m.mu.Unlock()
	}
	x, err := m.open(ctx, r)
	if err != nil {
		return nil, err
	}
	x.m.work.Go(func() { m.answerProbes(x) })
	return openReply{Outer: local}, nil
}

func (m *Manager) serveArm(ctx context.Context, x *redirect, a Arrival) (any, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.redirects[x.Move] != x {
		return nil, ErrUnknown // its move ended meanwhile
	}
	if x.State != Opening {
		return nil, fmt.Errorf("the redirect of %s is %s", x.Move, x.State)
	}
	nics := x.hostNICs()
	var err error
	if x.Mode == New && x.Follows == "" {
		if x.Mapped, err = m.map1to1(nics); err != nil {
			return nil, err
		}
	}
	egress := m.egress(x.Options)
	if x.home() {
		egress = EgressDirect
	}
	plan := planDestination(x.needs(egress))
	if plan.Stay, err = m.rememberSysctls(plan.Stay); err != nil {
		return nil, err
	}
	if plan.Arm, err = m.rememberSysctls(plan.Arm); err != nil {
		return nil, err
	}
	x.Plan.Stay, x.Plan.Arm, x.Plan.Switch = plan.Stay, plan.Arm, plan.Switch
	x.State = Armed
	if err := m.apply(ctx, x, slices.Concat(x.Plan.Stay, x.Plan.Arm)); err != nil {
		return nil, err
	}
	if err := x.respond(); err != nil {
		return nil, err
	}
	if x.Mode == New && x.Follows == "" {
		m.work.Go(x.findNames) // the old TTL passes while the VM still moves
	}
	return armReply{Mode: x.Mode, Mapped: x.Mapped}, nil
}

// Inquire serves an operation on the redirect of a move that is over, or on one
// that follows a VM that has moved on.
func (m *Manager) Inquire(ctx context.Context, peer Peer, move, op string, body []byte) (any, error) {
	if op == opOpen {
		r, err := decode[openRequest](body)
		if err == nil {
			err = r.validate()
		}
		if err != nil {
			return nil, err
		}
		return m.serveRepoint(ctx, peer, move, r)
	}
	x := m.of(move, peer.ID)
	if x == nil {
		return nil, ErrUnknown
	}
	if x.Follows != "" && !x.lives() {
		if op == opStand {
			return m.serveStand(x)
		}
		return m.Serve(ctx, Arrival{VM: VM{Move: move, Name: x.VM, UUID: x.UUID}, Peer: peer}, op, body)
	}
	switch op {
	case opSync:
		r, err := decode[syncRequest](body)
		if err != nil {
			return nil, err
		}
		return x.serveSync(r)
	case opEnd:
		if !x.lives() {
			return nil, ErrUnknown
		}
		if x.Role == Destination {
			x.finish("the source has removed it")
		} else {
			x.finish("the destination has removed it")
		}
		return struct{}{}, nil
	}
	return nil, fmt.Errorf("operation %.20q on a redirect is not known here: update this agent", op)
}

func (x *redirect) serveSync(r syncRequest) (any, error) {
	if x.Role != Destination || !x.tunnelledNow() {
		return nil, ErrUnknown
	}
	x.see.Lock()
	const longest = 365 * 24 * time.Hour
	x.peerIdle, x.peerSeen, x.peerWaits, x.lastSync = min(max(r.Idle, 0), longest), r.RouteSeen, bounded(r.Waits), time.Now()
	x.see.Unlock()
	if r.Draining && x.state() == Standing {
		x.Drain()
	}
	remove, waits := decide(x.situation())
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	x.see.Lock()
	defer x.see.Unlock()
	return syncReply{Remove: remove && len(x.peerWaits) == 0, Waits: append(waits, x.peerWaits...), Serving: x.servingLocked(), Flows: x.flows, Moved: x.movedOn()}, nil
}

// lives reports whether the redirect's move is over.
func (x *redirect) lives() bool {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	return x.living
}

func (x *redirect) tunnelledNow() bool {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	return x.tunnelled()
}

// servingLocked reports whether new packets find the VM here. Called with both locks held.
func (x *redirect) servingLocked() bool {
	return x.home() || len(x.Announced) > 0 && x.problems["BGP"] == ""
}

// Resuming is called right before the VM of a move runs here.
func (m *Manager) Resuming(move string) {
	m.mu.Lock()
	x := m.redirects[move]
	m.mu.Unlock()
	if x != nil {
		x.Resuming()
	}
}

// AddressesOf are the VM's addresses in the redirect of a move, and its new ones.
func (m *Manager) AddressesOf(move string) ([]netip.Addr, map[netip.Addr]netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if x := m.redirects[move]; x != nil {
		return x.addresses(), x.Mapped
	}
	return nil, nil
}
