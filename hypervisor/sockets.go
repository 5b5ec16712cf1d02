package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/digitalocean/go-libvirt"
)

// maxSocketPath is what a unix socket's address holds.
const maxSocketPath = 107

// DestinationSockets names the sockets on which the destination's QEMU will
// listen, and makes their folder. The caller removes them after the move.
func (h *Host) DestinationSockets(ctx context.Context, id, domain string) (ram, nbd string, err error) {
	return h.sockets(ctx, id, domain, "d")
}

// SourceSockets names the sockets to which the source's QEMU will connect, for
// Listen before Perform, and makes their folder.
func (h *Host) SourceSockets(ctx context.Context, id, domain string) (ram, nbd string, err error) {
	return h.sockets(ctx, id, domain, "s")
}

// sockets places them beside libvirtd's own, under the names that libvirt's
// AppArmor profiles allow a domain's QEMU: /run/libvirt/**/*.tunnelmigrate.dest.NAME
func (h *Host) sockets(ctx context.Context, id, domain, side string) (ram, nbd string, err error) {
	dir := filepath.Join(filepath.Dir(h.socket), "wanmig")
	path := func(what string) string {
		return filepath.Join(dir, id+"-"+what+side+".tunnelmigrate.dest."+domain)
	}
	if id == "" || domain == "" || strings.ContainsAny(id+domain, "/\x00") {
		return "", "", fmt.Errorf("sockets of move %q of domain %q: neither name may be empty or hold a slash", id, domain)
	}
	if ram, nbd = path("ram"), path("nbd"); len(ram) > maxSocketPath {
		return "", "", fmt.Errorf("socket %s: its name has %d bytes and may have %d: give the domain a shorter name (virsh domrename)",
			ram, len(ram), maxSocketPath)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", "", fmt.Errorf("make the sockets' folder: %w", err)
	}
	return ram, nbd, h.giveToQEMU(ctx, dir)
}

// RemoveStraySockets removes the sockets of moves that are over, which an agent that was
// killed has left.
func (h *Host) RemoveStraySockets(over func(id string) bool) error {
	dir := filepath.Join(filepath.Dir(h.socket), "wanmig")
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, f := range list {
		name, _, ours := strings.Cut(f.Name(), ".tunnelmigrate.dest.")
		id := name[:max(0, strings.LastIndex(name, "-"))]
		if ours && over(id) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, f.Name())))
		}
	}
	if err != nil {
		return fmt.Errorf("remove sockets of moves that are over: %w", err)
	}
	return nil
}

// Listen opens a unix socket that the local QEMU may connect to. A stale socket
// of the same name is replaced.
func (h *Host) Listen(ctx context.Context, path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for QEMU: %w", err)
	}
	if err := h.giveToQEMU(ctx, path); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// giveToQEMU makes the user that libvirt runs QEMU as the owner of path.
func (h *Host) giveToQEMU(ctx context.Context, path string) error {
	var caps string
	err := h.call(ctx, "host capabilities", func(l *libvirt.Libvirt) error {
		var err error
		caps, err = l.ConnectGetCapabilities()
		return err
	})
	if err != nil {
		return err
	}
	uid, gid, err := qemuUser(caps)
	if err != nil {
		return err
	}
	if err := os.Chown(path, uid, gid); err != nil {
		return fmt.Errorf("give %s to QEMU's user: %w", path, err)
	}
	return nil
}

// qemuUser reads libvirt's security model "dac", such as
// <baselabel type='kvm'>+64055:+64055</baselabel>.
func qemuUser(caps string) (uid, gid int, err error) {
	doc, err := parseXML(caps, "capabilities")
	if err != nil {
		return 0, 0, err
	}
	for _, model := range elements(child(doc.Root(), "host"), "secmodel") {
		if text(model, "model") != "dac" {
			continue
		}
		u, g, ok := strings.Cut(text(model, "baselabel"), ":")
		uid64, uerr := strconv.ParseUint(strings.TrimPrefix(u, "+"), 10, 31)
		gid64, gerr := strconv.ParseUint(strings.TrimPrefix(g, "+"), 10, 31)
		if !ok || uerr != nil || gerr != nil {
			return 0, 0, fmt.Errorf("%w: QEMU's user %q in the capabilities", ErrBadXML, text(model, "baselabel"))
		}
		return int(uid64), int(gid64), nil
	}
	// Without that model libvirt does not change users: QEMU runs as this
	// libvirtd, and so as root, or as whoever started it.
	return os.Getuid(), os.Getgid(), nil
}
