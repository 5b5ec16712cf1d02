package hostnet

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// shared are the addresses that several devices of wanmig may have at once:
// those of RFC 7335, which each end of a tunnel has and no network uses.
var shared = netip.MustParsePrefix("192.0.0.0/29")

// addressEntry is an address as the kernel lists it.
type addressEntry struct {
	index  int
	prefix netip.Prefix
	flags  uint32
	metric uint32
}

// ours tells the addresses that an Address step has made.
func (e addressEntry) ours() bool {
	return e.metric == Protocol && e.flags&unix.IFA_F_NOPREFIXROUTE != 0
}

func (a *Address) apply(_ context.Context, h *Host) error {
	link, err := h.link(a.Dev)
	if err != nil {
		return err
	}
	entries, err := complete(addresses)
	if err != nil {
		return err
	}
	standing := false
	for _, e := range entries {
		same := e.prefix == a.Prefix && e.ours()
		switch {
		case e.prefix.Addr() != a.Prefix.Addr():
			continue
		case same && e.index == link.Attrs().Index:
			standing = true
			continue
		case same && shared.Contains(e.prefix.Addr()):
			continue // another tunnel's
		}
		return fmt.Errorf("%w: the host has the address %v already, on %s", ErrTaken, e.prefix, h.nameOf(e.index))
	}
	if standing {
		return nil
	}
	_, err = request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, a.message(link.Attrs().Index)...)
	return err
}

func (a *Address) revert(_ context.Context, h *Host) error {
	link, err := h.link(a.Dev)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	entries, err := complete(addresses)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.index != link.Attrs().Index || e.prefix != a.Prefix || !e.ours() {
			continue
		}
		_, err := request(unix.RTM_DELADDR, unix.NLM_F_ACK, a.message(e.index)...)
		if err != nil && !isGone(err) {
			return err
		}
	}
	return nil
}

// message is what RTM_NEWADDR and RTM_DELADDR say. The library has no metric.
func (a *Address) message(index int) []nl.NetlinkRequestData {
	addr := a.Prefix.Addr()
	head := nl.NewIfAddrmsg(familyOf(addr))
	head.Prefixlen = uint8(a.Prefix.Bits())
	head.Index = uint32(index)
	flags := uint32(unix.IFA_F_NOPREFIXROUTE)
	// Deprecated from the start, an address is not chosen as source (RFC 6724).
	lifetime := unix.IfaCacheinfo{Valid: math.MaxUint32, Prefered: math.MaxUint32}
	if addr.Is6() {
		flags |= unix.IFA_F_NODAD
		lifetime.Prefered = 0
	}
	cache := nl.IfaCacheInfo{IfaCacheinfo: lifetime}
	return []nl.NetlinkRequestData{
		head,
		nl.NewRtAttr(unix.IFA_LOCAL, addr.AsSlice()),
		nl.NewRtAttr(unix.IFA_ADDRESS, addr.AsSlice()),
		nl.NewRtAttr(unix.IFA_FLAGS, nl.Uint32Attr(flags)),
		nl.NewRtAttr(unix.IFA_RT_PRIORITY, nl.Uint32Attr(Protocol)),
		nl.NewRtAttr(unix.IFA_CACHEINFO, cache.Serialize()),
	}
}

// addresses lists those of the host.
func addresses() ([]addressEntry, error) {
	messages, dumpErr := request(unix.RTM_GETADDR, unix.NLM_F_DUMP, nl.NewIfAddrmsg(unix.AF_UNSPEC))
	if messages == nil && dumpErr != nil {
		return nil, fmt.Errorf("list addresses: %w", dumpErr)
	}
	var entries []addressEntry
	for _, m := range messages {
		e, err := parseAddress(m)
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		entries = append(entries, e)
	}
	return entries, dumpErr
}

// parseAddress reads an RTM_NEWADDR.
func parseAddress(m []byte) (addressEntry, error) {
	if len(m) < unix.SizeofIfAddrmsg {
		return addressEntry{}, errors.New("message about an address too short")
	}
	head := nl.DeserializeIfAddrmsg(m)
	attrs, err := attributes(m[unix.SizeofIfAddrmsg:])
	if err != nil {
		return addressEntry{}, err
	}
	// With a peer, IFA_ADDRESS is the peer's.
	local, ok := attrs[unix.IFA_LOCAL]
	if !ok {
		local = attrs[unix.IFA_ADDRESS]
	}
	addr, ok := netip.AddrFromSlice(local)
	if !ok {
		return addressEntry{}, fmt.Errorf("address of %d bytes", len(local))
	}
	return addressEntry{
		index:  int(head.Index),
		prefix: netip.PrefixFrom(addr, int(head.Prefixlen)),
		flags:  uint32(head.Flags) | native32(attrs[unix.IFA_FLAGS]),
		metric: native32(attrs[unix.IFA_RT_PRIORITY]),
	}, nil
}

// nameOf returns the name of a device for people.
func (h *Host) nameOf(index int) string {
	link, err := h.kernel.LinkByIndex(index)
	if err != nil {
		return fmt.Sprintf("device %d", index)
	}
	return link.Attrs().Name
}
