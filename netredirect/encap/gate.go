package encap

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Gate decides which addresses may use a tunnel. One gate may serve several tunnels, and is safe for concurrent use.
type Gate struct {
	open atomic.Pointer[addresses]
}

// addresses are those of VMs; a set is not changed once it is in use.
type addresses struct {
	here, away map[netip.Addr]bool
}

// NewGate returns a gate that lets nothing pass but probes.
func NewGate() *Gate {
	g := new(Gate)
	g.Set(nil, nil)
	return g
}

// Set replaces the addresses of the VMs that live at this host and of those that live at the peer. What comes from the
// tunnel passes if it is for a VM here or from a VM away; what goes into it, if it is from a VM here or for a VM away.
func (g *Gate) Set(here, away []netip.Addr) {
	g.open.Store(&addresses{here: set(here), away: set(away)})
}

func set(list []netip.Addr) map[netip.Addr]bool {
	m := make(map[netip.Addr]bool, len(list))
	for _, a := range list {
		m[a.Unmap().WithZone("")] = true
	}
	return m
}

// filter is the gate of one tunnel, with the probes between its own ends.
type filter struct {
	gate          *Gate
	local, remote netip.Addr
	probePort     uint16
}

// incoming checks a packet that the peer sent.
func (f *filter) incoming(b []byte) (packet, verdict) {
	p, v := parse(b)
	if v != passes {
		return p, v
	}
	a := f.gate.open.Load()
	if a.here[p.dst] || a.away[p.src] || f.isProbe(p, f.remote, f.local) {
		return p, passes
	}
	return p, foreign
}

// outgoing checks a packet that the kernel routed into the device.
func (f *filter) outgoing(b []byte) (packet, verdict) {
	p, v := parse(b)
	if v != passes {
		return p, v
	}
	a := f.gate.open.Load()
	switch {
	case a.here[p.src] || a.away[p.dst] || f.isProbe(p, f.local, f.remote):
		return p, passes
	case p.dst.IsLinkLocalMulticast():
		return p, chatter
	}
	return p, foreign
}

// isProbe tells whether a packet is UDP between the tunnel's ends, from and to the probe port.
func (f *filter) isProbe(p packet, from, to netip.Addr) bool {
	if f.probePort == 0 || p.protocol != unix.IPPROTO_UDP || p.fragment || p.src != from || p.dst != to || len(p.data) < p.upper+8 {
		return false
	}
	udp := p.data[p.upper:]
	return binary.BigEndian.Uint16(udp[0:]) == f.probePort && binary.BigEndian.Uint16(udp[2:]) == f.probePort
}
