package hypervisor

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// Interface is a network interface of a running or arriving domain, as its host
// sees it.
type Interface struct {
	MAC    string // lower case
	Type   string // "bridge", "network", "direct", "user", …
	Bridge string // the Linux bridge that it is on, "" when on none
	Tap    string // the host's device, "" while there is none
}

// NICs reads the interfaces of a domain that runs or is arriving.
func (h *Host) NICs(ctx context.Context, uuid string) ([]Interface, error) {
	var list []Interface
	err := h.onDomain(ctx, "read interfaces", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		live, err := l.DomainGetXMLDesc(d, 0)
		if err == nil {
			list, err = readInterfaces(l, live)
		}
		return err
	})
	return list, err
}

// PlannedNICs are the interfaces that a domain of this XML would have here.
func (h *Host) PlannedNICs(ctx context.Context, xml string) ([]Interface, error) {
	var list []Interface
	err := h.call(ctx, "read interfaces", func(l *libvirt.Libvirt) error {
		var err error
		list, err = readInterfaces(l, xml)
		for i := range list {
			list[i].Tap = "" // that of another host
		}
		return err
	})
	return list, err
}

func readInterfaces(l *libvirt.Libvirt, xml string) ([]Interface, error) {
	doc, err := parseXML(xml, "domain")
	if err != nil {
		return nil, err
	}
	var list []Interface
	for _, e := range devices(doc, "interface") {
		nic := readNIC(e)
		n := Interface{MAC: strings.ToLower(nic.MAC), Type: nic.Type, Tap: nic.Target}
		switch {
		case child(e, "virtualport") != nil: // Open vSwitch and others: no Linux bridge
		case nic.Type == "bridge":
			n.Bridge = nic.Source
		case nic.Type == "network":
			network, err := l.NetworkLookupByName(nic.Source)
			if hasCode(err, libvirt.ErrNoNetwork) {
				break // the checks tell
			}
			if err != nil {
				return nil, err
			}
			// A network of another kind has no bridge.
			if bridge, err := l.NetworkGetBridgeName(network); err == nil {
				n.Bridge = bridge
			}
		}
		list = append(list, n)
	}
	return list, nil
}

// AddressSource is where libvirt knows a domain's addresses from.
type AddressSource string

// In the order in which they are asked.
const (
	FromAgent AddressSource = "agent" // the guest agent
	FromLease AddressSource = "lease" // DHCP, of libvirt's own networks
	FromARP   AddressSource = "arp"   // the host's neighbour table
)

var addressSources = []struct {
	name   AddressSource
	number libvirt.DomainInterfaceAddressesSource
}{
	{FromAgent, libvirt.DomainInterfaceAddressesSrcAgent},
	{FromLease, libvirt.DomainInterfaceAddressesSrcLease},
	{FromARP, libvirt.DomainInterfaceAddressesSrcArp},
}

const (
	// addressPatience is for each source: a guest agent may never answer.
	addressPatience = 3 * time.Second
	// maxAddresses is how many a guest may claim for an interface.
	maxAddresses = 32
)

// Addresses tells the addresses of each interface, by its MAC, as the first
// source that knows any has them. Those of the guest agent are the guest's word.
func (h *Host) Addresses(ctx context.Context, uuid string) (map[string][]netip.Prefix, map[string]AddressSource, error) {
	all, from := map[string][]netip.Prefix{}, map[string]AddressSource{}
	var errs []error
	for _, source := range addressSources {
		list, err := h.interfaceAddresses(ctx, uuid, source.number)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for mac, addrs := range list {
			if _, known := all[mac]; !known && len(addrs) > 0 {
				all[mac], from[mac] = addrs, source.name
			}
		}
	}
	if len(errs) == len(addressSources) {
		return nil, nil, errors.Join(errs...)
	}
	return all, from, nil
}

// interfaceAddresses asks one source, on a connection of its own: a call that
// waits for a guest ends only with its connection.
func (h *Host) interfaceAddresses(ctx context.Context, uuid string, source libvirt.DomainInterfaceAddressesSource) (map[string][]netip.Prefix, error) {
	ctx, cancel := context.WithTimeout(ctx, addressPatience)
	defer cancel()
	c, err := dial(ctx, h.socket)
	if err != nil {
		return nil, err
	}
	defer c.close()
	var list []libvirt.DomainInterface
	err = c.call(ctx, "read addresses", func(l *libvirt.Libvirt) error {
		d, err := lookup(l, uuid)
		if err == nil {
			list, err = l.DomainInterfaceAddresses(d, uint32(source), 0)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return usableAddresses(list), nil
}

// usableAddresses leaves the addresses that others can reach.
func usableAddresses(list []libvirt.DomainInterface) map[string][]netip.Prefix {
	all := map[string][]netip.Prefix{}
	for _, nic := range list {
		if len(nic.Hwaddr) != 1 {
			continue
		}
		mac := strings.ToLower(nic.Hwaddr[0])
		for _, a := range nic.Addrs {
			addr, err := netip.ParseAddr(a.Addr)
			addr = addr.WithZone("").Unmap()
			switch {
			case err != nil, addr.IsLoopback(), addr.IsUnspecified(), addr.IsMulticast(), addr.IsLinkLocalUnicast(), int(a.Prefix) > addr.BitLen():
				continue
			}
			p := netip.PrefixFrom(addr, int(a.Prefix))
			if len(all[mac]) < maxAddresses && !slices.Contains(all[mac], p) {
				all[mac] = append(all[mac], p)
			}
		}
	}
	return all
}
