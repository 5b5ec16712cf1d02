package hostnet

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
)

// A Bridge is what a plan must know of a Linux bridge.
type Bridge struct {
	Name      string
	Index     int
	MAC       net.HardwareAddr
	MTU       int            // bytes
	Prefixes  []netip.Prefix // addresses of the host on it with their lengths, without link-local ones
	VLANAware bool           // vlan_filtering is on
}

// Bridge returns the facts of a bridge.
func (h *Host) Bridge(name string) (Bridge, error) {
	link, err := h.link(name)
	if err != nil {
		return Bridge{}, fmt.Errorf("read bridge: %w", err)
	}
	bridge, ok := link.(*netlink.Bridge)
	if !ok {
		return Bridge{}, fmt.Errorf("read bridge: %s is no Linux bridge but of kind %s: only guests on Linux bridges can be redirected", name, link.Type())
	}
	entries, err := complete(addresses)
	if err != nil {
		return Bridge{}, fmt.Errorf("read bridge: %w", err)
	}
	b := Bridge{
		Name: name, Index: bridge.Index, MAC: bridge.HardwareAddr, MTU: bridge.MTU,
		VLANAware: bridge.VlanFiltering != nil && *bridge.VlanFiltering,
	}
	for _, e := range entries {
		if e.index == bridge.Index && !e.prefix.Addr().IsLinkLocalUnicast() {
			b.Prefixes = append(b.Prefixes, e.prefix)
		}
	}
	return b, nil
}

// PortVLAN returns the VLAN that untagged frames at a port of a bridge belong
// to, 0 if the bridge does not tell VLANs apart.
func (h *Host) PortVLAN(port string) (int, error) {
	link, err := h.link(port)
	if err != nil {
		return 0, fmt.Errorf("read VLAN of port: %w", err)
	}
	if link.Attrs().MasterIndex == 0 {
		return 0, fmt.Errorf("read VLAN of port: %s is no port of a bridge", port)
	}
	bridge, err := h.Bridge(h.nameOf(link.Attrs().MasterIndex))
	if err != nil {
		return 0, fmt.Errorf("read VLAN of port %s: %w", port, err)
	}
	if !bridge.VLANAware {
		return 0, nil
	}
	vlans, err := complete(h.kernel.BridgeVlanList)
	if err != nil {
		return 0, fmt.Errorf("read VLAN of port %s: %w", port, err)
	}
	for _, v := range vlans[int32(link.Attrs().Index)] {
		if v.Flags&nl.BRIDGE_VLAN_INFO_PVID != 0 {
			return int(v.Vid), nil
		}
	}
	return 0, fmt.Errorf("read VLAN of port: %s has none for untagged frames: a guest that tags its frames cannot be redirected", port)
}
