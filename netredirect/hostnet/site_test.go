//go:build lab

package hostnet

import (
	"context"
	"testing"
	"time"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// A site is a host.
type site struct {
	*testnet.Space
	t *testing.T
}

func newSite(t *testing.T, name string) *site {
	t.Helper()
	return &site{testnet.New(t, name), t}
}

// host opens the site's network.
func (s *site) host() *Host {
	s.t.Helper()
	var h *Host
	s.Must(func() (err error) {
		h, err = Open()
		return err
	})
	s.t.Cleanup(h.Close)
	return h
}

func (s *site) apply(h *Host, steps ...Step) {
	s.t.Helper()
	s.Must(func() error {
		_, err := h.ApplyAll(context.Background(), steps)
		return err
	})
}

func (s *site) revert(h *Host, steps ...Step) {
	s.t.Helper()
	s.Must(func() error { return h.RevertAll(context.Background(), steps) })
}

// eventually waits for what the kernel does in its own time.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// bridgeSite has a bridge br0 with the ports v0 and w0, and an interface up0.
func bridgeSite(t *testing.T) *site {
	s := newSite(t, "host")
	s.Sh(`
		ip link add br0 address 02:00:00:00:00:01 type bridge
		for i in v w up; do
			ip link add ${i}0 type veth peer name ${i}1
			ip link set ${i}1 addrgenmode none; ip link set ${i}1 up
			ip link set ${i}0 addrgenmode none; ip link set ${i}0 up
		done
		ip link set v0 master br0; ip link set w0 master br0
		ip link set br0 addrgenmode none; ip link set br0 up
		ip addr add 192.0.2.1/24 dev br0
		ip addr add 2001:db8:1::1/64 dev br0 nodad
		ip addr add 198.51.100.1/24 dev up0
		ip addr add 2001:db8:2::1/64 dev up0 nodad
		ip route add default via 198.51.100.254 dev up0
		ip -6 route add default via 2001:db8:2::fe dev up0
		nft add table ip other; nft add chain ip other c; nft add rule ip other c counter`)
	return s
}

func (s *site) dump() string {
	s.t.Helper()
	return s.Dump("br0")
}

// settled is a dump after the kernel has done what it does by itself.
func (s *site) settled() string {
	s.t.Helper()
	return testnet.Settled(s.t, s.dump)
}
