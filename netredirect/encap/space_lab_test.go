//go:build lab || bench

package encap

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// space is a network namespace without a name: it is gone when the test is.
type space struct {
	t    testing.TB
	name string
	file *os.File
}

// newSpace makes a namespace that forwards packets and checks no reverse paths.
func newSpace(t testing.TB, name string) *space {
	t.Helper()
	s := &space{t: t, name: name}
	err := onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() (err error) {
		if s.file, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())); err != nil {
			return err
		}
		for key, value := range map[string]string{
			"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1",
			"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0",
			"ipv6/conf/default/accept_dad": "0", "ipv4/icmp_ratelimit": "0", "ipv6/icmp/ratelimit": "0",
		} {
			if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatalf("make network namespace %s: %v", name, err)
	}
	t.Cleanup(func() { s.file.Close() })
	s.ip("link set lo up")
	return s
}

// onThread runs f on a thread that enter has moved to another namespace, and that ends afterwards.
func onThread(enter, f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		err := enter()
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

func (s *space) run(f func() error) error {
	return onThread(func() error { return unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET) }, f)
}

func (s *space) do(f func() error) {
	s.t.Helper()
	if err := s.run(f); err != nil {
		s.t.Fatalf("in %s: %v", s.name, err)
	}
}

// ip runs ip(8) commands, one a line.
func (s *space) ip(commands string) {
	s.t.Helper()
	for line := range strings.Lines(commands) {
		if args := strings.Fields(line); len(args) > 0 {
			s.command("ip", args...)
		}
	}
}

// command runs a program that has to succeed.
func (s *space) command(name string, args ...string) string {
	s.t.Helper()
	out, err := s.try(name, args...)
	if err != nil {
		s.t.Fatalf("in %s: %s %s: %v\n%s", s.name, name, strings.Join(args, " "), err, out)
	}
	return out
}

func (s *space) try(name string, args ...string) (string, error) {
	var out []byte
	err := s.run(func() (err error) {
		out, err = exec.CommandContext(s.t.Context(), name, args...).CombinedOutput()
		return err
	})
	return string(out), err
}

// background runs a program until the test ends.
func (s *space) background(name string, args ...string) {
	s.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	c := exec.CommandContext(ctx, name, args...)
	s.do(c.Start)
	s.t.Cleanup(func() {
		stop()
		c.Wait()
	})
}

// wire connects a and b by a veth pair with the given interface names.
func wire(a *space, nameA string, b *space, nameB string) {
	a.t.Helper()
	a.do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: nameA},
			PeerName:      nameB,
			PeerNamespace: netlink.NsFd(int(b.file.Fd())),
		})
	})
	a.ip("link set " + nameA + " up")
	b.ip("link set " + nameB + " up")
}

// open opens a tunnel in the namespace, and closes it with the test.
func (s *space) open(c Config) *Tunnel {
	s.t.Helper()
	var tunnel *Tunnel
	if c.Log == nil {
		c.Log = testLog(s.t)
	}
	s.do(func() (err error) {
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
	s.do(func() (err error) {
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
