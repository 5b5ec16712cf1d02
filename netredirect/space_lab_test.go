//go:build lab

package netredirect

import (
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/netredirect/hostnet"
)

// A space is a network namespace without a name, which goes with the thread that
// runs all that happens in it.
type space struct {
	t     *testing.T
	calls chan func()
	net   *hostnet.Host
}

// planSite has what the plans of planned change: bridges with the VM's taps, and
// a tunnel's device of each name.
//
//	v0 ─ br0 192.0.2.1/24 2001:db8:1::1/64     wmqtest, wmktest
//	w0 ─ br1 198.51.100.1/24                   up0 203.0.113.1/24
func planSite(t *testing.T) *space {
	t.Helper()
	s := &space{t: t, calls: make(chan func())}
	ready, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends here
		err := unix.Unshare(unix.CLONE_NEWNET)
		ready <- err
		if err != nil {
			return
		}
		for call := range s.calls {
			call()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() {
		close(s.calls)
		<-ended
	})
	s.sh(`
		ip link set lo up
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
	result := make(chan error)
	s.calls <- func() { result <- f() }
	if err := <-result; err != nil {
		s.t.Fatal(err)
	}
}

func (s *space) sh(script string) string {
	s.t.Helper()
	var out []byte
	s.must(func() (err error) {
		if out, err = exec.Command("sh", "-euc", script).CombinedOutput(); err != nil {
			err = fmt.Errorf("%s: %w: %s", script, err, out)
		}
		return err
	})
	return string(out)
}

var changing = regexp.MustCompile(`(_timer|_ver_age) +[0-9.]+|@if[0-9]+|packets [0-9]+ bytes [0-9]+`)

// dump returns all that plans change, after the kernel has done what it does by
// itself.
func (s *space) dump() string {
	s.t.Helper()
	read := func() string {
		return changing.ReplaceAllString(s.sh(`for f in -4 -6; do
			ip $f rule; ip $f route show table all | sort; ip $f neigh show nud permanent | sort; ip $f neigh show proxy | sort; ip $f addr
		done
		ip -d link
		bridge fdb show | grep -E 'permanent|static' | sort
		nft list ruleset
		for d in br0 br1 wmqtest wmktest; do
			grep -rs . /proc/sys/net/ipv4/conf/$d /proc/sys/net/ipv6/conf/$d /proc/sys/net/ipv4/neigh/$d /proc/sys/net/ipv6/neigh/$d || true
		done | grep -v stable_secret | sort`), "")
	}
	last := read()
	for end := time.Now().Add(10 * time.Second); ; {
		time.Sleep(100 * time.Millisecond)
		before := last
		if last = read(); before == last {
			return last
		}
		if time.Now().After(end) {
			s.t.Fatal("the host's network does not come to rest")
		}
	}
}

func sameDump(t *testing.T, what, want, got string) {
	t.Helper()
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	slices.Sort(w) // nft lists tables in the order in which they were made
	slices.Sort(g)
	if slices.Equal(w, g) {
		return
	}
	for _, line := range w {
		if !slices.Contains(g, line) {
			t.Errorf("%s: lost %q", what, line)
		}
	}
	for _, line := range g {
		if !slices.Contains(w, line) {
			t.Errorf("%s: new %q", what, line)
		}
	}
	t.Errorf("%s: the host's network is not as it was: %d lines, not %d", what, len(g), len(w))
}

// manager is one that looks at the space. Its methods have to be called there.
func (s *space) manager() *Manager {
	ctx, cancel := context.WithCancel(s.t.Context())
	s.t.Cleanup(cancel)
	return &Manager{Config: Config{Site: "b", Log: slog.New(slog.DiscardHandler)}, net: s.net, journal: journal{s.t.TempDir()}, ctx: ctx,
		redirects: map[string]*redirect{}, tunnels: map[string]*carried{}}
}
