package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/beevik/etree"
	"github.com/digitalocean/go-libvirt"
)

// NIC is a network interface of a domain. Alias and Tap are "" while the domain
// is shut off.
type NIC struct {
	Alias       string // "net0"
	MAC         string // lower case, with colons
	Kind        string // "network", "bridge", "direct", "user", …
	Source      string // the network's, bridge's or device's name
	Bridge      string // what the tap is plugged into; "" when that is no bridge or, of a network, not known
	Tap         string // the host's side, such as "vnet0"
	Model       string // "virtio"
	VLAN        int    // tag of its <vlan>, of several the first; 0 for none
	VirtualPort string // "openvswitch" when Bridge is one of Open vSwitch; else mostly ""
}

func readNIC(e *etree.Element) NIC {
	n := NIC{
		Alias:       attr(e, "name", "alias"),
		MAC:         strings.ToLower(attr(e, "address", "mac")),
		Kind:        attr(e, "type"),
		Bridge:      attr(e, "bridge", "source"), // of a network too, while the domain runs
		Tap:         attr(e, "dev", "target"),
		Model:       attr(e, "type", "model"),
		VirtualPort: attr(e, "type", "virtualport"),
	}
	if a := networkAttr(n.Kind); a != "" {
		n.Source = attr(e, a, "source")
	}
	n.VLAN, _ = strconv.Atoi(attr(e, "id", "vlan", "tag")) // libvirt wrote it, 0 to 4095
	return n
}

// networkAttr is the attribute of <source> that names what the NIC is plugged into.
func networkAttr(kind string) string {
	switch kind {
	case "network", "bridge":
		return kind
	case "direct":
		return "dev"
	}
	return ""
}

// NICs reads the network interfaces of a domain, as they are now: also of one
// that is paused because it is only being migrated in.
func (h *Host) NICs(ctx context.Context, uuid string) ([]NIC, error) {
	var nics []NIC
	err := h.onDomain(ctx, "read network interfaces", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		xml, err := l.DomainGetXMLDesc(d, 0)
		if err != nil {
			return err
		}
		dom, err := readDomain(xml)
		if err != nil {
			return err
		}
		nics = dom.Networks
		return nil
	})
	return nics, err
}

// AddressSource is who says which addresses a guest has.
type AddressSource string

// The sources of Addresses, the best first.
const (
	FromAgent AddressSource = "agent" // qemu-guest-agent, inside the guest
	FromLease AddressSource = "lease" // DHCP servers of libvirt's own networks
	FromARP   AddressSource = "arp"   // this host's neighbour table
)

var addressSources = []struct {
	name AddressSource
	from libvirt.DomainInterfaceAddressesSource
}{
	{FromAgent, libvirt.DomainInterfaceAddressesSrcAgent},
	{FromLease, libvirt.DomainInterfaceAddressesSrcLease},
	{FromARP, libvirt.DomainInterfaceAddressesSrcArp},
}

const (
	// addressTimeout is how long a source may take: a guest agent that is there
	// and does not answer would block its call for as long as it likes.
	addressTimeout = 3 * time.Second
	// maxGuestAddresses of one interface are believed.
	maxGuestAddresses = 64
)

// Addresses finds the IP addresses of a running guest, by the lower-case MAC
// addresses of its interfaces; one whose addresses nobody knows is missing. Each
// interface has the addresses of the first source that knows any; the source
// that is returned is the last one that was needed, "" for none. The neighbour
// table has no prefix lengths: its addresses are a /32 or /128.
//
// What the agent or the neighbour table say is the guest's word: a guest can name
// addresses that are not its own.
func (h *Host) Addresses(ctx context.Context, uuid string) (map[string][]netip.Prefix, AddressSource, error) {
	nics, err := h.NICs(ctx, uuid)
	if err != nil {
		return nil, "", err
	}
	known := map[string][]netip.Prefix{}
	var last AddressSource
	var failed []error
	for _, source := range addressSources {
		missing := slices.DeleteFunc(slices.Clone(nics), func(n NIC) bool { return known[n.MAC] != nil })
		if len(missing) == 0 {
			break
		}
		reported, err := h.reportedAddresses(ctx, uuid, source.from)
		switch {
		case ctx.Err() != nil, errors.Is(err, ErrNoDomain):
			return nil, "", err
		case err != nil:
			h.log.Debug("a source of addresses does not answer", "source", source.name, "domain", uuid, "error", err)
			failed = append(failed, fmt.Errorf("from %s: %w", source.name, err))
			continue
		}
		found := usableAddresses(reported)
		for _, n := range missing {
			if list := found[n.MAC]; list != nil {
				known[n.MAC], last = list, source.name
			}
		}
	}
	if len(failed) == len(addressSources) {
		return nil, "", fmt.Errorf("addresses of domain %s: %w", uuid, errors.Join(failed...))
	}
	return known, last, nil
}

// reportedAddresses asks one source, in bounded time.
func (h *Host) reportedAddresses(ctx context.Context, uuid string, from libvirt.DomainInterfaceAddressesSource) ([]libvirt.DomainInterface, error) {
	ctx, cancel := context.WithTimeout(ctx, addressTimeout)
	defer cancel()
	var list []libvirt.DomainInterface
	err := h.onDomain(ctx, "interface addresses", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		var err error
		list, err = l.DomainInterfaceAddresses(d, uint32(from), 0)
		return err
	})
	return list, err
}

// usableAddresses takes from a report what can be a guest's address on a network,
// by lower-case MAC. Everything in it may be made up by the guest.
func usableAddresses(reported []libvirt.DomainInterface) map[string][]netip.Prefix {
	found := map[string][]netip.Prefix{}
	for _, i := range reported {
		if len(i.Hwaddr) != 1 {
			continue
		}
		mac := strings.ToLower(i.Hwaddr[0])
		for _, a := range i.Addrs {
			p, ok := usableAddress(a)
			if !ok || len(found[mac]) == maxGuestAddresses {
				continue
			}
			same := func(q netip.Prefix) bool { return q.Addr() == p.Addr() }
			if !slices.ContainsFunc(found[mac], same) {
				found[mac] = append(found[mac], p)
			}
		}
	}
	return found
}

// usableAddress refuses what does not parse, and addresses that no other host
// could send to.
func usableAddress(a libvirt.DomainIPAddr) (netip.Prefix, bool) {
	addr, err := netip.ParseAddr(a.Addr)
	if err != nil || addr.Zone() != "" {
		return netip.Prefix{}, false
	}
	addr = addr.Unmap()
	thisNetwork := addr.Is4() && addr.As4()[0] == 0 // RFC 1122, section 3.2.1.3
	if !addr.IsGlobalUnicast() || thisNetwork || a.Prefix > uint32(addr.BitLen()) {
		return netip.Prefix{}, false
	}
	if a.Prefix == 0 {
		return netip.PrefixFrom(addr, addr.BitLen()), true
	}
	return netip.PrefixFrom(addr, int(a.Prefix)), true
}
