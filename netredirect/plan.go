package netredirect

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/wanmig/wanmig/netredirect/hostnet"
)

// Plan is every change of a host's network that one redirect makes there. It is
// in the journal before the first of them is made.
type Plan struct {
	Tunnel []hostnet.Step `json:"tunnel,omitempty"` // with the tunnel, which redirects to the same site share
	Stay   []hostnet.Step `json:"stay,omitempty"`   // destination: for as long as the VM's foreign addresses live there
	Arm    []hostnet.Step `json:"arm,omitempty"`    // before the stop, for as long as the tunnel stands
	Switch []hostnet.Step `json:"switch,omitempty"` // at the stop (source) or the resume (destination)
}

// Routing tables, rules and marks of redirects. Each redirect has a slot at its
// host, which gives it numbers of its own.
const (
	maxSlots     = 1024
	firstTable   = 77000
	topPriority  = 7000 // of the first redirect's rules; later ones come before it
	rulesEach    = 4
	markOurs     = 0x40000000 // set in the mark of every packet that a redirect knows
	markMask     = 0x7ff00000 // the bits of packet and connection marks that are ours
	markSlotBits = 20
)

func tableOf(slot int) int   { return firstTable + slot }
func markOf(slot int) uint32 { return markOurs | uint32(slot)<<markSlotBits }

// hostNIC is a NIC of the VM with what its host knows of the bridge.
type hostNIC struct {
	NIC
	bridgeMAC string
	home      bool           // destination: the bridge's own network has the VM's addresses
	networks  []netip.Prefix // destination: of the bridge
}

// tunnelFacts are a tunnel's ends, as its host sees them.
type tunnelFacts struct {
	kind          Kind
	device        string
	local, remote netip.Addr
	mtu           int
}

// address is that of the tunnel's device, which no packet ever has: one of
// RFC 7335.
func (t tunnelFacts) address() netip.Addr {
	if t.local.Less(t.remote) {
		return probeDestination[0]
	}
	return probeSource[0]
}

// planTunnel makes the tunnel's device and keeps everything out of it that no
// redirect has let in: no nested tunnels, nothing for this host itself.
func planTunnel(t tunnelFacts) []hostnet.Step {
	kind := "tun"
	if t.kind == IPIP {
		kind = "sit" // in the mode that carries IPv4 and IPv6
		if t.local.Is6() {
			kind = "ip6tnl"
		}
	}
	device := &hostnet.Device{Name: t.device, Kind: kind, MTU: t.mtu}
	if t.kind == IPIP {
		device.Local, device.Remote, device.TTL = t.local, t.remote, 64
	}
	return []hostnet.Step{
		{Device: device},
		{Sysctl: &hostnet.Sysctl{Key: "net/ipv4/conf/" + t.device + "/forwarding", Value: "1", Was: "0"}},
		// Loose, as clients' addresses have their routes elsewhere; a device without
		// an address would fail that, too (net/ipv4/fib_frontend.c).
		{Sysctl: &hostnet.Sysctl{Key: "net/ipv4/conf/" + t.device + "/rp_filter", Value: "2", Was: "0"}},
		{Address: &hostnet.Address{Dev: t.device, Prefix: host(t.address())}},
		{Table: tunnelTable(t.device)},
	}
}

// planSource sends what is for the VM into the tunnel, from the switch on.
func planSource(slot, priority int, device string, nics []hostNIC) Plan {
	var p Plan
	p.Arm = append(p.Arm, hostnet.Step{Table: sourceTable(slot, device, addressesOf(nics))})
	for _, n := range nics {
		p.Arm = append(p.Arm, bridgeSysctls(n, true)...)
		for _, a := range n.Addresses {
			p.Arm = append(p.Arm, hostnet.Step{Route: &hostnet.Route{Table: tableOf(slot), Dst: host(a), Dev: device}})
		}
	}
	// The bridge first: neighbours that still have the VM's MAC are turned at once.
	p.Switch = append(p.Switch, hostnet.Step{Table: turnTable(slot, nics)})
	for _, n := range nics {
		for _, a := range n.Addresses {
			p.Switch = append(p.Switch,
				hostnet.Step{Rule: &hostnet.Rule{Priority: priority, To: host(a), Table: tableOf(slot)}},
				hostnet.Step{Neighbour: &hostnet.Neighbour{Dev: n.Bridge, IP: a, Proxy: true}})
		}
	}
	return p
}

// destinationNeeds are what a destination's plan is made from.
type destinationNeeds struct {
	slot, priority int
	device         string
	nics           []hostNIC
	egress         Egress
	mapped         map[netip.Addr]netip.Addr // new address of each of the VM's, of mode New
	follows        bool                      // another redirect serves the VM's foreign addresses
}

