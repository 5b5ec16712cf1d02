//go:build lab

package netredirect

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/netredirect/names"
	"github.com/wanmig/wanmig/netredirect/routes"
)

// TestClaims has a VM say that it has addresses of others, of which this host
// knows.
func TestClaims(t *testing.T) {
	s := planSite(t)
	m := s.manager()
	s.sh("ip -6 route add 2001:db8:77::/64 via 2001:db8:1::99 dev br0")
	m.DNS = &names.Config{Servers: []string{"198.51.100.53", "198.51.100.54:5353", "[2001:db8:1::53]:53", "ns.example", ""}}
	m.BGP = &routes.Config{Peers: []routes.Peer{{Address: addr("198.51.100.179")}}, NextHop4: addr("198.51.100.7")}
	for move, n := range map[string]hostNIC{"a": web(false), "b": only(web(false), "192.0.2.20")} {
		x := m.newRedirect(&record{Move: move, VM: "vm " + move, UUID: move, Role: Source, State: Standing,
			Local: addr("203.0.113.77"), Remote: addr("203.0.113.88")})
		x.setNICs([]hostNIC{n})
		m.redirects[move] = x
	}
	for address, want := range map[string]string{
		"192.0.2.10": "", "2001:db8:1::10": "", "192.0.2.30": "", // the VM's own, and a free one
		"192.0.2.20":   `of the VM "vm b"`,
		"203.0.113.77": "end of a tunnel", "203.0.113.88": "end of a tunnel",
		"203.0.113.254": "next hop of a route", "2001:db8:1::99": "next hop of a route",
		"198.51.100.179": "BGP peer", "198.51.100.7": "announces",
		"198.51.100.53": "DNS server", "198.51.100.54": "DNS server", "2001:db8:1::53": "DNS server",
		"203.0.113.1": "this host's own", "2001:db8:1::1": "this host's own", "203.0.113.2": "the other host's",
	} {
		nics := []NIC{{MAC: "52:54:00:00:00:02", Addresses: addrs("192.0.2.31")}, {MAC: "52:54:00:00:00:01", Addresses: addrs("192.0.2.32", address)}}
		s.must(func() error {
			err := m.checkClaims("a", nics, addr("203.0.113.2"))
			if (err == nil) != (want == "") || err != nil && !(strings.Contains(err.Error(), want) && strings.Contains(err.Error(), address)) {
				t.Errorf("%s: %v, not %q", address, err, want)
			}
			return nil
		})
	}
	s.must(func() error { // what is not set is no address that is reserved
		m.mu.Lock()
		defer m.mu.Unlock()
		all, err := m.reserved("a", netip.Addr{})
		if whose, ok := all[netip.Addr{}]; ok {
			t.Errorf("no address is %s", whose)
		}
		return err
	})
}
