package netredirect

import (
	"fmt"
	"net"
	"net/netip"
)

// reserved are the addresses that no VM has that can be redirected here, with
// what they are: a rule for one would take the packets of this host, of its
// tunnels or of another VM. A guest can say that it has them, and so can the peer
// of its move. Called with the lock held.
func (m *Manager) reserved(uuid string, peer netip.Addr) (map[netip.Addr]string, error) {
	all := map[netip.Addr]string{}
	for _, x := range m.redirects {
		if x.UUID != uuid {
			for _, a := range x.addresses() {
				all[a] = fmt.Sprintf("of the VM %q, whose redirect stands here", x.VM)
			}
		}
		all[x.Local], all[x.Remote] = "an end of a tunnel here", "an end of a tunnel here"
	}
	if m.DNS != nil {
		for _, s := range m.DNS.Servers { // those that are names are not asked for: the answer could be any address
			if a, err := netip.ParseAddr(s); err == nil {
				all[a] = "a DNS server's"
			} else if a, err := netip.ParseAddrPort(s); err == nil {
				all[a.Addr()] = "a DNS server's"
			}
		}
	}
	if m.BGP != nil {
		for _, p := range m.BGP.Peers {
			all[p.Address] = "a BGP peer's"
		}
		for _, a := range []netip.Addr{m.BGP.NextHop4, m.BGP.NextHop6} {
			all[a] = "the next hop of what this host announces"
		}
	}
	gateways, err := m.net.Gateways()
	if err != nil {
		return nil, err
	}
	for _, a := range gateways {
		all[a] = "the next hop of a route of this host"
	}
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list this host's addresses: %w", err)
	}
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			all[p.Addr()] = "this host's own"
		}
	}
	all[peer] = "the other host's"
	delete(all, netip.Addr{}) // of what is not set
	return all, nil
}

// checkClaims refuses NICs of a VM with an address that is reserved.
func (m *Manager) checkClaims(uuid string, nics []NIC, peer netip.Addr) error {
	m.mu.Lock()
	others, err := m.reserved(uuid, peer)
	m.mu.Unlock()
	if err != nil {
		return err
	}
	for _, n := range nics {
		for _, a := range n.Addresses {
			if whose := others[a]; whose != "" {
				return fmt.Errorf("%s is said to have the address %s, which is %s", n.MAC, a, whose)
			}
		}
	}
	return nil
}
