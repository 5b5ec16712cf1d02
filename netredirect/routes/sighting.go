package routes

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
)

// Sighting is a route to a prefix that a peer advertises.
type Sighting struct {
	Peer        netip.Addr
	NextHop     netip.Addr
	Path        []uint32 // autonomous systems, the peer's first; empty within the own one
	Communities []string // as in Config, standard ones first
}

// Seen says which peers advertise a route to exactly the prefix, in the order
// of the configuration: whether the network knows the way to a VM. A peer that
// is not up advertises nothing.
func (s *Speaker) Seen(prefix netip.Prefix) ([]Sighting, error) {
	if !prefix.IsValid() {
		return nil, fmt.Errorf("look for route: invalid prefix")
	}
	if s.ctx.Err() != nil {
		return nil, fmt.Errorf("look for route to %s: %w", prefix, ErrClosed)
	}
	var seen []Sighting
	for _, peer := range s.config.Peers {
		err := s.server.ListPath(apiutil.ListPathRequest{
			TableType: api.TableType_TABLE_TYPE_ADJ_IN,
			Name:      peer.Address.String(),
			Family:    familyOf(prefix.Addr()),
			Prefixes:  []*apiutil.LookupPrefix{{Prefix: prefix.Masked().String()}},
		}, func(_ bgp.NLRI, paths []*apiutil.Path) {
			for _, p := range paths {
				if !p.Stale {
					seen = append(seen, sighting(peer.Address, p))
				}
			}
		})
		if err != nil {
			return nil, fmt.Errorf("look for route to %s from BGP peer %s: %w", prefix, peer.Address, err)
		}
	}
	return seen, nil
}

func sighting(peer netip.Addr, path *apiutil.Path) Sighting {
	seen := Sighting{Peer: peer}
	var large []string
	for _, attr := range path.Attrs {
		switch a := attr.(type) {
		case *bgp.PathAttributeNextHop:
			seen.NextHop = a.Value
		case *bgp.PathAttributeMpReachNLRI:
			seen.NextHop = a.Nexthop
		case *bgp.PathAttributeAsPath:
			for _, segment := range a.Value {
				seen.Path = append(seen.Path, segment.GetAS()...)
			}
		case *bgp.PathAttributeCommunities:
			for _, c := range a.Value {
				seen.Communities = append(seen.Communities, communityText(c))
			}
		case *bgp.PathAttributeLargeCommunities:
			for _, c := range a.Values {
				large = append(large, largeCommunityText(c))
			}
		}
	}
	seen.Communities = append(seen.Communities, large...)
	return seen
}

// Changed returns a channel that is closed when a peer's state or any peer's
// host routes change. Take it before looking, or a change in between is missed.
func (s *Speaker) Changed() <-chan struct{} {
	s.status.mu.Lock()
	defer s.status.mu.Unlock()
	return s.status.changed
}

// watch follows what the library has to tell until Close.
func (s *Speaker) watch() error {
	return s.server.WatchEvent(s.ctx, server.WatchEventMessageCallbacks{
		OnPeerUpdate: func(event *apiutil.WatchEventMessage_PeerEvent, at time.Time) {
			if event.Type == apiutil.PEER_EVENT_STATE {
				s.status.follow(event.Peer.State, at)
			}
		},
		OnPathUpdate: func(paths []*apiutil.Path, _ time.Time) {
			if slices.ContainsFunc(paths, isHostRoute) {
				s.status.change()
			}
		},
	}, server.WatchPeer(), server.WatchUpdate(false, "", ""))
}

func isHostRoute(p *apiutil.Path) bool {
	nlri, ok := p.Nlri.(*bgp.IPAddrPrefix)
	return ok && nlri.Prefix.IsSingleIP()
}

// tryAgain opens the session of a peer that sent too much, after a while.
func (s *Speaker) tryAgain(peer netip.Addr) {
	timer := time.NewTimer(limitRetry)
	defer timer.Stop()
	select {
	case <-s.ctx.Done():
		return
	case <-timer.C:
	}
	if err := s.server.EnablePeer(context.Background(), &api.EnablePeerRequest{Address: peer.String()}); err != nil && s.ctx.Err() == nil {
		s.log.Warn("BGP peer not tried again", "peer", peer, "err", err)
	}
}
