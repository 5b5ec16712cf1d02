//go:build lab || bench

package encap

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// space is a host.
type space struct {
	*testnet.Space
	t testing.TB
}

// newSpace makes a host that forwards packets and checks no reverse paths.
func newSpace(t testing.TB, name string) *space {
	t.Helper()
	s := &space{testnet.New(t, name), t}
	s.Sh(`sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
		net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 \
		net.ipv6.conf.default.accept_dad=0 net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0`)
	return s
}

// ip runs ip(8) commands, one a line.
func (s *space) ip(commands string) {
	s.t.Helper()
	for line := range strings.Lines(commands) {
		s.Sh("ip " + line)
	}
}

// background runs a program until the test ends.
func (s *space) background(name string, args ...string) {
	s.t.Helper()
	s.Start(exec.Command(name, args...))
}

// open opens a tunnel in the namespace, and closes it with the test.
func (s *space) open(c Config) *Tunnel {
	s.t.Helper()
	var tunnel *Tunnel
	if c.Log == nil {
		c.Log = testLog(s.t)
	}
	s.Must(func() (err error) {
		tunnel, err = OpenIPIP(c)
		return err
	})
	s.t.Cleanup(func() { tunnel.Close() })
	return tunnel
}

// echo answers on a TCP port with what it reads, until the test ends.
func (s *space) echo(address string) {
	s.t.Helper()
	var l net.Listener
	s.Must(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	s.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}
