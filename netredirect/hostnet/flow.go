package hostnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// maxFlows bounds what Flows returns; that many are reason enough to wait.
const maxFlows = 16384

// Attributes of conntrack messages that the library does not name
// (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaMarkMask = 21
	ctMessage   = 4 // bytes of struct nfgenmsg before the attributes
)

// A Flow is a connection that the kernel tracks.
type Flow struct {
	Proto   string // tcp, udp, icmp, icmpv6, sctp, or the number
	State   string // of TCP: ESTABLISHED, TIME_WAIT, …; else empty
	Src     netip.AddrPort
	Dst     netip.AddrPort // as the client has it, before any mapping
	Packets uint64         // both directions; 0 unless net.netfilter.nf_conntrack_acct is on
	Bytes   uint64
}

// Flows returns connections that have one of the addresses at either end, before
// or after mapping, and whose mark is mark under mask; at most 16384.
func (h *Host) Flows(addrs []netip.Addr, mark, mask uint32) ([]Flow, error) {
	flows, err := complete(func() ([]Flow, error) { return dumpFlows(addrs, mark, mask) })
	if err != nil {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	return flows, nil
}

func dumpFlows(addrs []netip.Addr, mark, mask uint32) (flows []Flow, err error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	if mask != 0 {
		req.AddData(nl.NewRtAttr(nl.CTA_MARK, nl.BEUint32Attr(mark)))
		req.AddData(nl.NewRtAttr(ctaMarkMask, nl.BEUint32Attr(mask)))
	}
	var parseErr error
	err = req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(m []byte) bool {
		c, err := parseConnection(m)
		if err != nil {
			parseErr = err
			return false
		}
		if c.mark&mask == mark && slices.ContainsFunc(addrs, c.touches) {
			flows = append(flows, c.flow())
		}
		return len(flows) < maxFlows
	})
	if parseErr != nil {
		return nil, parseErr
	}
	return flows, err
}

// connection is a conntrack entry.
type connection struct {
	orig, reply tuple
	state       uint8 // of TCP
	mark        uint32
	packets     uint64
	bytes       uint64
}

type tuple struct {
	src, dst netip.AddrPort
	proto    uint8
}

func (c connection) touches(a netip.Addr) bool {
	return c.orig.src.Addr() == a || c.orig.dst.Addr() == a || c.reply.src.Addr() == a || c.reply.dst.Addr() == a
}

func (c connection) flow() Flow {
	f := Flow{Src: c.orig.src, Dst: c.orig.dst, Packets: c.packets, Bytes: c.bytes}
	switch c.orig.proto {
	case unix.IPPROTO_TCP:
		f.Proto = "tcp"
		if int(c.state) < len(tcpStates) {
			f.State = tcpStates[c.state]
		}
	case unix.IPPROTO_UDP:
		f.Proto = "udp"
	case unix.IPPROTO_ICMP:
		f.Proto = "icmp"
	case unix.IPPROTO_ICMPV6:
		f.Proto = "icmpv6"
	case unix.IPPROTO_SCTP:
		f.Proto = "sctp"
	default:
		f.Proto = fmt.Sprint(c.orig.proto)
	}
	return f
}

// tcpStates are those of include/uapi/linux/netfilter/nf_conntrack_tcp.h.
var tcpStates = []string{"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT",
	"LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2"}

// parseConnection reads an IPCTNL_MSG_CT_NEW.
func parseConnection(m []byte) (c connection, err error) {
	if len(m) < ctMessage {
		return c, errors.New("message about a connection too short")
	}
	attrs, err := attributes(m[ctMessage:])
	if err != nil {
		return c, err
	}
	if c.orig, err = parseTuple(attrs[nl.CTA_TUPLE_ORIG]); err != nil {
		return c, err
	}
	if c.reply, err = parseTuple(attrs[nl.CTA_TUPLE_REPLY]); err != nil {
		return c, err
	}
	c.mark = uint32(bigEndian(attrs[nl.CTA_MARK], 4))
	for _, direction := range []uint16{nl.CTA_COUNTERS_ORIG, nl.CTA_COUNTERS_REPLY} {
		counters, err := attributes(attrs[direction])
		if err != nil {
			return c, err
		}
		c.packets += bigEndian(counters[nl.CTA_COUNTERS_PACKETS], 8)
		c.bytes += bigEndian(counters[nl.CTA_COUNTERS_BYTES], 8)
	}
	info, err := attributes(attrs[nl.CTA_PROTOINFO])
	if err != nil {
		return c, err
	}
	tcp, err := attributes(info[nl.CTA_PROTOINFO_TCP])
	if err != nil {
		return c, err
	}
	c.state = uint8(bigEndian(tcp[nl.CTA_PROTOINFO_TCP_STATE], 1))
	return c, nil
}

// parseTuple reads one direction of a connection. Protocols without ports have
// port 0.
func parseTuple(b []byte) (t tuple, err error) {
	attrs, err := attributes(b)
	if err != nil {
		return t, err
	}
	ips, err := attributes(attrs[nl.CTA_TUPLE_IP])
	if err != nil {
		return t, err
	}
	proto, err := attributes(attrs[nl.CTA_TUPLE_PROTO])
	if err != nil {
		return t, err
	}
	src, dst := ips[nl.CTA_IP_V4_SRC], ips[nl.CTA_IP_V4_DST]
	if src == nil {
		src, dst = ips[nl.CTA_IP_V6_SRC], ips[nl.CTA_IP_V6_DST]
	}
	from, ok := netip.AddrFromSlice(src)
	to, also := netip.AddrFromSlice(dst)
	if !ok || !also {
		return t, errors.New("connection without addresses")
	}
	return tuple{
		src:   netip.AddrPortFrom(from, uint16(bigEndian(proto[nl.CTA_PROTO_SRC_PORT], 2))),
		dst:   netip.AddrPortFrom(to, uint16(bigEndian(proto[nl.CTA_PROTO_DST_PORT], 2))),
		proto: uint8(bigEndian(proto[nl.CTA_PROTO_NUM], 1)),
	}, nil
}

// bigEndian reads a number of 1, 2, 4 or 8 bytes, 0 if it is not there.
func bigEndian(value []byte, size int) uint64 {
	if len(value) < size {
		return 0
	}
	var wide [8]byte
	copy(wide[8-size:], value)
	return binary.BigEndian.Uint64(wide[:])
}
