package hostnet

import (
	"bytes"
	"context"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func (f *FDB) apply(_ context.Context, h *Host) error {
	index, standing, err := f.standing(h)
	if err != nil {
		return err
	}
	for _, e := range standing {
		static := e.state&unix.NUD_NOARP != 0
		switch {
		case static && e.index == index:
			// Ours, or one that libvirt has put there, which says the same
			// and is not sticky: Revert tells them apart.
			return nil
		case static || e.state&unix.NUD_PERMANENT != 0:
			return fmt.Errorf("%w: the bridge has %v fixed at %s: remove it", ErrTaken, e.mac, h.nameOf(e.index))
		}
	}
	_, err = request(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, f.message(index)...)
	return err
}

func (f *FDB) revert(_ context.Context, h *Host) error {
	index, standing, err := f.standing(h)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range standing {
		if e.index != index || e.state&unix.NUD_NOARP == 0 || e.flags&netlink.NTF_STICKY == 0 {
			continue
		}
		if _, err := request(unix.RTM_DELNEIGH, unix.NLM_F_ACK, f.message(index)...); err != nil && !isGone(err) {
			return err
		}
	}
	return nil
}

// standing returns the port and what its bridge has for the MAC address. A
// device that is no port anymore is as good as gone.
func (f *FDB) standing(h *Host) (index int, found []neighbourEntry, err error) {
	link, err := h.link(f.Dev)
	if err != nil {
		return 0, nil, err
	}
	bridge := link.Attrs().MasterIndex
	if bridge == 0 {
		return 0, nil, fmt.Errorf("%w: %s is no port of a bridge", unix.ENXIO, f.Dev)
	}
	entries, err := neighbourEntries(unix.AF_BRIDGE, 0)
	if err != nil {
		return 0, nil, err
	}
	mac := parseMAC(f.MAC)
	for _, e := range entries {
		if e.master == bridge && e.vlan == f.VLAN && bytes.Equal(e.mac, mac) {
			found = append(found, e)
		}
	}
	return link.Attrs().Index, found, nil
}

func (f *FDB) message(index int) []nl.NetlinkRequestData {
	parts := []nl.NetlinkRequestData{
		&netlink.Ndmsg{
			Family: unix.AF_BRIDGE, Index: uint32(index),
			State: unix.NUD_NOARP, Flags: unix.NTF_MASTER | netlink.NTF_STICKY,
		},
		nl.NewRtAttr(unix.NDA_LLADDR, parseMAC(f.MAC)),
	}
	if f.VLAN != 0 {
		parts = append(parts, nl.NewRtAttr(unix.NDA_VLAN, nl.Uint16Attr(uint16(f.VLAN))))
	}
	return parts
}
