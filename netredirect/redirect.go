package netredirect

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Kind is how packets cross to the destination.
type Kind string

const (
	Auto     Kind = "auto"      // the first of the others, in their order, that carries packets
	IPIP     Kind = "ipip"      // the kernel's IP-in-IP (RFC 2003, 4213, 2473)
	IPIPUser Kind = "ipip-user" // the same bytes on the wire, made by the agent
	QUIC     Kind = "quic"      // QUIC datagrams: encrypted, and through NAT
	None     Kind = "none"      // no redirection
)

// Kinds are all there are, in the order in which Auto tries them.
var Kinds = []Kind{IPIP, IPIPUser, QUIC}

// Valid reports whether k can be asked for.
func (k Kind) Valid() bool { return k == Auto || k == None || slices.Contains(Kinds, k) }

// Mode is what becomes of the VM's addresses.
type Mode string

const (
	Keep Mode = "keep" // the VM keeps its addresses; routes to them move (BGP)
	New  Mode = "new"  // clients find the VM at new addresses (DNS), mapped 1:1 to its own
)

// Egress is the way of the connections that the VM itself opens while its
// tunnel stands, and of what can't be told from them.
type Egress string

const (
	EgressTunnel Egress = "tunnel" // back through the source: symmetric for firewalls there
	EgressDirect Egress = "direct" // out of the destination
)

// State is where a redirect stands at one of its hosts.
type State string

const (
	Opening  State = "opening"  // the tunnel is made and probed
	Armed    State = "armed"    // everything stands but the switch
	Standing State = "standing" // the VM's packets take the tunnel
	Draining State = "draining" // an operator said that nothing more moves: goes when unused
	Resident State = "resident" // the tunnel is gone; the destination serves the VM's foreign addresses
)

var states = []State{Opening, Armed, Standing, Draining, Resident}

// Role is the side of a redirect.
type Role string

const (
	Source      Role = "source"
	Destination Role = "destination"
)

// NIC is a network interface of the VM at one host.
type NIC struct {
	MAC       string       `json:"mac"`
	Bridge    string       `json:"bridge"`        // Linux bridge at this host
	Tap       string       `json:"tap,omitempty"` // the VM's port of it
	Addresses []netip.Addr `json:"addresses"`
	// Gateways are the source host's own addresses on the bridge: often the VM's
	// gateway, whose entry in the VM's neighbour table is corrected at its resume.
	Gateways []netip.Addr `json:"gateways,omitempty"`
	// Served is the MAC that the source host has answered the VM with for all of
	// its neighbours, where it was foreign there.
	Served string `json:"served,omitempty"`
}

// Limits of what a peer may ask for.
const (
	maxNICs      = 16
	maxAddresses = 64 // of a VM
	maxNames     = 64
	maxName      = 255 // RFC 1035
)

func validateNICs(nics []NIC) error {
	if len(nics) > maxNICs {
		return fmt.Errorf("%d network interfaces: at most %d are redirected", len(nics), maxNICs)
	}
	n := 0
	for _, nic := range nics {
		if _, err := parseMAC(nic.MAC); err != nil {
			return err
		}
		if nic.Served != "" {
			if _, err := parseMAC(nic.Served); err != nil {
				return err
			}
		}
		n += len(nic.Addresses)
		if n > maxAddresses || len(nic.Gateways) > maxAddresses {
			return fmt.Errorf("more than %d addresses", maxAddresses)
		}
		for _, a := range slices.Concat(nic.Addresses, nic.Gateways) {
			if err := validateAddress(a); err != nil {
				return err
			}
		}
	}
	return nil
}

// validateAddress refuses what must never be routed into a tunnel.
func validateAddress(a netip.Addr) error {
	switch {
	case !a.IsValid() || a.Zone() != "" || a.Is4In6():
		return fmt.Errorf("%q is not a plain address", a)
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("%s is no address of a VM that can be redirected", a)
	}
	return nil
}

// parseMAC reads an Ethernet address of a single station, written as nft and ip
// write it.
func parseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	if err != nil || !strings.EqualFold(mac.String(), s) || len(mac) != 6 || mac[0]&1 != 0 || bytes.Count(mac, []byte{0}) == 6 {
		return nil, fmt.Errorf("%.40q is no Ethernet address of a station", s)
	}
	return mac, nil
}

// addresses are all of a VM's.
func addresses(nics []NIC) []netip.Addr {
	var all []netip.Addr
	for _, n := range nics {
		all = append(all, n.Addresses...)
	}
	return all
}

// Finding is what keeps connections from going on, or what they will meet.
type Finding struct {
	Check   string `json:"check"`
	Problem string `json:"problem"`
	Remedy  string `json:"remedy"`
	Fatal   bool   `json:"fatal"` // what was asked for can't be done
}

// Options are what an operator or the configuration asks of a redirect.
type Options struct {
	Kind     Kind          `json:"kind"`
	Mode     Mode          `json:"mode,omitempty"` // "": the destination's configuration decides
	Egress   Egress        `json:"egress,omitempty"`
	Max      time.Duration `json:"max_ns"`
	Quiet    time.Duration `json:"quiet_ns"`
	LowerTTL bool          `json:"lower_ttl,omitempty"`
	Names    []string      `json:"names,omitempty"` // DNS names of the VM beside those that PTR records tell
}

// Validate bounds options.
func (o Options) Validate() error {
	switch {
	case !o.Kind.Valid():
		return fmt.Errorf("redirect %q: there are auto, ipip, ipip-user, quic and none", o.Kind)
	case o.Mode != "" && o.Mode != Keep && o.Mode != New:
		return fmt.Errorf("addresses %q: there are keep and new", o.Mode)
	case o.Egress != "" && o.Egress != EgressTunnel && o.Egress != EgressDirect:
		return fmt.Errorf("egress %q: there are tunnel and direct", o.Egress)
	case o.Max < 0 || o.Max > 365*24*time.Hour:
		return fmt.Errorf("the tunnel's longest time is %v: up to a year can be asked for", o.Max)
	case o.Quiet < 0 || o.Quiet > 24*time.Hour:
		return fmt.Errorf("the quiet time is %v: up to a day can be asked for", o.Quiet)
	case len(o.Names) > maxNames:
		return fmt.Errorf("%d DNS names: at most %d", len(o.Names), maxNames)
	}
	for _, n := range o.Names {
		if len(n) > maxName {
			return fmt.Errorf("DNS name %.40q…: %d characters, at most %d", n, len(n), maxName)
		}
	}
	return nil
}
