package routes

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// limitRetry is how long a peer that sent too many prefixes is left alone.
var limitRetry = time.Minute // shorter in tests

// PeerState is how a session stands.
type PeerState struct {
	Peer  netip.Addr
	State string // idle, active, opensent, openconfirm or established (RFC 4271, 8.2.2)
	Up    bool
	Since time.Time // when Up last changed

	// Problem says in one line why the peer does not have the announced routes,
	// and what to do; empty if nothing is wrong.
	Problem string
}

// status is what is known of the peers.
type status struct {
	speaker *Speaker

	mu      sync.Mutex // innermost: the library logs with its own locks held
	peers   []*peerStatus
	changed chan struct{}
	closed  bool
}

type peerStatus struct {
	PeerState
	peer     Peer
	families []bgp.Family // what both ends speak, while up
	retrying bool
}

func (st *status) init(s *Speaker) {
	st.speaker = s
	st.changed = make(chan struct{})
	for _, p := range s.config.Peers {
		st.peers = append(st.peers, &peerStatus{
			peer:      p,
			PeerState: PeerState{Peer: p.Address, State: "idle", Since: time.Now(), Problem: "not connected yet"},
		})
	}
}

// Peers says how each session stands, in the order of the configuration.
func (s *Speaker) Peers() []PeerState {
	s.mu.Lock()
	wanted := map[bgp.Family]bool{}
	for p := range s.announced {
		wanted[familyOf(p.Addr())] = true
	}
	s.mu.Unlock()

	s.status.mu.Lock()
	defer s.status.mu.Unlock()
	var states []PeerState
	for _, p := range s.status.peers {
		state := p.PeerState
		for _, family := range families {
			if state.Up && wanted[family] && s.config.carries(p.peer, family) && !slices.Contains(p.families, family) {
				name := familyName(family)
				state.Problem = "the peer takes no " + name + " routes: enable " + name + " unicast for this host there"
			}
		}
		states = append(states, state)
	}
	return states
}

// follow takes in a change of a session's state.
func (st *status) follow(now apiutil.PeerState, at time.Time) {
	st.mu.Lock()
	defer st.mu.Unlock()
	p := st.find(now.NeighborAddress)
	if p == nil || st.closed {
		return
	}
	before := p.State
	p.State = strings.ToLower(strings.TrimPrefix(now.SessionState.String(), "BGP_FSM_"))
	up := now.SessionState == bgp.BGP_FSM_ESTABLISHED
	problem := p.Problem
	switch {
	case up:
		problem = ""
		p.families = negotiated(now.RemoteCap)
	case now.AdminState == api.PeerState_ADMIN_STATE_PFX_CT:
		problem = p.peer.tooMany()
		st.tryAgain(p)
	case now.SessionState == bgp.BGP_FSM_IDLE:
		if why := p.peer.ended(st.speaker.config.ASN, before, now); why != "" {
			problem = why
		}
	}
	if up != p.Up {
		p.Up, p.Since = up, at
	}
	st.set(p, problem)
	if up {
		st.speaker.log.Info("BGP peer is up", "peer", p.Peer)
	}
	st.changeLocked()
}

// tryAgain arranges for another try with a peer that sent too much.
func (st *status) tryAgain(p *peerStatus) {
	if p.retrying {
		return
	}
	p.retrying = true
	st.speaker.retry.Go(func() {
		st.speaker.tryAgain(p.Peer)
		st.mu.Lock()
		p.retrying = false
		st.mu.Unlock()
	})
}

// report notes why a peer is not up, as why says it.
func (st *status) report(peer netip.Addr, why func(p Peer, own uint32) string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	p := st.find(peer)
	if p == nil || st.closed || p.Up {
		return
	}
	if st.set(p, why(p.peer, st.speaker.config.ASN)) {
		st.changeLocked()
	}
}

// set replaces a peer's problem, and says whether it is another one.
func (st *status) set(p *peerStatus, problem string) bool {
	if p.Problem == problem {
		return false
	}
	p.Problem = problem
	if problem != "" {
		st.speaker.log.Warn("BGP peer is not up", "peer", p.Peer, "problem", problem)
	}
	return true
}

// end is the state after Close.
func (st *status) end() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.closed = true
	for _, p := range st.peers {
		if p.Up {
			p.Up, p.Since = false, time.Now()
		}
		p.State, p.Problem = "idle", ErrClosed.Error()
	}
	st.changeLocked()
}

func (st *status) find(a netip.Addr) *peerStatus {
	for _, p := range st.peers {
		if p.Peer == a {
			return p
		}
	}
	return nil
}

// change wakes those who wait for Changed.
func (st *status) change() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.changeLocked()
}

func (st *status) changeLocked() {
	close(st.changed)
	st.changed = make(chan struct{})
}

// negotiated is what a peer's capabilities say it speaks: without any it is
// IPv4 (RFC 4760, 8).
func negotiated(capabilities []bgp.ParameterCapabilityInterface) []bgp.Family {
	var spoken []bgp.Family
	for _, c := range capabilities {
		if mp, ok := c.(*bgp.CapMultiProtocol); ok {
			spoken = append(spoken, mp.CapValue)
		}
	}
	if spoken == nil {
		return []bgp.Family{bgp.RF_IPv4_UC}
	}
	return spoken
}
