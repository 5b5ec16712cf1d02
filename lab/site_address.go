package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Readdress gives a data centre other addresses in the WAN, as a provider may
// overnight: the new ones come, the old ones go, and names follow. What listens
// on one of the old addresses, as libvirtd does and an agent that is not
// configured otherwise, is not reached any more.
func (l *Lab) Readdress(ctx context.Context, site string) error {
	s, err := l.Site(site)
	if err != nil {
		return err
	}
	if s.Name == Users {
		return fmt.Errorf("readdress %s: they have no address in the WAN", site)
	}
	if err := s.alive(); err != nil {
		return err
	}
	before := [2]netip.Prefix{s.WANAddr, s.WANAddr6}
	s.WANAddr, s.WANAddr6 = nextWANAddr(s.WANAddr, s.Name), nextWANAddr(s.WANAddr6, s.Name)
	s.AgentAddr = netip.AddrPortFrom(s.WANAddr.Addr(), agentPort)
	s.LibvirtURI = libvirtURI(s.WANAddr.Addr())
	for _, name := range l.DataCentres() {
		if err := l.follow(l.Sites[name], s, before); err != nil {
			return fmt.Errorf("readdress %s: %w", site, err)
		}
	}
	if err := s.inNamespace(func() error { return removeAddresses(before) }); err != nil {
		return fmt.Errorf("readdress %s: %w", site, err)
	}
	return l.save()
}

// nextWANAddr is 10.255.8.n or fd00:255:8::n first, n being the site's number,
// and then those of the next networks.
func nextWANAddr(p netip.Prefix, site string) netip.Prefix {
	const first = 8 // beyond all others' networks
	n := byte(dcNumber(site))
	if p.Addr().Is4() {
		b := p.Addr().As4()
		return host(netip.AddrFrom4([4]byte{b[0], b[1], max(b[2]+1, first), n}))
	}
	b := p.Addr().As16()
	return host(netip.AddrFrom16([16]byte{b[0], b[1], b[2], b[3], 0, max(b[5]+1, first), 15: n}))
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// follow has a data centre know the new addresses of s, besides those before,
// and has s take them on its link to that data centre.
func (l *Lab) follow(peer, s *Site, before [2]netip.Prefix) error {
	if err := os.WriteFile(peer.Dir+hostsFile, []byte(hosts(l)), 0o644); err != nil {
		return fmt.Errorf("write names: %w", err)
	}
	if peer == s {
		return nil
	}
	here, there := [2]netip.Prefix{s.WANAddr, s.WANAddr6}, [2]netip.Prefix{peer.WANAddr, peer.WANAddr6}
	for i := range here {
		err := peer.inNamespace(func() error {
			link, err := linkTo(before[i].Addr())
			if err != nil {
				return err
			}
			return routeHost(link, here[i].Addr(), there[i].Addr())
		})
		if err != nil {
			return err
		}
		err = s.inNamespace(func() error {
			link, err := linkTo(there[i].Addr())
			if err != nil {
				return err
			}
			if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ipNet(here[i]), Flags: unix.IFA_F_NODAD}); err != nil {
				return fmt.Errorf("add address %s: %w", here[i], err)
			}
			return routeHost(link, there[i].Addr(), here[i].Addr())
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// linkTo is the device by which an address is reached.
func linkTo(a netip.Addr) (netlink.Link, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return nil, fmt.Errorf("find route to %s: %w", a, err)
	}
	return netlink.LinkByIndex(routes[0].LinkIndex)
}

// routeHost has packets to an address take a device, from one of our addresses.
func routeHost(link netlink.Link, to, from netip.Addr) error {
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(host(to)), Src: from.AsSlice()}
	if to.Is4() {
		route.Scope = netlink.SCOPE_LINK
	}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set route to %s: %w", to, err)
	}
	return nil
}

// removeAddresses takes addresses from all devices that have them.
func removeAddresses(before [2]netip.Prefix) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, link := range links {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
		}
		for _, a := range addrs {
			for _, old := range before {
				if !a.IP.Equal(old.Addr().AsSlice()) {
					continue
				}
				if err := netlink.AddrDel(link, &a); err != nil {
					return fmt.Errorf("remove address %s: %w", old, err)
				}
			}
		}
	}
	return nil
}
