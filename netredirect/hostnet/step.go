package hostnet

import (
	"context"
	"errors"
	"net/netip"
)

// Protocol marks the routes, rules and neighbours of wanmig in the kernel, as
// RTA_PROTOCOL, FRA_PROTOCOL and NDA_PROTOCOL. Addresses have it as metric.
const Protocol = 119

// alias marks the devices of wanmig.
const alias = "wanmig"

// tablePrefix begins the name of each nftables table of wanmig.
const tablePrefix = "wanmig_"

// Kinds of Device.
const (
	KindIPIP   = "ipip"   // IPv4 in IPv4
	KindSit    = "sit"    // IPv4 and IPv6 in IPv4
	KindIP6Tnl = "ip6tnl" // IPv4 and IPv6 in IPv6
	KindVLAN   = "vlan"   // one VLAN of Parent
	KindTUN    = "tun"    // carried by wanmig itself
)

var (
	// ErrTaken is returned when something that is not the step's own stands
	// where it would go.
	ErrTaken = errors.New("taken by something else")
	// ErrNoNFT is returned when the nft program is not there.
	ErrNoNFT = errors.New("nft(8) not found: install the package nftables")
	// ErrNoKernelSupport is returned when the kernel has no devices of a kind,
	// not even as a module.
	ErrNoKernelSupport = errors.New("not supported by the running kernel")
	// ErrInvalid is returned when a step says what no step of wanmig would.
	ErrInvalid = errors.New("invalid step")
)

// A Step is one reversible change of the host's network. Exactly one field is
// set.
type Step struct {
	Device    *Device    `json:"device,omitempty"`
	Sysctl    *Sysctl    `json:"sysctl,omitempty"`
	Address   *Address   `json:"address,omitempty"`
	Rule      *Rule      `json:"rule,omitempty"`
	Route     *Route     `json:"route,omitempty"`
	Neighbour *Neighbour `json:"neighbour,omitempty"`
	FDB       *FDB       `json:"fdb,omitempty"`
	Table     *Table     `json:"table,omitempty"`
}

// A Device is a network device, which Apply sets up. One of KindTUN is made by
// the program that carries its packets and goes with it: Apply only makes sure
// that its name is not in other use, and Revert does nothing.
type Device struct {
	Name   string     `json:"name"`
	Kind   string     `json:"kind"`
	Local  netip.Addr `json:"local,omitzero"`  // of a tunnel
	Remote netip.Addr `json:"remote,omitzero"` // of a tunnel
	MTU    int        `json:"mtu,omitempty"`   // bytes; 0: the kernel's choice
	TTL    int        `json:"ttl,omitempty"`   // of a tunnel's outer packets; 0: that of the inner ones
	Parent string     `json:"parent,omitempty"`
	VLAN   int        `json:"vlan,omitempty"`
}

// A Sysctl is a number below /proc/sys/net. Apply sets it to Value, whatever it
// is; Revert writes Was back, only while it is still Value. The kernel copies
// net/ipv6/conf/all/forwarding to all devices, at Revert as well.
type Sysctl struct {
	Key   string `json:"key"` // net/ipv4/conf/br0/forwarding
	Value string `json:"value"`
	Was   string `json:"was"`
}

// An Address is one of the host's own, of full length: one with a shorter
// prefix could take others with it when it goes. It brings no route but to
// itself, is not checked for duplicates, and the host does not choose it as the
// source of connections of its own (IPv6). Only addresses of 192.0.0.0/29 may be
// on several devices.
type Address struct {
	Dev    string       `json:"dev"`
	Prefix netip.Prefix `json:"prefix"`
}

// A Rule sends packets to a routing table. A zero field is not matched; From
// and To tell the family, one of them may be 0.0.0.0/0 or ::/0 to do so.
type Rule struct {
	Priority int          `json:"priority"`
	From     netip.Prefix `json:"from,omitzero"`
	To       netip.Prefix `json:"to,omitzero"`
	IIf      string       `json:"iif,omitempty"`
	Mark     uint32       `json:"mark,omitempty"`
	Mask     uint32       `json:"mask,omitempty"`
	Table    int          `json:"table"`
}

// A Route is an entry of a routing table. Without Via the destination is on the
// link. Source is preferred for packets of the host itself.
type Route struct {
	Table  int          `json:"table"`
	Dst    netip.Prefix `json:"dst"`
	Dev    string       `json:"dev"`
	Via    netip.Addr   `json:"via,omitzero"`
	Source netip.Addr   `json:"source,omitzero"`
	MTU    int          `json:"mtu,omitempty"` // bytes; 0: that of the device
}

// A Neighbour is a permanent entry of the ARP or NDP table or, without MAC, an
// address that the host answers for on Dev.
type Neighbour struct {
	Dev   string     `json:"dev"`
	IP    netip.Addr `json:"ip"`
	MAC   string     `json:"mac,omitempty"`
	Proxy bool       `json:"proxy,omitempty"`
}

// An FDB step tells a bridge at which of its ports a MAC address is. The entry
// does not move to a port where the address is heard. VLAN is 0 at a bridge that
// does not tell VLANs apart.
type FDB struct {
	Dev  string `json:"dev"`
	MAC  string `json:"mac"`
	VLAN int    `json:"vlan,omitempty"`
}

// A Table is an nftables table. Body is what stands between its braces.
type Table struct {
	Family string `json:"family"` // ip, ip6, inet, bridge or netdev
	Name   string `json:"name"`   // wanmig_…
	Body   string `json:"body"`
}

// change is what each kind of step can do. All but validate expect a step that
// has been validated.
type change interface {
	validate() error
	command() string
	undo() string
	apply(context.Context, *Host) error
	revert(context.Context, *Host) error
}

// change returns the field that is set.
func (s Step) change() (change, error) {
	var set []change
	if s.Device != nil {
		set = append(set, s.Device)
	}
	if s.Sysctl != nil {
		set = append(set, s.Sysctl)
	}
	if s.Address != nil {
		set = append(set, s.Address)
	}
	if s.Rule != nil {
		set = append(set, s.Rule)
	}
	if s.Route != nil {
		set = append(set, s.Route)
	}
	if s.Neighbour != nil {
		set = append(set, s.Neighbour)
	}
	if s.FDB != nil {
		set = append(set, s.FDB)
	}
	if s.Table != nil {
		set = append(set, s.Table)
	}
	if len(set) != 1 {
		return nil, invalid("%d changes in one step, not 1", len(set))
	}
	return set[0], nil
}

// Validate returns an error that wraps ErrInvalid for a step that is not safe to
// apply or to revert. A journal is a file: what it says is not believed.
func (s Step) Validate() error {
	c, err := s.change()
	if err != nil {
		return err
	}
	return c.validate()
}

// String returns the command that makes the change, as typed in a shell; of
// several lines for some kinds. An invalid step is a comment.
func (s Step) String() string {
	return s.typed(change.command)
}

// UndoString returns the command that takes the change back.
func (s Step) UndoString() string {
	return s.typed(change.undo)
}

func (s Step) typed(command func(change) string) string {
	if err := s.Validate(); err != nil {
		return "# " + err.Error()
	}
	c, _ := s.change()
	return command(c)
}
