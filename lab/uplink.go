package lab

import (
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The users' own addresses in a lab with services, which their router announces.
var (
	usersLoopback  = netip.MustParsePrefix("10.30.0.1/32")
	usersLoopback6 = netip.MustParsePrefix("fd00:30::1/128")
)

// uplink is the network on which the users' router and a data centre's meet,
// and the data centre's agent with them. At local-dc it is the guests' own.
type uplink struct {
	Device   string       // of the users
	DC       netip.Prefix // of the data centre's router
	DC6      netip.Prefix
	Agent    netip.Prefix
	Agent6   netip.Prefix
	Users    netip.Prefix
	Users6   netip.Prefix
	ASN      int // of the data centre's router
	AgentASN int
}

func (l *Lab) uplink(dc *Site) uplink {
	n := dcNumber(dc.Name)
	u := uplink{ASN: 65000 + 10*n, AgentASN: 65001 + 10*n}
	if dc.Name == LocalDC {
		u.Device = "eth0"
		u.DC, u.DC6 = dc.BridgeAddr, dc.BridgeAddr6
		u.Agent, u.Agent6 = netip.MustParsePrefix("10.10.0.2/24"), netip.MustParsePrefix("fd00:10::2/64")
		u.Users, u.Users6 = l.Sites[Users].Addr, l.Sites[Users].Addr6
		return u
	}
	address := func(host int) (v4, v6 netip.Prefix) {
		return netip.MustParsePrefix(fmt.Sprintf("10.254.%d.%d/29", n, host)), netip.MustParsePrefix(fmt.Sprintf("fd00:254:%d::%d/64", n, host))
	}
	u.Device = fmt.Sprintf("eth%d", slices.Index(l.DataCentres(), dc.Name))
	u.DC, u.DC6 = address(1)
	u.Users, u.Users6 = address(2)
	u.Agent, u.Agent6 = address(3)
	return u
}

const usersASN = 65030

// connectUplinks turns the users into a site with a router: its own address is
// what they send from, whichever way the packets go.
func (l *Lab) connectUplinks() error {
	users := l.Sites[Users]
	err := users.inNamespace(func() error {
		// An ARP request must not tell the address of lo, which is on no network.
		for _, scope := range []string{"all", "default"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+scope+"/arp_announce", []byte("2"), 0o644); err != nil {
				return fmt.Errorf("set sysctl: %w", err)
			}
		}
		return raise("lo", usersLoopback, usersLoopback6)
	})
	if err != nil {
		return fmt.Errorf("give users their own address: %w", err)
	}
	for _, name := range l.DataCentres() {
		dc := l.Sites[name]
		if name == LocalDC {
			err = l.shareBridge(dc)
		} else {
			err = l.addUplink(dc)
		}
		if err != nil {
			return fmt.Errorf("connect the routers of %s and users: %w", name, err)
		}
	}
	return nil
}

// shareBridge uses the bridge, to which the users are connected, for the routers.
func (l *Lab) shareBridge(dc *Site) error {
	u := l.uplink(dc)
	if err := dc.inNamespace(func() error { return raise(dc.Bridge, u.Agent, u.Agent6) }); err != nil {
		return err
	}
	return l.Sites[Users].inNamespace(func() error {
		link, err := netlink.LinkByName(u.Device)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", u.Device, err)
		}
		// The kernel's own route, and metric, with another source.
		for _, route := range []*netlink.Route{
			{Dst: ipNet(u.Users.Masked()), Src: usersLoopback.Addr().AsSlice(), Scope: netlink.SCOPE_LINK},
			{Dst: ipNet(u.Users6.Masked()), Src: usersLoopback6.Addr().AsSlice(), Priority: 256},
		} {
			route.LinkIndex, route.Protocol = link.Attrs().Index, unix.RTPROT_KERNEL
			if err := netlink.RouteReplace(route); err != nil {
				return fmt.Errorf("set source of route to %s: %w", route.Dst, err)
			}
		}
		return nil
	})
}

// addUplink joins the users and a data centre by a network of their own.
func (l *Lab) addUplink(dc *Site) error {
	u := l.uplink(dc)
	if err := l.Sites[Users].addVeth(u.Device, dc); err != nil {
		return err
	}
	if err := dc.inNamespace(func() error { return raise(Users, u.DC, u.DC6, u.Agent, u.Agent6) }); err != nil {
		return err
	}
	return l.Sites[Users].inNamespace(func() error { return raise(u.Device, u.Users, u.Users6) })
}
