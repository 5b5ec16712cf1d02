package lab

import (
	"net/netip"
	"sync"
)

// nat stands between a site and its links. Addresses stay; the ports of TCP and
// UDP flows that the site begins are seen as others by their peers, and answers
// are let back to them. What a peer begins passes, as if the ports of the site's
// servers were forwarded. A port outside belongs to one flow, as with Linux's NAT.
type nat struct {
	mu      sync.Mutex
	last    uint16             // port given out
	outside map[natFlow]uint16 // by a flow as the site sees it: its port outside
	inside  map[natFlow]uint16 // by a flow as the peers see it: its port inside
}

// natFlow is a flow by the address and port of the site and those of its peer.
type natFlow struct {
	protocol   byte
	site, peer netip.AddrPort
}

const (
	// Linux gives its own sockets ports below these (ip_local_port_range), so none
	// of a site's can be mistaken for one of its NAT.
	natFirst = 61000
	natLast  = 65535
	// natFlows is how many flows a NAT knows. One that knows no more forgets all.
	natFlows = natLast - natFirst
)

func newNAT() *nat {
	n := &nat{last: natLast}
	n.forget()
	return n
}

// rebind has all flows that the site has begun go on at other ports, as a NAT
// does that was restarted. What comes to their old ports is dropped.
func (n *nat) rebind() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for f, port := range n.outside {
		// What a peer has begun has the same port on both sides.
		if port != f.site.Port() {
			delete(n.outside, f)
			delete(n.inside, natFlow{f.protocol, netip.AddrPortFrom(f.site.Addr(), port), f.peer})
		}
	}
}

func (n *nat) forget() {
	n.outside, n.inside = map[natFlow]uint16{}, map[natFlow]uint16{}
}

// out translates a packet that leaves the site.
func (n *nat) out(b []byte) {
	h := readHeaders(b)
	if h.ports == 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	f := natFlow{h.protocol, h.from, h.to}
	port, known := n.outside[f]
	if !known {
		port = n.free(f)
		n.add(f, port)
	}
	setPort(b, h, h.ports, port)
}

// in translates a packet that comes to the site, or says that it is dropped.
func (n *nat) in(b []byte) (pass bool) {
	h := readHeaders(b)
	if h.ports == 0 {
		return true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	f := natFlow{h.protocol, h.to, h.from}
	port, known := n.inside[f]
	if !known {
		if f.site.Port() >= natFirst {
			return false
		}
		port = f.site.Port()
		if _, begun := n.outside[f]; !begun {
			n.add(f, port)
		}
	}
	setPort(b, h, h.ports+2, port)
	return true
}

// free returns the next port outside that no flow with this peer has.
func (n *nat) free(f natFlow) uint16 {
	for {
		n.last++
		if n.last < natFirst { // beyond natLast it is 0 again
			n.last = natFirst
		}
		if _, taken := n.inside[natFlow{f.protocol, netip.AddrPortFrom(f.site.Addr(), n.last), f.peer}]; !taken {
			return n.last
		}
	}
}

func (n *nat) add(f natFlow, port uint16) {
	if len(n.outside) >= natFlows {
		n.forget()
	}
	n.outside[f] = port
	n.inside[natFlow{f.protocol, netip.AddrPortFrom(f.site.Addr(), port), f.peer}] = f.site.Port()
}
