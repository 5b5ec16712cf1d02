// Package agent is the daemon on each hypervisor host. It listens for peers on
// one port, UDP and TCP, and for the command on a unix socket, knows the sites and its
// own identity, and keeps the moves; package migrate does the moving.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/wanmig/wanmig/blocksync/seed"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// Version is set by the build.
var Version = "unknown"

// agent is a running daemon.
type agent struct {
	config    Config
	identity  *tunnel.Identity
	sites     *sites
	endpoint  *tunnel.Endpoint
	host      *hypervisor.Host
	engine    *migrate.Engine
	redirects *netredirect.Manager
	seeds     *seed.Library
	log       *slog.Logger
	ctx       context.Context // the daemon's life: moves outlive the request that started them
}

// Run runs the daemon until ctx ends. Moves that can be cancelled then are, so
// that their guests stay at their source; those past that point are ended first.
func Run(ctx context.Context, c Config, log *slog.Logger) error {
	if err := makeFolders(c); err != nil {
		return err
	}
	identity, err := tunnel.LoadOrCreateIdentity(filepath.Join(c.State, "identity.pem"))
	if err != nil {
		return err
	}
	known, err := openSites(filepath.Join(c.State, "sites.json"))
	if err != nil {
		return err
	}
	journal, err := handoff.OpenJournal(filepath.Join(c.State, "journal.db"))
	if err != nil {
		return err
	}
	defer journal.Close()
	endpoint, err := tunnel.ListenWith(c.Listen, identity, known.trusted, log, tunnel.Options{Qlog: c.Qlog})
	if err != nil {
		return err
	}
	defer endpoint.Close()
	host := hypervisor.New(c.Libvirt, log)
	defer host.Close()
	a := &agent{config: c, identity: identity, sites: known, endpoint: endpoint, host: host, log: log, ctx: ctx}
	if a.seeds, err = seed.New(filepath.Join(c.State, "seeds"), c.Seeds, log); err != nil {
		return err
	}
	defer a.closeSeeds()
	if a.redirects, err = a.startRedirects(ctx); err != nil {
		return err
	}
	hooks := c.Hooks.hooks()
	if err := hooks.Check(); err != nil {
		return errors.Join(err, a.redirects.Close())
	}
	a.engine, err = migrate.New(ctx, migrate.Config{Host: host, Journal: journal, Site: c.Site, Version: Version,
		Spool: c.Outbox.Dir, Memory: int64(c.Outbox.Memory), SpoolMax: int64(c.Outbox.Spool), PageStore: int64(c.Reduction.Memory),
		Keep: c.Reduction.Keep, KeepSpace: int64(c.Reduction.KeepSpace), CopyDir: filepath.Join(c.State, "copies"),
		Seeds: a.seeds, Redirects: a.redirects, Redirect: c.Redirect.options(), Hooks: hooks,
		Caps: c.Rates.at, Dial: a.dial, Known: known.nameOf, Log: log})
	if err != nil {
		return errors.Join(err, a.redirects.Close())
	}
	for _, site := range c.Rates.unknown(known.all()) {
		log.Warn("rates for a site that is not known here: add it with wanmig site add", "site", site)
	}
	indexCtx, stop := context.WithCancel(ctx)
	var indexing sync.WaitGroup
	indexing.Go(func() { a.seeds.Run(indexCtx) })
	err = a.serve(ctx)
	stop()
	indexing.Wait()
	return errors.Join(err, a.redirects.Close())
}

// closeSeeds gives the indexes of seeds back, when no move has them open.
func (a *agent) closeSeeds() {
	if err := a.seeds.Close(); err != nil {
		a.log.Warn("memory of the seed indexes not given back", "error", err)
	}
}

func makeFolders(c Config) error {
	for dir, mode := range map[string]os.FileMode{c.State: 0o700, c.Outbox.Dir: 0o700, filepath.Dir(c.API): 0o755} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return fmt.Errorf("make the agent's folders: %w", err)
		}
	}
	return nil
}

// serve runs the API and the peers' side until ctx ends.
func (a *agent) serve(ctx context.Context) error {
	listener, err := listenAPI(a.config.API)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: a.routes(), ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelWarn)}
	failed := make(chan error, 3)
	// First of all: no other move may come for a guest whose last one is open.
	if err := a.engine.Recover(ctx); err != nil {
		a.log.Error("journal not recovered", "error", err)
	}
	go func() { failed <- server.Serve(listener) }()
	go func() { failed <- a.acceptPeers(ctx) }()
	go func() { failed <- a.acceptPackets(ctx) }()
	a.log.Info("agent ready", "site", a.config.Site, "id", a.identity.ID(), "listen", a.endpoint.Addr(), "api", a.config.API, "version", Version)
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
		if ctx.Err() != nil {
			err = nil
		}
	}
	a.log.Info("agent stops: cancelling or ending its moves")
	a.engine.Wait()
	return errors.Join(err, server.Close())
}

// listenAPI listens on the command's socket. One left by an agent that was
// killed is replaced; one that answers belongs to another agent.
func listenAPI(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another agent answers there: stop it first", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		os.Remove(path)
	}
	old := syscall.Umask(0o117) // the socket is root's and its group's from its first moment
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen for the command: %w", err)
	}
	return l, nil
}

// acceptPeers serves each peer that connects.
func (a *agent) acceptPeers(ctx context.Context) error {
	for {
		session, err := a.endpoint.Accept(ctx)
		if err != nil {
			return fmt.Errorf("accept peers: %w", err)
		}
		go a.engine.Serve(ctx, session)
	}
}

// dial opens a session to a site.
func (a *agent) dial(ctx context.Context, name string, o tunnel.DialOptions) (*tunnel.Session, error) {
	site, err := a.sites.get(name)
	if err != nil {
		return nil, err
	}
	if o.Transport == tunnel.Auto {
		o.Transport = site.transport()
	}
	session, err := a.endpoint.Dial(ctx, site.Address, tunnel.ID(site.ID), o)
	if err != nil {
		return nil, fmt.Errorf("site %s: %w", name, err)
	}
	return session, nil
}
