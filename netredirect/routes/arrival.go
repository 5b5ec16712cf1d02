package routes

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// Arrived reports whether the network has the route to a host by this site
// (ours), or by another one.
//
// A route is ours if its next hop is one of Config's or an address of this host,
// or if this host announces the prefix and the route's origin is the own AS.
// So while this host announces, the route of another site of the same AS is told
// from the own one by its next hop alone, which routers of other ASes replace.
//
// Many routers never send a route back to where they have it from. Without a
// Watch peer the route by this site has therefore arrived, too, when this host
// announces it, every peer that it is announced to is up and takes routes of the
// family, and none of them shows another's: a router shows the one that it uses.
// What a peer's filter refuses can't be seen so.
func (s *Speaker) Arrived(p netip.Prefix, ours bool) (bool, error) {
	sightings, err := s.Seen(p)
	if err != nil {
		return false, err
	}
	hops, err := s.nextHops()
	if err != nil {
		return false, fmt.Errorf("look for route to %s: %w", p, err)
	}
	s.mu.Lock()
	announced := s.announced[p]
	s.mu.Unlock()
	own := func(seen Sighting) bool {
		origin := len(seen.Path) > 0 && seen.Path[len(seen.Path)-1] == s.config.ASN
		return slices.Contains(hops, seen.NextHop) || announced && origin
	}
	if !ours {
		return slices.ContainsFunc(sightings, func(seen Sighting) bool { return !own(seen) }), nil
	}
	if !announced {
		return false, nil
	}
	return slices.ContainsFunc(sightings, own) || len(sightings) == 0 && s.taken(p), nil
}

// nextHops are the addresses by which the network reaches this host.
func (s *Speaker) nextHops() ([]netip.Addr, error) {
	hops := []netip.Addr{s.config.NextHop4, s.config.NextHop6}
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list this host's addresses: %w", err)
	}
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			hops = append(hops, p.Addr())
		}
	}
	return slices.DeleteFunc(hops, func(a netip.Addr) bool { return !a.IsValid() }), nil
}

// taken says whether every peer that a prefix is announced to has it, as far as
// its session tells. With a Watch peer there is a better way to know.
func (s *Speaker) taken(p netip.Prefix) bool {
	family := familyOf(p.Addr())
	s.status.mu.Lock()
	defer s.status.mu.Unlock()
	for _, peer := range s.status.peers {
		if peer.peer.Watch {
			return false
		}
		if s.config.carries(peer.peer, family) && !(peer.Up && slices.Contains(peer.families, family)) {
			return false
		}
	}
	return true
}
