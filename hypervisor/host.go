package hypervisor

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/digitalocean/go-libvirt"
)

// DefaultSocket is where libvirtd listens.
const DefaultSocket = "/run/libvirt/libvirt-sock"

// ErrNoDomain is returned when libvirtd knows no domain of the given name or
// UUID.
var ErrNoDomain = errors.New("no such domain")

// Host is the local libvirtd. Its methods are safe for concurrent use.
type Host struct {
	socket string
	log    *slog.Logger

	mu     sync.Mutex
	idle   []*conn
	closed bool
}

// maxIdle connections are kept for the next calls.
const maxIdle = 3

// New is the libvirtd behind a unix socket. It connects at the first call, and
// again after libvirtd was restarted: nothing is lost while it does not run.
func New(socket string, log *slog.Logger) *Host { return &Host{socket: socket, log: log} }

// Close closes the idle connections. Migrations under way keep their own.
func (h *Host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, c := range h.idle {
		c.close()
	}
	h.idle = nil
	return nil
}

// take hands out a connection for one caller alone, so that a call that ends by
// closing its connection disturbs no other.
func (h *Host) take(ctx context.Context) (*conn, error) {
	h.mu.Lock()
	for len(h.idle) > 0 {
		c := h.idle[len(h.idle)-1]
		h.idle = h.idle[:len(h.idle)-1]
		if !c.dead() {
			h.mu.Unlock()
			return c, nil
		}
		c.close()
	}
	h.mu.Unlock()
	return dial(ctx, h.socket)
}

func (h *Host) put(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || c.dead() || len(h.idle) == maxIdle {
		c.close()
		return
	}
	h.idle = append(h.idle, c)
}

// call runs one RPC on a connection of its own. A request that could not be
// sent, because libvirtd went away since, is sent once more on a new one.
func (h *Host) call(ctx context.Context, what string, rpc func(*libvirt.Libvirt) error) error {
	for again := true; ; again = false {
		c, err := h.take(ctx)
		if err != nil {
			return err
		}
		err = c.call(ctx, what, rpc)
		h.put(c)
		if again && err != nil && unsent(err) && ctx.Err() == nil {
			h.log.Debug("libvirtd connection was stale, connecting again", "call", what)
			continue
		}
		return err
	}
}

// HostInfo describes a hypervisor host.
type HostInfo struct {
	Name           string // the host's name as libvirtd sees it
	UUID           string // libvirt's host UUID; the two hosts of a move must differ
	Arch           string
	LibvirtVersion string // such as "9.0.0"
	QEMUVersion    string
}

// Info describes this host.
func (h *Host) Info(ctx context.Context) (HostInfo, error) {
	var info HostInfo
	err := h.call(ctx, "host info", func(l *libvirt.Libvirt) error {
		var err error
		if info.Name, err = l.ConnectGetHostname(); err != nil {
			return err
		}
		lib, err := l.ConnectGetLibVersion()
		if err != nil {
			return err
		}
		qemu, err := l.ConnectGetVersion()
		if err != nil {
			return err
		}
		info.LibvirtVersion, info.QEMUVersion = version(lib), version(qemu)
		caps, err := l.ConnectGetCapabilities()
		if err != nil {
			return err
		}
		doc, err := parseXML(caps, "capabilities")
		if err != nil {
			return err
		}
		info.UUID = text(doc.Root(), "host", "uuid")
		info.Arch = text(doc.Root(), "host", "cpu", "arch")
		return nil
	})
	return info, err
}

func version(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}

// State is what a domain does.
type State string

// The states of a domain, as libvirt names them.
const (
	Running   State = "running"
	Paused    State = "paused"
	ShutOff   State = "shut off"
	Crashed   State = "crashed"
	Suspended State = "suspended by its power management"
	Stopping  State = "shutting down"
	Unknown   State = "unknown"
)

func stateOf(s int32) State {
	switch libvirt.DomainState(s) {
	case libvirt.DomainRunning, libvirt.DomainBlocked:
		return Running
	case libvirt.DomainPaused:
		return Paused
	case libvirt.DomainShutdown:
		return Stopping
	case libvirt.DomainShutoff:
		return ShutOff
	case libvirt.DomainCrashed:
		return Crashed
	case libvirt.DomainPmsuspended:
		return Suspended
	}
	return Unknown
}

// Active tells whether a QEMU process stands behind the state.
func (s State) Active() bool { return s != ShutOff && s != Unknown }

// Summary is a domain in a list.
type Summary struct {
	Name, UUID string
	State      State
}

// Domains lists every domain, running or not.
func (h *Host) Domains(ctx context.Context) ([]Summary, error) {
	var list []Summary
	err := h.call(ctx, "list domains", func(l *libvirt.Libvirt) error {
		doms, _, err := l.ConnectListAllDomains(1, libvirt.ConnectListDomainsActive|libvirt.ConnectListDomainsInactive)
		if err != nil {
			return err
		}
		list = make([]Summary, 0, len(doms))
		for _, d := range doms {
			s, _, err := l.DomainGetState(d, 0)
			if hasCode(err, libvirt.ErrNoDomain) {
				continue // it ended meanwhile
			}
			if err != nil {
				return err
			}
			list = append(list, Summary{Name: d.Name, UUID: uuidString(d.UUID), State: stateOf(s)})
		}
		return nil
	})
	return list, err
}

func uuidString(u libvirt.UUID) string {
	s := hex.EncodeToString(u[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// parseUUID accepts a UUID with or without its dashes.
func parseUUID(s string) (libvirt.UUID, bool) {
	var u libvirt.UUID
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(u) {
		return u, false
	}
	copy(u[:], b)
	return u, true
}

// lookup finds a domain by UUID, or else by name.
func lookup(l *libvirt.Libvirt, nameOrUUID string) (libvirt.Domain, error) {
	if u, ok := parseUUID(nameOrUUID); ok {
		d, err := l.DomainLookupByUUID(u)
		if err == nil || !hasCode(err, libvirt.ErrNoDomain) {
			return d, err
		}
	}
	d, err := l.DomainLookupByName(nameOrUUID)
	if hasCode(err, libvirt.ErrNoDomain) {
		return d, fmt.Errorf("%w: %q (virsh list --all names them)", ErrNoDomain, nameOrUUID)
	}
	return d, err
}

// onDomain runs one RPC on a domain.
func (h *Host) onDomain(ctx context.Context, what, uuid string, rpc func(*libvirt.Libvirt, libvirt.Domain) error) error {
	return h.call(ctx, what, func(l *libvirt.Libvirt) error {
		d, err := lookup(l, uuid)
		if err != nil {
			return err
		}
		err = rpc(l, d)
		if hasCode(err, libvirt.ErrNoDomain) { // it has ended meanwhile
			err = fmt.Errorf("%w: %w", ErrNoDomain, err)
		}
		return err
	})
}
