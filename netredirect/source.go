package netredirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/wanmig/wanmig/netredirect/hostnet"
	"github.com/wanmig/wanmig/netredirect/neighbour"
)

// Caller asks the other side to serve an operation on the redirect of one move.
type Caller func(ctx context.Context, op string, request, reply any) error

// Peer is the other side of a redirect.
type Peer struct {
	Site    string
	ID      string
	Address netip.Addr // its outer address
}

// VM is what is redirected.
type VM struct {
	Move, Name, UUID string
}

// Ask makes what a destination has to know, and the findings at the source. nics
// are the VM's with the addresses known; peer is the destination's address.
func (m *Manager) Ask(o Options, uuid string, nics []NIC, peer netip.Addr) (Ask, []Finding) {
	if o.Kind == None {
		return Ask{Options: o}, nil
	}
	ask := Ask{UUID: uuid, Options: o, Kinds: m.kinds(o.Kind)}
	var findings []Finding
	var err error
	if _, ask.Outer, _, err = m.net.RouteTo(peer); err != nil {
		findings = append(findings, Finding{Check: "redirect", Problem: err.Error(), Remedy: "give the host a route to the destination"})
	}
	for _, n := range nics {
		bridge, err := m.bridge(n)
		switch {
		case err != nil:
			findings = append(findings, Finding{Check: "redirect", Problem: fmt.Sprintf("connections by %s break: %v", n.MAC, err),
				Remedy: "put the interface on a Linux bridge, or move its addresses by the hooks"})
			continue
		case len(n.Addresses) == 0:
			findings = append(findings, Finding{Check: "redirect", Problem: fmt.Sprintf("no address of %s is known: its connections break", n.MAC),
				Remedy: "name it with --address " + n.MAC + "=ADDRESS, or run a guest agent in the VM"})
			continue
		}
		if err := m.checkClaims(uuid, []NIC{n}, peer); err != nil {
			findings = append(findings, Finding{Check: "redirect", Problem: fmt.Sprintf("connections by it break: %v", err),
				Remedy: "name the VM's addresses with --address " + n.MAC + "=ADDRESS"})
			continue
		}
		n.Addresses, findings = m.routable(n, findings)
		if len(n.Addresses) == 0 {
			continue
		}
		for _, p := range bridge.Prefixes {
			if slices.ContainsFunc(n.Addresses, p.Contains) && !p.Addr().IsLinkLocalUnicast() {
				n.Gateways = append(n.Gateways, p.Addr())
			}
		}
		n.Served = m.served(n.MAC)
		ask.NICs = append(ask.NICs, n)
	}
	return ask, append(findings, m.hostFindings()...)
}

// routable leaves the addresses that this host can forward.
func (m *Manager) routable(n NIC, findings []Finding) ([]netip.Addr, []Finding) {
	forward6, err := m.net.Sysctl("net/ipv6/conf/all/forwarding")
	if err == nil && forward6 != "0" {
		return n.Addresses, findings
	}
	left := slices.DeleteFunc(slices.Clone(n.Addresses), netip.Addr.Is6)
	if len(left) < len(n.Addresses) {
		findings = append(findings, Finding{Check: "redirect", Problem: fmt.Sprintf("%s does not forward IPv6: the VM's IPv6 connections break", m.Site),
			Remedy: "sysctl -w net.ipv6.conf.all.forwarding=1"})
	}
	return left, findings
}

// hostFindings are what in this host's firewall may stop redirected packets.
func (m *Manager) hostFindings() []Finding {
	if on, err := m.net.Sysctl("net/ipv4/conf/all/forwarding"); err == nil && on == "0" {
		return []Finding{{Check: "redirect", Problem: "IPv4 forwarding is off at " + m.Site + ": only what comes by the tunnel will reach the VM",
			Remedy: "sysctl -w net.ipv4.ip_forward=1"}}
	}
	drops, err := m.net.ForwardPolicyDrops(m.ctx)
	switch {
	case errors.Is(err, hostnet.ErrNoNFT):
		return []Finding{{Check: "redirect", Problem: err.Error(), Remedy: "apt-get install nftables, or --redirect none"}}
	case err != nil:
		return []Finding{{Check: "redirect", Problem: err.Error(), Remedy: "look at nft list ruleset at " + m.Site}}
	case len(drops) > 0:
		return []Finding{{Check: "redirect", Problem: fmt.Sprintf("%s drops what no rule of it accepts, at %s", drops[0], m.Site),
			Remedy: `let it accept iifname "wm*" and oifname "wm*"`}}
	}
	return nil
}

