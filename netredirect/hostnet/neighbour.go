package hostnet

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// neighbourEntry is an entry of the ARP, NDP or bridge forwarding table as the
// kernel lists it.
type neighbourEntry struct {
	family   int
	index    int
	state    int // NUD_*
	flags    int // NTF_*
	ip       netip.Addr
	mac      net.HardwareAddr
	vlan     int
	master   int // index of the bridge
	protocol int
}

func (n *Neighbour) apply(_ context.Context, h *Host) error {
	index, standing, err := n.standing(h)
	if err != nil {
		return err
	}
	for _, e := range standing {
		if n.is(e) {
			return nil
		}
		// What the kernel has learned from the network is no one's setting.
		learned := e.state&(unix.NUD_PERMANENT|unix.NUD_NOARP) == 0 && e.flags&unix.NTF_EXT_LEARNED == 0
		if n.Proxy || !learned {
			return fmt.Errorf("%w: %s has an entry for %v already (%v, protocol %d): remove it",
				ErrTaken, n.Dev, n.IP, e.mac, e.protocol)
		}
	}
	_, err = request(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, n.message(index)...)
	return err
}

func (n *Neighbour) revert(_ context.Context, h *Host) error {
	index, standing, err := n.standing(h)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range standing {
		if !n.is(e) {
			continue
		}
		if _, err := request(unix.RTM_DELNEIGH, unix.NLM_F_ACK, n.message(index)...); err != nil && !isGone(err) {
			return err
		}
	}
	return nil
}

// standing returns the device and what it has for the address.
func (n *Neighbour) standing(h *Host) (index int, found []neighbourEntry, err error) {
	link, err := h.link(n.Dev)
	if err != nil {
		return 0, nil, err
	}
	flags := 0
	if n.Proxy {
		flags = unix.NTF_PROXY
	}
	entries, err := neighbourEntries(familyOf(n.IP), flags)
	if err != nil {
		return 0, nil, err
	}
	index = link.Attrs().Index
	for _, e := range entries {
		if e.index == index && e.ip == n.IP {
			found = append(found, e)
		}
	}
	return index, found, nil
}

// is tells whether an entry for the address is the step's own.
func (n *Neighbour) is(e neighbourEntry) bool {
	if e.protocol != Protocol {
		return false
	}
	return n.Proxy || e.state&unix.NUD_PERMANENT != 0 && bytes.Equal(e.mac, parseMAC(n.MAC))
}

func (n *Neighbour) message(index int) []nl.NetlinkRequestData {
	head := &netlink.Ndmsg{Family: uint8(familyOf(n.IP)), Index: uint32(index), State: unix.NUD_PERMANENT}
	if n.Proxy {
		head.Flags = unix.NTF_PROXY
	}
	parts := []nl.NetlinkRequestData{
		head,
		nl.NewRtAttr(unix.NDA_DST, n.IP.AsSlice()),
		nl.NewRtAttr(netlink.NDA_PROTOCOL, []byte{Protocol}), // the library has none
	}
	if !n.Proxy {
		parts = append(parts, nl.NewRtAttr(unix.NDA_LLADDR, parseMAC(n.MAC)))
	}
	return parts
}

// Neighbours returns the addresses that the host knows on a device, from ARP and
// NDP or set by hand, with where they are.
func (h *Host) Neighbours(dev string) (map[netip.Addr]net.HardwareAddr, error) {
	link, err := h.link(dev)
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	known := map[netip.Addr]net.HardwareAddr{}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		entries, err := neighbourEntries(family, 0)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if e.index == link.Attrs().Index && len(e.mac) == 6 && e.state&(unix.NUD_INCOMPLETE|unix.NUD_FAILED|unix.NUD_NOARP) == 0 {
				known[e.ip] = e.mac
			}
		}
	}
	return known, nil
}

// neighbourEntries lists those of a family: AF_INET, AF_INET6, both with
// NTF_PROXY for the addresses that are answered for, or AF_BRIDGE.
func neighbourEntries(family, flags int) ([]neighbourEntry, error) {
	return complete(func() ([]neighbourEntry, error) {
		messages, dumpErr := request(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, &netlink.Ndmsg{Family: uint8(family), Flags: uint8(flags)})
		if messages == nil && dumpErr != nil {
			return nil, fmt.Errorf("list neighbours: %w", dumpErr)
		}
		var entries []neighbourEntry
		for _, m := range messages {
			e, err := parseNeighbour(m)
			if err != nil {
				return nil, fmt.Errorf("list neighbours: %w", err)
			}
			if e.family == family {
				entries = append(entries, e)
			}
		}
		return entries, dumpErr
	})
}

// parseNeighbour reads an RTM_NEWNEIGH:
//
//	bytes  field
//	1      family
//	3      padding
//	4      index of the device
//	2      state
//	1      flags
//	1      type
//	       attributes
func parseNeighbour(m []byte) (neighbourEntry, error) {
	const head = 12
	if len(m) < head {
		return neighbourEntry{}, errors.New("message about a neighbour too short")
	}
	attrs, err := attributes(m[head:])
	if err != nil {
		return neighbourEntry{}, err
	}
	e := neighbourEntry{
		family: int(m[0]),
		index:  int(int32(binary.NativeEndian.Uint32(m[4:]))),
		state:  int(binary.NativeEndian.Uint16(m[8:])),
		flags:  int(m[10]),
		mac:    attrs[unix.NDA_LLADDR],
		master: int(int32(native32(attrs[unix.NDA_MASTER]))),
	}
	e.ip, _ = netip.AddrFromSlice(attrs[unix.NDA_DST])
	if v := attrs[unix.NDA_VLAN]; len(v) >= 2 {
		e.vlan = int(binary.NativeEndian.Uint16(v))
	}
	if p := attrs[netlink.NDA_PROTOCOL]; len(p) >= 1 {
		e.protocol = int(p[0])
	}
	return e, nil
}
