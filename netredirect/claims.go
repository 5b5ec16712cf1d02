package netredirect

import (
	"fmt"
	"net"
	"net/netip"
)

// reserved are the addresses that a host needs itself, with what they are. A VM
// can say that it has them, and so can a peer of its VM: a rule for them would
// send the tunnel's own packets into the tunnel.
func reserved(peer netip.Addr) (map[netip.Addr]string, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list this host's addresses: %w", err)
	}
	all := map[netip.Addr]string{peer: "the other host's"}
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			all[p.Addr()] = "this host's own"
		}
	}
	return all, nil
}

// checkClaims refuses NICs with an address that is a host's.
func checkClaims(nics []NIC, peer netip.Addr) error {
	hosts, err := reserved(peer)
	if err != nil {
		return err
	}
	for _, n := range nics {
		for _, a := range n.Addresses {
			if whose := hosts[a]; whose != "" {
				return fmt.Errorf("%s is said to have %s, which is %s address", n.MAC, a, whose)
			}
		}
	}
	return nil
}
