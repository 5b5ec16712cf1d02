package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespaceDir is where ip netns looks for names.
const namespaceDir = "/run/netns"

// nameNamespace gives a network namespace, a file below /proc, a name for ip
// netns, and a life beyond its processes.
func nameNamespace(namespace, name string) error {
	if err := shareNamespaceDir(); err != nil {
		return fmt.Errorf("name network namespace: %w", err)
	}
	path := filepath.Join(namespaceDir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("name network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(namespace, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("name network namespace %s: %w", name, err)
	}
	return nil
}

// shareNamespaceDir mounts namespaceDir onto itself as ip netns does when it
// first finds it a plain directory. Were that left to ip, its mount would cover
// names that exist by then, and nobody could unmount them any more.
func shareNamespaceDir() error {
	if err := os.MkdirAll(namespaceDir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(namespaceDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	// ip netns takes this lock too, so that only one of all makes the mount.
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", namespaceDir, err)
	}
	err = unix.Mount("", namespaceDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // no mount point yet
		if err := unix.Mount(namespaceDir, namespaceDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s onto itself: %w", namespaceDir, err)
		}
		err = unix.Mount("", namespaceDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", namespaceDir, err)
	}
	return nil
}

// removeNamespace takes the name away, however far nameNamespace came.
func removeNamespace(ctx context.Context, name string) error {
	path := filepath.Join(namespaceDir, name)
	for {
		// EINVAL: not mounted.
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
		err := os.Remove(path)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		// Mounted again or still, through a copy of namespaceDir.
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove network namespace: %w", err)
		}
		if pause(ctx) != nil {
			return fmt.Errorf("remove network namespace: %w: if %s was mounted over after the lab was made, umount --lazy %s and run wanlab down again",
				err, namespaceDir, namespaceDir)
		}
	}
}

// onThread runs f on a thread that enter has moved to another network
// namespace, and that ends afterwards.
func onThread(enter, f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		err := enter()
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

// inNamespace runs f on a thread within the site's network namespace.
func (s *Site) inNamespace(f func() error) error {
	enter := func() error {
		fd, err := unix.Open(s.namespacePath(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace of %s: %w", s.Name, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace of %s: %w", s.Name, err)
		}
		return nil
	}
	return onThread(enter, f)
}

// connectGuests makes the bridges for guests.
func (s *Site) connectGuests() error {
	err := s.inNamespace(func() error {
		if err := setSysctls(); err != nil {
			return err
		}
		if err := raise("lo"); err != nil {
			return err
		}
		for _, n := range s.guestNetworks() {
			// A fixed address, or the bridge would take that of its lowest port.
			a := n.Addr.Addr().As4()
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{
				Name: n.Bridge, MTU: linkMTU, HardwareAddr: net.HardwareAddr{2, 0, a[0], a[1], a[2], a[3]},
			}}
			if err := netlink.LinkAdd(bridge); err != nil {
				return fmt.Errorf("make bridge: %w", err)
			}
			if err := raise(n.Bridge, n.Addr, n.Addr6); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("connect %s: %w", s.Name, err)
	}
	return nil
}

// connectPeer makes an end of the link to another data centre.
func (s *Site) connectPeer(device string, peer *Site) (end tun, err error) {
	err = s.inNamespace(func() error {
		if end, err = openTUN(device); err != nil {
			return err
		}
		for _, family := range []struct{ own, peer netip.Prefix }{{s.WANAddr, peer.WANAddr}, {s.WANAddr6, peer.WANAddr6}} {
			if err := joinLink(device, family.own, family.peer); err != nil {
				return err
			}
		}
		for _, n := range peer.guestNetworks() {
			if err := errors.Join(addRoute(device, n.Addr.Masked(), peer.WANAddr.Addr()), addRoute(device, n.Addr6.Masked(), peer.WANAddr6.Addr())); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return tun{}, fmt.Errorf("connect %s to %s: %w", s.Name, peer.Name, err)
	}
	return end, nil
}

// wanQueue is the number of packets that a TUN holds for the emulator, enough
// for its queue to be the one that fills.
const wanQueue = 10000

// joinLink raises an end of a link. Beyond the network of the pair's link it has
// its site's address and a route to the peer's.
func joinLink(device string, own, peer netip.Prefix) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", device, err)
	}
	if err := netlink.LinkSetTxQLen(link, wanQueue); err != nil {
		return fmt.Errorf("set queue of %s: %w", device, err)
	}
	if own.Contains(peer.Addr()) {
		return raise(device, own)
	}
	if err := raise(device, host(own.Addr())); err != nil {
		return err
	}
	return routeHost(link, peer.Addr(), own.Addr())
}

// connectUsers plugs the users' interface into a data centre's bridge.
func (s *Site) connectUsers(dc *Site) error {
	err := s.inNamespace(func() error {
		if err := setSysctls(); err != nil {
			return err
		}
		if err := raise("lo"); err != nil {
			return err
		}
		if err := s.addVeth("eth0", dc); err != nil {
			return err
		}
		if err := raise("eth0", s.Addr, s.Addr6); err != nil {
			return err
		}
		return errors.Join(
			addRoute("eth0", netip.MustParsePrefix("0.0.0.0/0"), dc.BridgeAddr.Addr()),
			addRoute("eth0", netip.MustParsePrefix("::/0"), dc.BridgeAddr6.Addr()))
	})
	if err != nil {
		return fmt.Errorf("connect %s: %w", s.Name, err)
	}
	err = dc.inNamespace(func() error {
		port, err := netlink.LinkByName(Users)
		if err != nil {
			return err
		}
		bridge, err := netlink.LinkByName(dc.Bridge)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(port, bridge); err != nil {
			return err
		}
		return netlink.LinkSetUp(port)
	})
	if err != nil {
		return fmt.Errorf("connect %s to %s: %w", s.Name, dc.Name, err)
	}
	return nil
}

// addVeth makes a cable from an interface of the users to one named after them
// in a data centre.
func (s *Site) addVeth(name string, dc *Site) error {
	return s.inNamespace(func() error {
		fd, err := unix.Open(dc.namespacePath(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace of %s: %w", dc.Name, err)
		}
		defer unix.Close(fd)
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: name, MTU: linkMTU},
			PeerName:      Users,
			PeerNamespace: netlink.NsFd(fd),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make interface: %w", err)
		}
		return nil
	})
}

// setSysctls sets what a new network namespace may have inherited otherwise
// from the host. It comes before the interfaces, which copy the defaults.
func setSysctls() error {
	for _, set := range []struct{ key, value string }{
		{"ipv4/ip_forward", "1"},
		{"ipv4/conf/all/rp_filter", "0"},
		{"ipv4/conf/default/rp_filter", "0"},
		{"ipv6/conf/all/disable_ipv6", "0"},
		{"ipv6/conf/default/disable_ipv6", "0"},
		{"ipv6/conf/all/forwarding", "1"},
		{"ipv6/conf/default/forwarding", "1"},
		{"ipv6/conf/default/accept_ra", "0"},
		{"ipv6/conf/default/accept_dad", "0"}, // no second of waiting for an address
	} {
		if err := os.WriteFile("/proc/sys/net/"+set.key, []byte(set.value), 0o644); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	return nil
}

func raise(name string, addrs ...netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	for _, a := range addrs {
		flags := 0
		if a.Addr().Is6() {
			flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(a), Flags: flags}); err != nil {
			return fmt.Errorf("add address %s to %s: %w", a, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("raise %s: %w", name, err)
	}
	return nil
}

func addRoute(name string, to netip.Prefix, via netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(to), Gw: via.AsSlice()}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add route to %s: %w", to, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
