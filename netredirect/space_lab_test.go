//go:build lab

package netredirect

import (
	"context"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/netredirect/hostnet"
	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// A space is a host.
type space struct {
	*testnet.Space
	t   *testing.T
	net *hostnet.Host
}

// planSite has what the plans of planned change: bridges with the VM's taps, and
// a tunnel's device of each name.
//
//	v0 ─ br0 192.0.2.1/24 2001:db8:1::1/64     wmqtest, wmktest
//	w0 ─ br1 198.51.100.1/24                   up0 203.0.113.1/24
func planSite(t *testing.T) *space {
	t.Helper()
	s := &space{Space: testnet.New(t, "host"), t: t}
	s.sh(`
		ip link add br0 address 02:00:00:00:00:01 type bridge
		ip link add br1 address 02:00:00:00:00:02 type bridge
		for i in v w up; do
			ip link add ${i}0 type veth peer name ${i}1
			for j in ${i}0 ${i}1; do ip link set $j addrgenmode none; ip link set $j up; done
		done
		ip link set v0 master br0; ip link set w0 master br1
		for i in br0 br1; do ip link set $i addrgenmode none; ip link set $i up; done
		for i in wmqtest wmktest; do
			ip tuntap add dev $i mode tun; ip link set $i addrgenmode none; ip link set $i up
		done
		ip addr add 192.0.2.1/24 dev br0
		ip addr add 2001:db8:1::1/64 dev br0 nodad
		ip addr add 198.51.100.1/24 dev br1
		ip addr add 203.0.113.1/24 dev up0
		ip route add default via 203.0.113.254 dev up0
		nft add table ip other; nft add chain ip other c; nft add rule ip other c counter`)
	s.must(func() (err error) {
		s.net, err = hostnet.Open()
		return err
	})
	t.Cleanup(s.net.Close)
	return s
}

func (s *space) must(f func() error) {
	s.t.Helper()
	s.Must(f)
}

func (s *space) sh(script string) string {
	s.t.Helper()
	return s.Sh(script)
}

var counted = regexp.MustCompile(`packets [0-9]+ bytes [0-9]+`)

// dump returns all that plans change, after the kernel has done what it does by
// itself. It is sorted: nft lists tables in the order in which they were made.
func (s *space) dump() string {
	s.t.Helper()
	return testnet.Settled(s.t, func() string {
		lines := strings.Split(counted.ReplaceAllString(s.Dump("br0", "br1", "wmqtest", "wmktest"), ""), "\n")
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	})
}

var sameDump = testnet.Same

// manager is one that looks at the space. Its methods have to be called there.
func (s *space) manager() *Manager {
	ctx, cancel := context.WithCancel(s.t.Context())
	s.t.Cleanup(cancel)
	return &Manager{Config: Config{Site: "b", Log: slog.New(slog.DiscardHandler)}, net: s.net, journal: journal{s.t.TempDir()}, ctx: ctx,
		redirects: map[string]*redirect{}, tunnels: map[string]*carried{}}
}
