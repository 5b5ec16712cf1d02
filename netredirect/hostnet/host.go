package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernelTimeout bounds the wait for an answer of the kernel.
const kernelTimeout = 30 * time.Second

// A Host is the network of the machine, or of the network namespace that the
// process runs in. Its methods may be called by several goroutines.
type Host struct {
	kernel *netlink.Handle
	// routes has its dumps filtered by the kernel, which matters where a
	// routing daemon has filled the tables.
	routes *netlink.Handle
}

// Open opens the host's network. It needs CAP_NET_ADMIN only to change it.
func Open() (*Host, error) {
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	routes, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		kernel.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	h := &Host{kernel: kernel, routes: routes}
	if err := errors.Join(
		kernel.SetSocketTimeout(kernelTimeout),
		routes.SetSocketTimeout(kernelTimeout),
		routes.SetStrictCheck(true),
	); err != nil {
		h.Close()
		return nil, fmt.Errorf("set up netlink: %w", err)
	}
	return h, nil
}

// Close releases what Open has taken. It reverts nothing.
func (h *Host) Close() {
	h.kernel.Close()
	h.routes.Close()
}

// Apply makes a change. A change that stands already is left as it is. Errors
// wrap ErrInvalid, ErrTaken, ErrNoNFT, ErrNoKernelSupport or the kernel's.
func (h *Host) Apply(ctx context.Context, s Step) error {
	c, err := checked(s)
	if err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	if err := c.apply(ctx, h); err != nil {
		return fmt.Errorf("apply %q: %w", title(c), err)
	}
	return nil
}

// Revert takes a change back. What is gone already is no error, and what stands
// in its place now, but differs from the step, is left alone.
func (h *Host) Revert(ctx context.Context, s Step) error {
	c, err := checked(s)
	if err != nil {
		return fmt.Errorf("revert: %w", err)
	}
	if err := c.revert(ctx, h); err != nil {
		return fmt.Errorf("revert %q: %w", title(c), err)
	}
	return nil
}

// ApplyAll applies steps in order, up to the first that fails, and returns how
// many it has applied. Nothing is applied if one of them is invalid. Tables that
// follow each other come into effect at the same moment.
func (h *Host) ApplyAll(ctx context.Context, steps []Step) (done int, err error) {
	for i, s := range steps {
		if err := s.Validate(); err != nil {
			return 0, fmt.Errorf("step %d of %d: %w", i+1, len(steps), err)
		}
	}
	for done < len(steps) {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		tables := leadingTables(steps[done:])
		if len(tables) < 2 {
			if err := h.Apply(ctx, steps[done]); err != nil {
				return done, err
			}
			done++
			continue
		}
		var script strings.Builder
		for _, t := range tables {
			script.WriteString(t.remake())
		}
		if err := nft(ctx, script.String()); err != nil {
			return done, fmt.Errorf("apply %d tables from %s %s on: %w", len(tables), tables[0].Family, tables[0].Name, err)
		}
		done += len(tables)
	}
	return done, nil
}

// RevertAll reverts steps from the last to the first. It goes on after an error
// and returns all of them.
func (h *Host) RevertAll(ctx context.Context, steps []Step) error {
	steps = slices.Clone(steps)
	slices.Reverse(steps)
	var errs []error
	for len(steps) > 0 {
		tables := leadingTables(steps)
		if len(tables) < 2 {
			errs = append(errs, h.Revert(ctx, steps[0]))
			steps = steps[1:]
			continue
		}
		var script strings.Builder
		for _, t := range tables {
			script.WriteString(t.remove())
		}
		if err := nft(ctx, script.String()); err != nil {
			errs = append(errs, fmt.Errorf("revert %d tables from %s %s on: %w", len(tables), tables[0].Family, tables[0].Name, err))
		}
		steps = steps[len(tables):]
	}
	return errors.Join(errs...)
}

// leadingTables returns the tables at the front of valid steps.
func leadingTables(steps []Step) []*Table {
	var tables []*Table
	for _, s := range steps {
		if s.Validate() != nil || s.Table == nil {
			break
		}
		tables = append(tables, s.Table)
	}
	return tables
}

// Replace puts one route in the place of another to the same destination, or
// one table in the place of another, such that no packet sees neither. The old
// one may be gone already.
func (h *Host) Replace(ctx context.Context, old, new Step) error {
	before, err := checked(old)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	after, err := checked(new)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	switch {
	case old.Route != nil && new.Route != nil:
		err = h.replaceRoute(old.Route, new.Route)
	case old.Table != nil && new.Table != nil:
		err = nft(ctx, old.Table.remove()+new.Table.remake())
	default:
		err = invalid("only routes and tables are replaced in place")
	}
	if err != nil {
		return fmt.Errorf("replace %q by %q: %w", title(before), title(after), err)
	}
	return nil
}

func checked(s Step) (change, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	return s.change()
}

// title names a change in an error.
func title(c change) string {
	if t, ok := c.(*Table); ok {
		return fmt.Sprintf("nft table %s %s", t.Family, t.Name)
	}
	line, _, _ := strings.Cut(c.command(), "\n")
	return line
}

// complete repeats a dump that the kernel says to have been disturbed by a
// change meanwhile.
func complete[T any](dump func() (T, error)) (result T, err error) {
	for range 5 {
		result, err = dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return result, err
		}
	}
	return result, err
}

// link returns the device of a name.
func (h *Host) link(name string) (netlink.Link, error) {
	l, err := h.kernel.LinkByName(name)
	if isGone(err) {
		return nil, fmt.Errorf("%w: no network device %s", unix.ENODEV, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read device %s: %w", name, err)
	}
	return l, nil
}

// isGone tells the errors for what is not there.
func isGone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) ||
		errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENXIO)
}

// familyOf returns the address family of an address, in the kernel's numbers.
func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
