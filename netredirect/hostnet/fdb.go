package hostnet

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func (f *FDB) apply(_ context.Context, h *Host) error {
	index, standing, err := f.standing(h)
	if err != nil {
		return err
	}
	// One that stands is ours, or one that libvirt has put there, which says the
	// same and is not sticky: Revert tells them apart.
	if slices.ContainsFunc(standing, func(e neighbourEntry) bool { return e.static() && e.index == index && e.vlan == f.VLAN }) {
		return nil
	}
	for _, e := range standing {
		ours := e.index == index && e.flags&netlink.NTF_STICKY != 0
		if (e.static() || e.state&unix.NUD_PERMANENT != 0) && !ours {
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
		if e.index != index || e.vlan != f.VLAN || !e.static() || e.flags&netlink.NTF_STICKY == 0 {
			continue
		}
		if _, err := request(unix.RTM_DELNEIGH, unix.NLM_F_ACK, f.message(index)...); err != nil && !isGone(err) {
			return err
		}
	}
	return nil
}

// static tells the entries of a bridge that do not age.
func (e neighbourEntry) static() bool { return e.state&unix.NUD_NOARP != 0 }

// standing returns the port and what its bridge has for the MAC address: told of
// no VLAN, the kernel changes the entries of all VLANs that the port is in
// (br_fdb_add, net/bridge/br_fdb.c). A device that is no port anymore is as good
// as gone.
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
		if e.master == bridge && (e.vlan == f.VLAN || f.VLAN == 0) && bytes.Equal(e.mac, mac) {
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
