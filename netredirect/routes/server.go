package routes

import (
	"context"
	"fmt"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

const (
	// RestartTime is how long, in seconds, routers that support graceful restart
	// keep the routes of a host whose session has ended.
	RestartTime = 120

	// A restarted speaker waits so long, in seconds, for the End-of-RIB of all
	// its peers before it announces (RFC 4724, 4.1). That is for routers, which
	// choose among their peers' routes; this end announces only its own.
	deferralTime = 1

	// Seconds. Peers may ask for less; keepalives come at a third of it.
	holdTime = 30

	// Seconds; the library's least is 2.
	connectRetry = 3
)

var families = []bgp.Family{bgp.RF_IPv4_UC, bgp.RF_IPv6_UC}

// startBGP starts the server, which has no peers yet and listens nowhere.
func (s *Speaker) startBGP(ctx context.Context) error {
	err := s.server.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{
		Asn:        s.config.ASN,
		RouterId:   s.config.RouterID.String(),
		ListenPort: -1,
	}})
	if err != nil {
		return fmt.Errorf("start BGP: %w", err)
	}
	if err := s.setPolicy(ctx); err != nil {
		return fmt.Errorf("set BGP policy: %w", err)
	}
	return nil
}

// setPolicy lets nothing pass but own routes, to the peers that carry them. The
// library applies its import policy to own routes, too.
func (s *Speaker) setPolicy(ctx context.Context) error {
	accept := &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT}
	err := s.setDirection(ctx, api.PolicyDirection_POLICY_DIRECTION_IMPORT, []*api.Statement{{
		Name:       "own",
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    accept,
	}})
	if err != nil {
		return err
	}
	var export []*api.Statement
	for _, family := range families {
		name := "announce-" + familyName(family)
		var to []string
		for _, p := range s.config.Peers {
			if s.config.carries(p, family) {
				to = append(to, hostPrefix(p.Address).String())
			}
		}
		if len(to) == 0 {
			continue // an empty set would match every peer
		}
		set := &api.DefinedSet{DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR, Name: name, List: to}
		if err := s.server.AddDefinedSet(ctx, &api.AddDefinedSetRequest{DefinedSet: set}); err != nil {
			return err
		}
		export = append(export, &api.Statement{
			Name: name,
			Conditions: &api.Conditions{
				RouteType:   api.Conditions_ROUTE_TYPE_LOCAL,
				AfiSafiIn:   []*api.Family{apiFamily(family)},
				NeighborSet: &api.MatchSet{Type: api.MatchSet_TYPE_ANY, Name: name},
			},
			Actions: accept,
		})
	}
	return s.setDirection(ctx, api.PolicyDirection_POLICY_DIRECTION_EXPORT, export)
}

func (s *Speaker) setDirection(ctx context.Context, direction api.PolicyDirection, statements []*api.Statement) error {
	assignment := &api.PolicyAssignment{
		Direction:     direction,
		DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
	}
	if len(statements) > 0 {
		policy := &api.Policy{Name: direction.String(), Statements: statements}
		if err := s.server.AddPolicy(ctx, &api.AddPolicyRequest{Policy: policy}); err != nil {
			return err
		}
		assignment.Policies = []*api.Policy{{Name: policy.Name}}
	}
	return s.server.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: assignment})
}

// addPeer begins to connect to a peer. The peer keeps what it has of an earlier
// session if restarted is set.
func (s *Speaker) addPeer(ctx context.Context, p Peer, password string, restarted bool) error {
	peer := &api.Peer{
		Conf: &api.PeerConf{
			NeighborAddress: p.Address.String(),
			PeerAsn:         p.ASN,
			AuthPassword:    password,
			// Another site of the same AS is seen across the network, too.
			AllowOwnAsn: 255,
		},
		Transport: &api.Transport{RemotePort: uint32(p.port())},
		Timers: &api.Timers{Config: &api.TimersConfig{
			ConnectRetry:      connectRetry,
			HoldTime:          holdTime,
			KeepaliveInterval: holdTime / 3,
		}},
		GracefulRestart: &api.GracefulRestart{
			Enabled:         true,
			RestartTime:     RestartTime,
			DeferralTime:    deferralTime,
			LocalRestarting: restarted,
		},
	}
	if p.Local.IsValid() {
		peer.Transport.LocalAddress = p.Local.String()
	}
	if p.Multihop != 0 {
		peer.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: uint32(p.Multihop)}
	}
	for _, f := range families {
		peer.AfiSafis = append(peer.AfiSafis, &api.AfiSafi{
			Config:            &api.AfiSafiConfig{Family: apiFamily(f), Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: true}},
			PrefixLimits:      &api.PrefixLimit{Family: apiFamily(f), MaxPrefixes: p.maxPrefixes()},
		})
	}
	if err := s.server.AddPeer(ctx, &api.AddPeerRequest{Peer: peer}); err != nil {
		return fmt.Errorf("add BGP peer %s: %w", p.Address, err)
	}
	return nil
}

func apiFamily(f bgp.Family) *api.Family { return apiutil.ToApiFamily(f.Afi(), f.Safi()) }
