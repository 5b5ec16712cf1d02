package names

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// maxPointers bounds the names that an address's PTR records may give.
const maxPointers = 16

// Find returns the A and AAAA records that give names one of the VM's
// addresses, each with the PTR record of that address if it names it. Without
// names it takes those that the PTR records of the addresses give, and passes
// over what cannot be moved: names that have no such address, aliases, zones of
// other servers.
func (c *Client) Find(ctx context.Context, names []string, addrs []netip.Addr) ([]Record, error) {
	if len(addrs) == 0 {
		return nil, errors.New("find DNS records: no address of the VM is known")
	}
	addrs = slices.Clone(addrs)
	for i, a := range addrs {
		addrs[i] = a.Unmap()
		if !addrs[i].IsValid() || a.Zone() != "" {
			return nil, fmt.Errorf("find DNS records: %v is no address for DNS", a)
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	addrs = slices.Compact(addrs)

	pointers := map[netip.Addr]foundPointer{}
	var pointed []string
	for _, a := range addrs {
		p, err := c.findPointer(ctx, a)
		if err != nil {
			return nil, fmt.Errorf("find PTR record of %v: %w", a, err)
		}
		pointers[a] = p
		pointed = append(pointed, p.targets...)
	}

	given := len(names) > 0
	if !given {
		names = pointed
	}
	var found []Record
	seen := map[string]bool{}
	for _, n := range names {
		name, err := canonical(n)
		if err != nil {
			return nil, fmt.Errorf("find DNS records: %w", err)
		}
		if seen[name] {
			continue
		}
		seen[name] = true
		records, err := c.findName(ctx, name, addrs)
		if !given && (errors.Is(err, ErrNotServed) || errors.Is(err, ErrAlias) || errors.Is(err, errElsewhere)) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find DNS records: %w", err)
		}
		for _, r := range records {
			if p := pointers[r.Address]; slices.Contains(p.targets, name) {
				r.Pointer = &p.Pointer
			}
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b Record) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), a.Address.Compare(b.Address))
	})
	return found, nil
}

// errElsewhere is returned by findName when a name has no address of the VM.
var errElsewhere = errors.New("not an address of the VM")

// findName returns the records of one name that have one of the addresses.
func (c *Client) findName(ctx context.Context, name string, addrs []netip.Addr) ([]Record, error) {
	zone, err := c.zoneOf(ctx, name)
	if err != nil {
		return nil, err
	}
	var found []Record
	var others []string
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
		if !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return rrtype(a) == qtype }) {
			continue
		}
		s, err := c.lookup(ctx, name, qtype)
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if rrtype(a) == qtype && s.has(a.String()) {
				found = append(found, Record{Zone: zone, Name: name, Address: a, TTL: s.ttl})
			}
		}
		others = append(others, s.data...)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s has %v: %w (which has %v)", name, rrset{data: others}, errElsewhere, addrs)
	}
	return found, nil
}

// foundPointer is the PTR records of one address.
type foundPointer struct {
	Pointer
	targets []string
}

// findPointer returns none for an address whose reverse zone is not served.
func (c *Client) findPointer(ctx context.Context, a netip.Addr) (foundPointer, error) {
	zone, name, err := c.reverseOf(ctx, a)
	if errors.Is(err, ErrNotServed) {
		return foundPointer{}, nil
	}
	if err != nil {
		return foundPointer{}, err
	}
	s, err := c.lookup(ctx, name, dns.TypePTR)
	if err != nil {
		return foundPointer{}, err
	}
	if len(s.data) > maxPointers {
		return foundPointer{}, fmt.Errorf("%w: %d names for one address, more than %d: name those of the VM", ErrAnswer, len(s.data), maxPointers)
	}
	return foundPointer{Pointer{Zone: zone, Name: name, TTL: s.ttl}, s.data}, nil
}

// reverseOf returns where the PTR record of an address belongs, which may be
// behind one alias (RFC 2317).
func (c *Client) reverseOf(ctx context.Context, a netip.Addr) (zone, name string, err error) {
	name, err = reverseName(a)
	if err != nil {
		return "", "", err
	}
	zone, err = c.zoneOf(ctx, name)
	if alias, ok := errors.AsType[*aliasError](err); ok {
		name = alias.target
		zone, err = c.zoneOf(ctx, name)
	}
	return zone, name, err
}

// lookup returns an RRset as the first authoritative server has it.
func (c *Client) lookup(ctx context.Context, name string, qtype uint16) (rrset, error) {
	answer, err := c.ask(ctx, name, qtype)
	if err != nil {
		return rrset{}, err
	}
	return readRRset(answer, name, qtype)
}

// zoneOf returns the zone that has a name, whether or not the name exists.
func (c *Client) zoneOf(ctx context.Context, name string) (string, error) {
	answer, err := c.ask(ctx, name, dns.TypeSOA)
	if err != nil {
		return "", err
	}
	zone, _, err := readSOA(answer, name)
	if err != nil {
		return "", err
	}
	if len(c.zones) > 0 && !slices.Contains(c.zones, zone) {
		return "", fmt.Errorf("%s: %w: its zone %s is not listed (%s)", name, ErrNotServed, zone, strings.Join(c.zones, ", "))
	}
	return zone, nil
}

// readSOA returns the zone of a name and its serial, from the answer of a server
// that is authoritative: a positive one at the zone's apex, a negative one below.
func readSOA(answer *dns.Msg, name string) (zone string, serial uint32, err error) {
	if _, err := readRRset(answer, name, dns.TypeNone); err != nil {
		return "", 0, err // too long, or an alias
	}
	for _, section := range [][]dns.RR{answer.Answer, answer.Ns} {
		for _, rr := range section[:min(len(section), maxRecords)] {
			soa, ok := rr.(*dns.SOA)
			if !ok || soa.Hdr.Class != dns.ClassINET || soa.Hdr.Name == "." {
				continue
			}
			if zone = dns.CanonicalName(soa.Hdr.Name); dns.IsSubDomain(zone, name) {
				return zone, soa.Serial, nil
			}
		}
	}
	return "", 0, fmt.Errorf("%w: %s: no SOA record says which zone the name is in", ErrAnswer, name)
}
