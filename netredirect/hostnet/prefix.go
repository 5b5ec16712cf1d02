package hostnet

import (
	"net"
	"net/netip"
)

// toIPNet returns nil for the zero prefix.
func toIPNet(p netip.Prefix) *net.IPNet {
	if !p.IsValid() {
		return nil
	}
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// fromIPNet returns the zero prefix for nil.
func fromIPNet(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(fromIP(n.IP), bits)
}

// fromIP returns the zero address for nil. No address that the kernel gives is
// an IPv4 one within IPv6.
func fromIP(i net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(i)
	return a.Unmap()
}

// toIP returns nil for the zero address.
func toIP(a netip.Addr) net.IP {
	return a.AsSlice()
}
