package hostnet

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Leftovers names all that bears the marks of wanmig, a line each: devices,
// addresses, rules, routes, neighbours and tables. It cannot know of sysctls and
// FDB entries. What could be listed comes with the error of what could not.
func (h *Host) Leftovers(ctx context.Context) ([]string, error) {
	var found []string
	var errs []error
	add := func(names []string, err error) {
		found = append(found, names...)
		errs = append(errs, err)
	}
	add(h.ourDevices())
	add(h.ourAddresses())
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		add(h.ourRules(family))
		add(h.ourRoutes(family))
		add(h.ourNeighbours(family, 0))
		add(h.ourNeighbours(family, unix.NTF_PROXY))
	}
	add(tables(ctx))
	if err := errors.Join(errs...); err != nil {
		return found, fmt.Errorf("look for leftovers: %w", err)
	}
	return found, nil
}

func (h *Host) ourDevices() (found []string, err error) {
	links, err := complete(h.kernel.LinkList)
	for _, l := range links {
		if l.Attrs().Alias == alias {
			found = append(found, fmt.Sprintf("device %s", l.Attrs().Name))
		}
	}
	return found, err
}

func (h *Host) ourAddresses() (found []string, err error) {
	entries, err := complete(addresses)
	for _, e := range entries {
		if e.ours() {
			found = append(found, fmt.Sprintf("address %s dev %s", e.prefix, h.nameOf(e.index)))
		}
	}
	return found, err
}

func (h *Host) ourRules(family int) (found []string, err error) {
	rules, err := h.rules(family)
	for _, r := range rules {
		if r.Protocol == Protocol {
			found = append(found, "rule "+describeRule(r))
		}
	}
	return found, err
}

func (h *Host) ourRoutes(family int) ([]string, error) {
	routes, err := complete(func() ([]netlink.Route, error) {
		return h.routes.RouteListFiltered(family, &netlink.Route{Protocol: Protocol, Table: unix.RT_TABLE_UNSPEC},
			netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	var found []string
	for _, r := range routes {
		found = append(found, "route "+h.describeRoute(r))
	}
	return found, err
}

func (h *Host) ourNeighbours(family, flags int) (found []string, err error) {
	entries, err := neighbourEntries(family, flags)
	for _, e := range entries {
		if e.protocol == Protocol {
			found = append(found, words("neighbour", when(flags != 0, "proxy"), e.ip.String(), "dev", h.nameOf(e.index)))
		}
	}
	return found, err
}
