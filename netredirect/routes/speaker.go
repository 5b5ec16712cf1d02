package routes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
)

// ErrNotHostRoute is returned when a prefix is not that of one host's address.
var ErrNotHostRoute = errors.New("not a host route")

// ErrNoPeer is returned when no configured peer takes routes of a prefix's
// address family.
var ErrNoPeer = errors.New("no BGP peer takes it")

// ErrClosed is returned when the speaker was closed.
var ErrClosed = errors.New("BGP speaker is closed")

// Speaker is one end of BGP sessions. Its sockets belong to the network
// namespace of the process. Its methods may be called by several goroutines; but
// a process has one Speaker at a time, since the library has global variables.
type Speaker struct {
	config   Config
	log      *slog.Logger
	server   *server.BgpServer
	standard []uint32
	large    []*bgp.LargeCommunity

	stop   context.CancelFunc
	ctx    context.Context // until Close
	retry  sync.WaitGroup
	status status

	mu        sync.Mutex // held while routes change
	announced map[netip.Prefix]bool
	closed    bool
}

// New begins to connect to the peers, and goes on with it until Close: a peer
// that does not answer is no error. resume are the prefixes that this host
// announced before it was restarted, if any: they are announced again before
// a router that kept them would drop them. One that the configuration has no
// way to announce any more is logged and left out.
func New(ctx context.Context, config Config, resume []netip.Prefix, log *slog.Logger) (*Speaker, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("configuration of BGP: %w", err)
	}
	standard, large, err := parseCommunities(config.Communities)
	if err != nil {
		return nil, err
	}
	passwords := make([]string, len(config.Peers))
	for i, p := range config.Peers {
		if passwords[i], err = p.password(); err != nil {
			return nil, err
		}
	}
	s := &Speaker{
		config:    config,
		log:       log,
		standard:  standard,
		large:     large,
		announced: map[netip.Prefix]bool{},
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.status.init(s)
	s.server = server.NewBgpServer(server.LoggerOption(slog.New(&libraryLog{status: &s.status, next: log.Handler()}), nil))
	go s.server.Serve() // Close waits for it

	if err := s.start(ctx, resume, passwords); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Speaker) start(ctx context.Context, resume []netip.Prefix, passwords []string) error {
	if err := s.startBGP(ctx); err != nil {
		return err
	}
	if err := s.watch(); err != nil {
		return fmt.Errorf("watch BGP: %w", err)
	}
	for _, p := range resume {
		if err := s.Announce(ctx, []netip.Prefix{p}); ctx.Err() != nil {
			return err
		} else if err != nil {
			s.log.Error("host route not announced again", "prefix", p, "err", err)
		}
	}
	for i, p := range s.config.Peers {
		if err := s.addPeer(ctx, p, passwords[i], len(resume) > 0); err != nil {
			return err
		}
	}
	return nil
}

// Announce tells the peers of routes to the prefixes, each of one address, by
// this host. Peers that are not up get them as soon as they are. What is
// announced already stays so.
func (s *Speaker) Announce(ctx context.Context, prefixes []netip.Prefix) error {
	for _, p := range prefixes {
		if err := s.announceable(p); err != nil {
			return fmt.Errorf("announce %s: %w", p, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range prefixes {
		if err := s.usable(ctx); err != nil {
			return fmt.Errorf("announce %s: %w", p, err)
		}
		if s.announced[p] {
			continue
		}
		path, err := s.path(p)
		if err != nil {
			return fmt.Errorf("announce %s: %w", p, err)
		}
		if _, err := s.server.AddPath(apiutil.AddPathRequest{Paths: []*apiutil.Path{path}}); err != nil {
			return fmt.Errorf("announce %s: %w", p, err)
		}
		s.announced[p] = true
		s.log.Info("host route announced", "prefix", p)
	}
	return nil
}

// Withdraw takes back the routes to the prefixes. What is not announced stays
// so.
func (s *Speaker) Withdraw(ctx context.Context, prefixes []netip.Prefix) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range prefixes {
		if err := s.usable(ctx); err != nil {
			return fmt.Errorf("withdraw %s: %w", p, err)
		}
		if !s.announced[p] {
			continue
		}
		path, err := s.path(p)
		if err != nil {
			return fmt.Errorf("withdraw %s: %w", p, err)
		}
		if err := s.server.DeletePath(apiutil.DeletePathRequest{Paths: []*apiutil.Path{path}}); err != nil {
			return fmt.Errorf("withdraw %s: %w", p, err)
		}
		delete(s.announced, p)
		s.log.Info("host route withdrawn", "prefix", p)
	}
	return nil
}

// Close ends the sessions. Routers that support graceful restart keep the
// routes that are announced for RestartTime; Withdraw comes first for what must
// go at once.
func (s *Speaker) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.stop()
	s.status.end()
	s.retry.Wait()
	keep := len(s.announced) > 0
	if err := s.server.StopBgp(context.Background(), &api.StopBgpRequest{AllowGracefulRestart: keep}); err != nil {
		s.log.Warn("BGP sessions not ended in order", "err", err)
	}
	s.server.Stop() // what StopBgp leaves running
}

func (s *Speaker) usable(ctx context.Context) error {
	if s.closed {
		return ErrClosed
	}
	return ctx.Err()
}

// announceable says why a prefix cannot be announced.
func (s *Speaker) announceable(p netip.Prefix) error {
	if !p.IsSingleIP() || !usable(p.Addr()) {
		return fmt.Errorf("%w: want the address of a VM as /32 or /128", ErrNotHostRoute)
	}
	family := familyOf(p.Addr())
	if !slices.ContainsFunc(s.config.Peers, func(peer Peer) bool { return s.config.carries(peer, family) }) {
		return fmt.Errorf("%w: configure a peer with an %[2]s address, or an %[2]s next hop", ErrNoPeer, familyName(family))
	}
	return nil
}

// path is the route to a prefix as the library wants it.
func (s *Speaker) path(prefix netip.Prefix) (*apiutil.Path, error) {
	family := familyOf(prefix.Addr())
	nlri, err := bgp.NewIPAddrPrefix(prefix)
	if err != nil {
		return nil, err
	}
	attrs := []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP)}
	if family == bgp.RF_IPv4_UC {
		hop, err := bgp.NewPathAttributeNextHop(s.config.nextHop(family))
		if err != nil {
			return nil, err
		}
		attrs = append(attrs, hop)
	} else {
		reach, err := bgp.NewPathAttributeMpReachNLRI(family, []bgp.PathNLRI{{NLRI: nlri}}, s.config.nextHop(family))
		if err != nil {
			return nil, err
		}
		attrs = append(attrs, reach)
	}
	if s.config.LocalPref != 0 {
		attrs = append(attrs, bgp.NewPathAttributeLocalPref(s.config.LocalPref))
	}
	if len(s.standard) > 0 {
		attrs = append(attrs, bgp.NewPathAttributeCommunities(s.standard))
	}
	if len(s.large) > 0 {
		attrs = append(attrs, bgp.NewPathAttributeLargeCommunities(s.large))
	}
	return &apiutil.Path{Family: family, Nlri: nlri, Attrs: attrs}, nil
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
