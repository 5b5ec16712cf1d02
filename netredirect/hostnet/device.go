package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ip6tnlNoEncapLimit keeps the kernel from adding a destination option of 8
// bytes to each packet (IP6_TNL_F_IGN_ENCAP_LIMIT, include/uapi/linux/ip6_tunnel.h).
const ip6tnlNoEncapLimit = 1

// addrGenModeNone keeps the kernel from giving a device a link-local address,
// with which it would ask for routers through the tunnel for as long as that
// stands (IN6_ADDR_GEN_MODE_NONE, include/uapi/linux/if_link.h).
const addrGenModeNone = 1

func (d *Device) apply(_ context.Context, h *Host) error {
	link, err := h.kernel.LinkByName(d.Name)
	if d.Kind == KindTUN && isGone(err) {
		return nil // its carrier makes it
	}
	if isGone(err) {
		link, err = h.addDevice(d)
	}
	if err != nil {
		return err
	}
	if differs := h.differs(d, link); differs != "" {
		return fmt.Errorf("%w: device %s exists and %s: remove or rename it", ErrTaken, d.Name, differs)
	}
	if d.Kind == KindTUN {
		return nil
	}
	// An apply that was cut short may have left any of these out.
	if d.MTU != 0 && link.Attrs().MTU != d.MTU {
		if err := h.kernel.LinkSetMTU(link, d.MTU); err != nil {
			return fmt.Errorf("set MTU: %w", err)
		}
	}
	if link.Attrs().Alias != alias {
		if err := h.kernel.LinkSetAlias(link, alias); err != nil {
			return fmt.Errorf("set alias: %w", err)
		}
	}
	if d.tunnel() {
		err := h.kernel.LinkSetIP6AddrGenMode(link, addrGenModeNone)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) { // a kernel without IPv6
			return fmt.Errorf("keep it from making itself an address: %w", err)
		}
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := h.kernel.LinkSetUp(link); err != nil {
			return fmt.Errorf("set up: %w", err)
		}
	}
	return nil
}

func (d *Device) revert(_ context.Context, h *Host) error {
	link, err := h.kernel.LinkByName(d.Name)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if d.Kind == KindTUN || h.differs(d, link) != "" {
		return nil
	}
	if err := h.kernel.LinkDel(link); err != nil && !isGone(err) {
		return err
	}
	return nil
}

// addDevice makes a device, and the kernel load the module for it.
func (h *Host) addDevice(d *Device) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = d.Name, d.MTU
	var link netlink.Link
	switch d.Kind {
	case KindIPIP:
		link = &netlink.Iptun{LinkAttrs: attrs, Local: toIP(d.Local), Remote: toIP(d.Remote),
			Ttl: uint8(d.TTL), PMtuDisc: 1, Proto: unix.IPPROTO_IPIP}
	case KindSit: // protocol 0: any
		link = &netlink.Sittun{LinkAttrs: attrs, Local: toIP(d.Local), Remote: toIP(d.Remote),
			Ttl: uint8(d.TTL), PMtuDisc: 1}
	case KindIP6Tnl:
		link = &netlink.Ip6tnl{LinkAttrs: attrs, Local: toIP(d.Local), Remote: toIP(d.Remote),
			Ttl: uint8(d.TTL), Flags: ip6tnlNoEncapLimit}
	case KindVLAN:
		parent, err := h.link(d.Parent)
		if err != nil {
			return nil, err
		}
		attrs.ParentIndex = parent.Attrs().Index
		link = &netlink.Vlan{LinkAttrs: attrs, VlanId: d.VLAN, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}
	}
	err := h.kernel.LinkAdd(link)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil, fmt.Errorf("%w: devices of kind %s (module %s)", ErrNoKernelSupport, d.Kind, module(d.Kind))
	case errors.Is(err, unix.EEXIST):
		return nil, fmt.Errorf("%w: %s: remove it", ErrTaken, h.twin(d))
	case err != nil:
		return nil, err
	}
	return h.link(d.Name)
}

func module(kind string) string {
	switch kind {
	case KindIP6Tnl:
		return "ip6_tunnel"
	case KindVLAN:
		return "8021q"
	}
	return kind
}

// twin names the device of another name that keeps a new one from being made:
// the kernel has one tunnel of a kind between two ends, one device for a VLAN.
func (h *Host) twin(d *Device) string {
	links, err := complete(h.kernel.LinkList)
	if err == nil {
		for _, link := range links {
			if h.differs(d, link) == "" {
				return fmt.Sprintf("device %s has the same ends", link.Attrs().Name)
			}
		}
	}
	return "a device with the same ends exists"
}

// differs tells in which way a device is another than the step's, "" if it is
// not.
func (h *Host) differs(d *Device, link netlink.Link) string {
	if a := link.Attrs().Alias; a != "" && a != alias {
		return fmt.Sprintf("has the alias %q", a)
	}
	same := false
	is := link.Type()
	switch l := link.(type) {
	case *netlink.Iptun:
		same = d.Kind == KindIPIP && d.hasEnds(l.Local, l.Remote) && l.Proto == unix.IPPROTO_IPIP
		is = fmt.Sprintf("ipip tunnel from %v to %v", l.Local, l.Remote)
	case *netlink.Sittun:
		same = d.Kind == KindSit && d.hasEnds(l.Local, l.Remote) && l.Proto == 0
		is = fmt.Sprintf("sit tunnel from %v to %v, protocol %d", l.Local, l.Remote, l.Proto)
	case *netlink.Ip6tnl:
		same = d.Kind == KindIP6Tnl && d.hasEnds(l.Local, l.Remote) && l.Proto == 0
		is = fmt.Sprintf("ip6tnl tunnel from %v to %v, protocol %d", l.Local, l.Remote, l.Proto)
	case *netlink.Vlan:
		parent, err := h.kernel.LinkByIndex(l.ParentIndex)
		same = d.Kind == KindVLAN && err == nil && parent.Attrs().Name == d.Parent && l.VlanId == d.VLAN
		is = fmt.Sprintf("VLAN %d", l.VlanId)
	case *netlink.Tuntap:
		same = d.Kind == KindTUN && l.Mode == netlink.TUNTAP_MODE_TUN
		is = "TUN or tap"
	}
	if same {
		return ""
	}
	return "is another: " + is
}

// tunnel tells the kinds that have two ends and are made by the kernel.
func (d *Device) tunnel() bool {
	return d.Kind == KindIPIP || d.Kind == KindSit || d.Kind == KindIP6Tnl
}

func (d *Device) hasEnds(local, remote net.IP) bool {
	return fromIP(local) == d.Local && fromIP(remote) == d.Remote
}
