package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/netredirect/names"
	"github.com/wanmig/wanmig/netredirect/routes"
	"github.com/wanmig/wanmig/tunnel"
)

// packetsTag says what a connection for packets is for.
const packetsTag = "redirect"

// startRedirects takes up what stood when the agent ended.
func (a *agent) startRedirects(ctx context.Context) (*netredirect.Manager, error) {
	c := netredirect.Config{Dir: filepath.Join(a.config.State, "redirects"), Site: a.config.Site,
		Egress: a.config.Redirect.Egress, Mode: a.config.Addresses.Mode, Pool: a.config.Addresses.Pool,
		Dial: a.dialPackets,
		Call: func(ctx context.Context, site, peer, move, op string, request, reply any) error {
			return a.engine.CallRedirect(ctx, site, peer, move, op, request, reply)
		},
		SiteOf: func(peer string) (string, bool) {
			name := a.sites.nameOf(tunnel.ID(peer))
			return name, name != ""
		},
		Reach: func(ctx context.Context, site, peer string) (netip.Addr, error) {
			return a.engine.Reach(ctx, site, peer)
		},
		Present: a.present,
		NICs: func(ctx context.Context, uuid string) ([]netredirect.NIC, error) {
			return a.engine.NICs(ctx, uuid)
		},
		Settled: func(s netredirect.Status) { a.engine.Settled(s) },
		Log:     a.log}
	if d := a.config.DNS; d != nil {
		c.DNS = d.names()
	}
	if b := a.config.BGP; b != nil {
		c.BGP = b.routes()
	}
	return netredirect.Start(ctx, c)
}

func (r RedirectConfig) options() netredirect.Options {
	return netredirect.Options{Kind: r.Kind, Max: r.Max, Quiet: r.Quiet}
}

func (d DNSConfig) names() *names.Config {
	return &names.Config{Servers: d.Servers, KeyFile: d.KeyFile, Zones: d.Zones, TTL: d.TTL}
}

func (b BGPConfig) routes() *routes.Config {
	c := &routes.Config{ASN: b.ASN, RouterID: b.RouterID, Communities: b.Communities, LocalPref: b.LocalPref}
	for _, n := range b.NextHops {
		if n.Is4() {
			c.NextHop4 = n
		} else {
			c.NextHop6 = n
		}
	}
	for _, p := range b.Peers {
		c.Peers = append(c.Peers, routes.Peer{Address: p.Address, ASN: p.ASN, Local: p.Local, Port: p.Port, Multihop: p.Multihop,
			PasswordFile: p.PasswordFile, Watch: p.Watch})
	}
	return c
}

func (h HooksConfig) hooks() migrate.Hooks {
	return migrate.Hooks{Timeout: h.Timeout, Programs: map[migrate.Hook]string{
		migrate.BeforeStop: h.BeforeStop, migrate.AfterResume: h.AfterResume, migrate.AfterSettle: h.AfterSettle}}
}

// present tells whether a VM is at this host.
func (a *agent) present(ctx context.Context, uuid string) (bool, error) {
	_, err := a.host.State(ctx, uuid)
	if errors.Is(err, hypervisor.ErrNoDomain) {
		return false, nil
	}
	return err == nil, err
}

// dialPackets connects a QUIC tunnel to the agent that a redirect was made with.
func (a *agent) dialPackets(ctx context.Context, name, peer string) (netredirect.Packets, error) {
	site, err := a.sites.get(name)
	if err != nil {
		return nil, err
	}
	if site.ID != peer {
		return nil, fmt.Errorf("site %s is another agent now: the VM was moved to %s", name, peer)
	}
	p, err := a.endpoint.DialPackets(ctx, site.Address, tunnel.ID(peer), []byte(packetsTag))
	if err != nil {
		return nil, fmt.Errorf("site %s: %w", name, err)
	}
	return packets{p}, nil
}

// packets is a connection whose errors netredirect knows.
type packets struct{ *tunnel.Packets }

func (p packets) Send(b []byte) error {
	err := p.Packets.Send(b)
	if errors.Is(err, tunnel.ErrTooLarge) {
		return netredirect.ErrTooBig
	}
	return err
}

// acceptPackets gives each connection for packets to its tunnel.
func (a *agent) acceptPackets(ctx context.Context) error {
	for {
		p, err := a.endpoint.AcceptPackets(ctx)
		if err != nil {
			return fmt.Errorf("accept tunnels: %w", err)
		}
		if string(p.Tag()) != packetsTag {
			p.Close("it is for nothing that is known here: update this agent")
			continue
		}
		a.redirects.Attach(string(p.Peer()), packets{p})
	}
}