// bridge reads the bridge of a NIC, and refuses what can't be redirected on it.
func (m *Manager) bridge(n NIC) (hostnet.Bridge, error) {
	if n.Bridge == "" {
		return hostnet.Bridge{}, errors.New("it is on no Linux bridge")
	}
	b, err := m.net.Bridge(n.Bridge)
	if err != nil {
		return b, err
	}
	if n.Tap != "" && b.VLANAware {
		vlan, err := m.net.PortVLAN(n.Tap)
		if err != nil {
			return b, err
		}
		if vlan > 1 {
			return b, fmt.Errorf("bridge %s separates VLANs and %s is in VLAN %d: only a bridge of one VLAN can be redirected", n.Bridge, n.Tap, vlan)
		}
	}
	return b, nil
}

// kinds are those that may be tried for what was asked for.
func (m *Manager) kinds(k Kind) []Kind {
	switch k {
	case None:
		return nil
	case Auto:
		return Kinds
	}
	return []Kind{k}
}

// Begin makes a redirect ready at both hosts, without sending anything through
// it: a tunnel that is seen to carry packets, and everything but the switch. On
// an error nothing is left of it.
func (m *Manager) Begin(ctx context.Context, vm VM, peer Peer, ask Ask, offer Offer, call Caller) (*redirect, error) {
	if len(ask.NICs) == 0 {
		return nil, errors.New("no address of the VM can be redirected")
	}
	if err := offer.Validate(); err != nil {
		return nil, err
	}
	var failed []error
	for _, kind := range ask.Kinds {
		if !slices.Contains(offer.Kinds, kind) {
			failed = append(failed, fmt.Errorf("%s: not at the destination", kind))
			continue
		}
		if offer.NAT && kind != QUIC {
			failed = append(failed, fmt.Errorf("%s: there is address translation on the way", kind))
			continue
		}
		x, err := m.try(ctx, vm, peer, ask, offer, kind, call)
		if err == nil {
			return x, nil
		}
		failed = append(failed, fmt.Errorf("%s: %w", kind, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("no tunnel to %s carries packets: %w", peer.Site, errors.Join(failed...))
}

// Overheads of a packet in a tunnel, in bytes.
const (
	overhead4 = 20 // IPv4 (RFC 2003)
	overhead6 = 40 // IPv6 (RFC 2473)
)

func (m *Manager) try(ctx context.Context, vm VM, peer Peer, ask Ask, offer Offer, kind Kind, call Caller) (_ *redirect, err error) {
	_, local, path, err := m.net.RouteTo(peer.Address)
	if err != nil {
		return nil, err
	}
	mtu := tunnelMTU(kind, peer.Address, path)
	r := &record{Move: vm.Move, VM: vm.Name, UUID: vm.UUID, Site: peer.Site, Peer: peer.ID, Role: Source, State: Opening, Options: ask.Options,
		Kind: kind, Device: deviceName(peer.ID, kind), Local: local, Remote: peer.Address, MTU: mtu, Began: time.Now()}
	var nics []hostNIC
	for _, n := range ask.NICs {
		b, err := m.bridge(n)
		if err != nil {
			return nil, err
		}
		nics = append(nics, hostNIC{NIC: n, bridgeMAC: b.MAC.String()})
	}
	r.setNICs(nics)
	made, err := m.open(ctx, r)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			_ = call(clean, opEnd, endRequest{"the source could not open it"}, &struct{}{}) // the session's end says it too
			made.Undo(err.Error())
		}
	}()
	m.mu.Lock()
	vouched := m.vouched(vm.UUID)
	m.mu.Unlock()
	var opened openReply
	if err := call(ctx, opOpen, openRequest{Kind: kind, Outer: local, MTU: mtu, Options: ask.Options, NICs: ask.NICs, UUID: vm.UUID, Vouched: vouched}, &opened); err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.dial(&made.record)
	m.mu.Unlock()
	if err := m.fit(ctx, made, call); err != nil {
		return nil, err
	}
	if err := m.arm(ctx, made); err != nil {
		return nil, err
	}
	var armed armReply
	if err := call(ctx, opArm, armRequest{}, &armed); err != nil {
		return nil, err
	}
	if err := armed.validate(); err != nil {
		return nil, err
	}
	made.change(func(r *record) { r.State, r.Mode, r.Mapped = Armed, armed.Mode, armed.Mapped })
	m.Log.Info("redirect ready", "move", made.Move, "vm", made.VM, "to", peer.Site, "kind", kind, "mtu", made.MTU)
	return made, nil
}

// tunnelMTU is the longest packet inside a tunnel over a path.
func tunnelMTU(kind Kind, outer netip.Addr, path int) int {
	if path < minMTU || path > maxMTU {
		path = 1500
	}
	switch {
	case kind == QUIC:
		return 1280 // until the path's is known: what IPv6 needs
	case outer.Is6():
		return path - overhead6
	}
	return path - overhead4
}

// open makes this end of the tunnel.
func (m *Manager) open(ctx context.Context, r *record) (*redirect, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	x, err := m.add(r)
	if err != nil {
		return nil, err
	}
	for _, other := range m.redirects { // a tunnel that stands has its size
		if other != x && other.Device == x.Device && other.tunnelled() {
			x.MTU = other.MTU
		}
	}
	x.Plan.Tunnel = planTunnel(tunnelFacts{kind: x.Kind, device: x.Device, local: x.Local, remote: x.Remote, mtu: x.MTU})
	if err = m.journal.put(&x.record); err == nil {
		err = m.carry(&x.record)
	}
	if err == nil {
		m.openGates()
		err = m.apply(ctx, x, x.Plan.Tunnel)
	}
	if err != nil {
		return nil, errors.Join(err, m.removeLocked(x, "its tunnel was not made"))
	}
	return x, nil
}

// enoughQUIC is a datagram's size that is worth no longer waiting for more: a path
// of 1500 bytes gives about 1395.
const enoughQUIC = 1380

// fit finds the longest packets that come through the tunnel, and has both ends
// use that.
func (m *Manager) fit(ctx context.Context, x *redirect, call Caller) error {
	if m.shared(x) {
		return nil // it carries packets already, of a size that fits
	}
	sizes := []int{x.MTU, 1400, 1280}
	if x.Kind == QUIC {
		wait, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		longest, err := m.tunnel(x.Device).awaitConnection(wait, enoughQUIC)
		if err != nil {
			return err
		}
		sizes = []int{longest, 1280}
	}
	for i, size := range sizes {
		if size > sizes[0] && x.Kind != QUIC || i > 0 && size >= sizes[i-1] {
			continue
		}
		if size != x.MTU {
			if err := call(ctx, opResize, resizeRequest{size}, &struct{}{}); err != nil {
				return err
			}
			if err := m.resize(ctx, x, size); err != nil {
				return err
			}
		}
		answered, err := m.probe(ctx, x, size)
		if err != nil {
			return err
		}
		if answered {
			return nil
		}
	}
	return errors.New("no packet comes back through it: a firewall on the way may drop it")
}

// shared reports whether another redirect stands on the same tunnel.
func (m *Manager) shared(x *redirect) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.redirects {
		if o != x && o.Device == x.Device && (o.State == Standing || o.State == Draining) {
			return true
		}
	}
	return false
}

