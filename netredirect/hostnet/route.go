package hostnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// defaultMetric6 is what the kernel gives an IPv6 route without one
// (IP6_RT_PRIO_USER, include/uapi/linux/ipv6_route.h).
const defaultMetric6 = 1024

func (r *Route) apply(_ context.Context, h *Host) error {
	want, err := r.message(h)
	if err != nil {
		return err
	}
	standing, err := h.routesTo(r)
	if err != nil {
		return err
	}
	for _, s := range standing {
		if sameRoute(s, want) {
			return nil
		}
		return r.taken(h, s)
	}
	return h.kernel.RouteAdd(&want)
}

func (r *Route) revert(_ context.Context, h *Host) error {
	want, err := r.message(h)
	if isGone(err) {
		return nil // and its routes went with the device
	}
	if err != nil {
		return err
	}
	standing, err := h.routesTo(r)
	if err != nil {
		return err
	}
	for _, s := range standing {
		if !sameRoute(s, want) {
			continue
		}
		if err := h.kernel.RouteDel(&want); err != nil && !isGone(err) {
			return err
		}
		return nil
	}
	return nil
}

// replaceRoute swaps routes to one destination in one message.
func (h *Host) replaceRoute(old, new *Route) error {
	if old.Table != new.Table || old.Dst != new.Dst {
		return invalid("routes to different destinations do not replace each other")
	}
	want, err := new.message(h)
	if err != nil {
		return err
	}
	former, err := old.message(h)
	if err != nil && !isGone(err) {
		return err
	}
	formerGone := err != nil
	standing, err := h.routesTo(new)
	if err != nil {
		return err
	}
	for _, s := range standing {
		if sameRoute(s, want) {
			return nil
		}
		if formerGone || !sameRoute(s, former) {
			return new.taken(h, s)
		}
	}
	return h.kernel.RouteReplace(&want)
}

func (r *Route) taken(h *Host, s netlink.Route) error {
	return fmt.Errorf("%w: table %d has the route %q: remove it or use another table",
		ErrTaken, r.Table, h.describeRoute(s))
}

func (r *Route) message(h *Host) (netlink.Route, error) {
	link, err := h.link(r.Dev)
	if err != nil {
		return netlink.Route{}, err
	}
	m := netlink.Route{
		Table: r.Table, Dst: toIPNet(r.Dst), LinkIndex: link.Attrs().Index,
		Gw: toIP(r.Via), Src: toIP(r.Source), MTU: r.MTU,
		Protocol: Protocol, Type: unix.RTN_UNICAST, Family: familyOf(r.Dst.Addr()),
	}
	if r.Dst.Addr().Is4() && !r.Via.IsValid() {
		m.Scope = netlink.SCOPE_LINK
	}
	if r.Dst.Addr().Is6() {
		m.Priority = defaultMetric6
	}
	return m, nil
}

// routesTo lists what the table of a route has for its destination.
func (h *Host) routesTo(r *Route) ([]netlink.Route, error) {
	family := familyOf(r.Dst.Addr())
	list := func() (found []netlink.Route, err error) {
		err = h.routes.RouteListFilteredIter(family, &netlink.Route{Table: r.Table}, netlink.RT_FILTER_TABLE,
			func(s netlink.Route) bool {
				if destination(s) == r.Dst {
					found = append(found, s)
				}
				return true
			})
		return found, err
	}
	found, err := complete(list)
	if errors.Is(err, unix.ENOENT) { // no such table yet
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return found, nil
}

// destination returns where a route of the kernel leads; the default route may
// come without.
func destination(r netlink.Route) netip.Prefix {
	if r.Dst != nil {
		return fromIPNet(r.Dst)
	}
	if r.Family == unix.AF_INET {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func sameRoute(a, b netlink.Route) bool {
	return a.Table == b.Table && destination(a) == destination(b) && a.LinkIndex == b.LinkIndex &&
		a.Gw.Equal(b.Gw) && a.Src.Equal(b.Src) && a.MTU == b.MTU && a.Protocol == b.Protocol &&
		a.Type == b.Type && a.Tos == b.Tos && a.Priority == b.Priority && len(a.MultiPath) == len(b.MultiPath)
}

// describeRoute prints a route nearly as ip(8) does.
func (h *Host) describeRoute(r netlink.Route) string {
	return words(destination(r).String(),
		when(r.Gw != nil, "via %s", r.Gw),
		when(r.LinkIndex != 0, "dev %s", h.nameOf(r.LinkIndex)),
		fmt.Sprintf("table %d proto %d", r.Table, r.Protocol),
		when(r.Priority != 0, "metric %d", r.Priority))
}

// Gateways returns the next hops of the routes in the host's main table.
func (h *Host) Gateways() ([]netip.Addr, error) {
	list := func() (hops map[netip.Addr]bool, err error) {
		hops = map[netip.Addr]bool{}
		add := func(gateway net.IP, via netlink.Destination) {
			if len(gateway) > 0 {
				hops[fromIP(gateway)] = true
			}
			if v, ok := via.(*netlink.Via); ok { // an IPv6 next hop of an IPv4 route (RFC 8950)
				hops[fromIP(v.Addr)] = true
			}
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			err := h.routes.RouteListFilteredIter(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE,
				func(r netlink.Route) bool {
					add(r.Gw, r.Via)
					for _, hop := range r.MultiPath {
						add(hop.Gw, hop.Via)
					}
					return true
				})
			if err != nil {
				return nil, err
			}
		}
		return hops, nil
	}
	hops, err := complete(list)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return slices.SortedFunc(maps.Keys(hops), netip.Addr.Compare), nil
}

// RouteTo returns by which device and with which source address the host would
// send to dst, and the largest packet that may be sent there, in bytes.
func (h *Host) RouteTo(dst netip.Addr) (dev string, source netip.Addr, mtu int, err error) {
	if err := checkHost("destination", dst); err != nil {
		return "", netip.Addr{}, 0, fmt.Errorf("find route: %w", err)
	}
	routes, err := h.kernel.RouteGet(toIP(dst))
	if err == nil && len(routes) == 0 {
		err = unix.ENETUNREACH
	}
	if err != nil {
		return "", netip.Addr{}, 0, fmt.Errorf("find route to %s: %w", dst, err)
	}
	link, err := h.kernel.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", netip.Addr{}, 0, fmt.Errorf("find route to %s: %w", dst, err)
	}
	mtu = link.Attrs().MTU
	if routes[0].MTU != 0 {
		mtu = min(mtu, routes[0].MTU)
	}
	return link.Attrs().Name, fromIP(routes[0].Src), mtu, nil
}