// planDestination hands what comes out of the tunnel to the VM's tap, where it
// waits for the VM; and serves the VM's addresses, which are foreign there.
func planDestination(d destinationNeeds) Plan {
	var p Plan
	table := tableOf(d.slot)
	for _, n := range d.nics {
		own := &p.Stay // what the VM needs for as long as it lives here
		if n.home || d.follows {
			own = &p.Arm
		}
		served := d.follows && !n.home
		if !served {
			*own = append(*own, bridgeSysctls(n, false)...)
			*own = append(*own, hostnet.Step{FDB: &hostnet.FDB{Dev: n.Tap, MAC: n.MAC}})
		}
		for _, a := range n.Addresses {
			if !served {
				*own = append(*own, hostnet.Step{Neighbour: &hostnet.Neighbour{Dev: n.Bridge, IP: a, MAC: n.MAC}})
			}
			*own = append(*own, hostnet.Step{Route: &hostnet.Route{Table: table, Dst: host(a), Dev: n.Bridge}})
			p.Arm = append(p.Arm, hostnet.Step{Rule: &hostnet.Rule{Priority: d.priority, IIf: d.device, To: host(a), Table: table}},
				hostnet.Step{Rule: &hostnet.Rule{Priority: d.priority + 1, From: host(a), Mark: markOf(d.slot), Mask: markMask, Table: table}})
			if !n.home {
				p.Switch = append(p.Switch, hostnet.Step{Rule: &hostnet.Rule{Priority: d.priority + 2, To: host(a), Table: table}})
			}
		}
	}
	for _, family := range families(addressesOf(d.nics)) {
		p.Arm = append(p.Arm, hostnet.Step{Route: &hostnet.Route{Table: table, Dst: family, Dev: d.device}})
	}
	p.Arm = append(p.Arm, hostnet.Step{Table: destinationTable(d)})
	if table := returnTable(d.slot, d.nics); table != nil {
		p.Arm = append(p.Arm, hostnet.Step{Table: table})
	}
	if d.follows {
		return p
	}
	if foreign := foreignNICs(d.nics); len(foreign) > 0 {
		p.Stay = append(p.Stay, hostnet.Step{Table: guestTable(d.slot, foreign)})
	}
	for _, n := range d.nics {
		for _, a := range n.Addresses {
			if to, ok := d.mapped[a]; ok {
				p.Stay = append(p.Stay, hostnet.Step{Address: &hostnet.Address{Dev: d.bridgeOf(to, n), Prefix: host(to)}})
			}
		}
	}
	if len(d.mapped) > 0 {
		p.Stay = append(p.Stay, hostnet.Step{Table: mappingTable(d)})
	}
	return p
}

// bridgeOf is where neighbours ask for a new address of a NIC: on the bridge whose
// network has it, be it another NIC's, or on the NIC's own.
func (d destinationNeeds) bridgeOf(to netip.Addr, n hostNIC) string {
	for _, o := range append([]hostNIC{n}, d.nics...) {
		if slices.ContainsFunc(o.networks, func(p netip.Prefix) bool { return p.Contains(to) }) {
			return o.Bridge
		}
	}
	return n.Bridge
}

// bridgeSysctls let the host forward on the bridge, and at the source answer
// for the VM there.
func bridgeSysctls(n hostNIC, answer bool) []hostnet.Step {
	set := func(key, value string) hostnet.Step {
		return hostnet.Step{Sysctl: &hostnet.Sysctl{Key: key, Value: value}}
	}
	// Without delay, or it answers up to 0.8 s late, as if it were one of many.
	const delay = "/proxy_delay"
	var steps []hostnet.Step
	if slices.ContainsFunc(n.Addresses, netip.Addr.Is4) {
		steps = append(steps, set("net/ipv4/conf/"+n.Bridge+"/forwarding", "1")) // that of IPv6 is the whole host's
		if answer {
			steps = append(steps, set("net/ipv4/neigh/"+n.Bridge+delay, "0"))
		}
	}
	if answer && slices.ContainsFunc(n.Addresses, netip.Addr.Is6) {
		steps = append(steps, set("net/ipv6/conf/"+n.Bridge+"/proxy_ndp", "1"), set("net/ipv6/neigh/"+n.Bridge+delay, "0"))
	}
	return steps
}

// steps are all of a plan in the order in which they are made.
func (p Plan) steps() []hostnet.Step { return slices.Concat(p.Tunnel, p.Stay, p.Arm, p.Switch) }

// text is the plan as a network engineer would type it.
func (p Plan) text() []string {
	var all []string
	for _, s := range p.steps() {
		all = append(all, s.String())
	}
	return all
}

func addressesOf(nics []hostNIC) []netip.Addr {
	var all []netip.Addr
	for _, n := range nics {
		all = append(all, n.Addresses...)
	}
	return all
}

func foreignNICs(nics []hostNIC) []hostNIC {
	return slices.DeleteFunc(slices.Clone(nics), func(n hostNIC) bool { return n.home })
}

// host is the prefix of one address.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// families are the default routes of the address families that occur.
func families(addrs []netip.Addr) []netip.Prefix {
	var all []netip.Prefix
	if slices.ContainsFunc(addrs, netip.Addr.Is4) {
		all = append(all, netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	if slices.ContainsFunc(addrs, netip.Addr.Is6) {
		all = append(all, netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	}
	return all
}

// deviceName is the name of the tunnel of a kind to a peer.
func deviceName(peer string, kind Kind) string {
	return fmt.Sprintf("wm%s%.8s", kind.letter(), digest(peer))
}