func (m *Manager) tunnel(device string) *carried {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tunnels[device]
}

// resize changes the MTU of the tunnel's device, for all that share it.
func (m *Manager) resize(ctx context.Context, x *redirect, mtu int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.redirects {
		if o.Device != x.Device || !o.tunnelled() {
			continue
		}
		o.MTU = mtu
		o.Plan.Tunnel = planTunnel(tunnelFacts{kind: o.Kind, device: o.Device, local: o.Local, remote: o.Remote, mtu: mtu})
		if err := m.journal.put(&o.record); err != nil {
			return err
		}
	}
	if t := m.tunnels[x.Device]; t != nil {
		return t.user.SetMTU(mtu)
	}
	return m.net.Apply(ctx, x.Plan.Tunnel[0])
}

// arm makes everything of a source but the switch.
func (m *Manager) arm(ctx context.Context, x *redirect) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	plan := planSource(x.Slot, x.Priority, x.Device, x.hostNICs())
	var err error
	if plan.Arm, err = m.rememberSysctls(plan.Arm); err != nil {
		return err
	}
	x.Plan.Arm, x.Plan.Switch = plan.Arm, plan.Switch
	return m.apply(ctx, x, x.Plan.Arm)
}

// Preview is what the source would type for a redirect.
func (m *Manager) Preview(ask Ask, peer netip.Addr) []string {
	if len(ask.NICs) == 0 || len(ask.Kinds) == 0 {
		return nil
	}
	kind := ask.Kinds[0]
	device := deviceName("", kind)
	var nics []hostNIC
	for _, n := range ask.NICs {
		b, err := m.bridge(n)
		if err != nil {
			continue // a finding of Ask
		}
		nics = append(nics, hostNIC{NIC: n, bridgeMAC: b.MAC.String()})
	}
	plan := planSource(0, topPriority, device, nics)
	plan.Tunnel = planTunnel(tunnelFacts{kind: kind, device: device, local: ask.Outer, remote: peer, mtu: tunnelMTU(kind, peer, 0)})
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.typed(plan)
}

// typed is a plan that is not made, as a network engineer would type it. Called
// with the lock held.
func (m *Manager) typed(p Plan) []string {
	for _, part := range []*[]hostnet.Step{&p.Stay, &p.Arm} {
		if known, err := m.rememberSysctls(*part); err == nil {
			*part = known
		}
	}
	return p.text()
}

// served is the MAC at which a VM that is foreign here finds all of its
// neighbours, or "".
func (m *Manager) served(mac string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range m.redirects {
		if x.Role != Destination {
			continue
		}
		for _, n := range x.NICs {
			if strings.EqualFold(n.MAC, mac) && !n.Home {
				return n.BridgeMAC
			}
		}
	}
	return ""
}

// Known are the addresses of a VM's interface that an earlier redirect to this
// host serves here.
func (m *Manager) Known(uuid, mac string) []netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range m.redirects {
		if x.UUID != uuid || x.Role != Destination {
			continue
		}
		for _, n := range x.NICs {
			if strings.EqualFold(n.MAC, mac) {
				return n.Addresses
			}
		}
	}
	return nil
}

// Observed are the addresses of a VM's interface that this host sees: those of
// its neighbour table, and those that the VM uses within a moment.
func (m *Manager) Observed(ctx context.Context, n NIC) []netip.Addr {
	var all []netip.Addr
	if n.Bridge == "" || n.Tap == "" {
		return nil
	}
	mac, err := parseMAC(n.MAC)
	if err != nil {
		return nil
	}
	bridge, err := m.net.Bridge(n.Bridge)
	if err != nil {
		return nil
	}
	// A VM that routes sends for others, whose addresses are not its own.
	add := func(a netip.Addr) {
		if validateAddress(a) == nil && slices.ContainsFunc(bridge.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) }) {
			all = append(all, a)
		}
	}
	if known, err := m.net.Neighbours(n.Bridge); err == nil {
		for a, at := range known {
			if at.String() == mac.String() {
				add(a)
			}
		}
	}
	o, err := neighbour.Observe(n.Tap, mac)
	if err != nil {
		m.Log.Debug("interface not observed", "tap", n.Tap, "error", err)
		return all
	}
	defer o.Close()
	const moment = time.Second
	select {
	case <-ctx.Done():
	case <-time.After(moment):
	}
	for _, a := range o.Addresses() {
		add(a)
	}
	return all
}
