//go:build lab

package hostnet

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A site is a network namespace without a name, which goes with the thread that
// runs all that happens in it.
type site struct {
	t     *testing.T
	calls chan func()
	ns    *os.File
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, calls: make(chan func())}
	ready := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends here
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			s.ns, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		}
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
		s.ns.Close()
	})
	s.sh("ip link set lo up")
	return s
}

// run runs f in the site.
func (s *site) run(f func() error) error {
	result := make(chan error)
	s.calls <- func() { result <- f() }
	return <-result
}

// must runs f in the site, and ends the test if it fails.
func (s *site) must(f func() error) {
	s.t.Helper()
	if err := s.run(f); err != nil {
		s.t.Fatal(err)
	}
}

// sh runs commands in the site and returns what they print.
func (s *site) sh(script string) string {
	s.t.Helper()
	var out []byte
	err := s.run(func() (err error) {
		out, err = exec.Command("sh", "-euc", script).CombinedOutput()
		return err
	})
	if err != nil {
		s.t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// link joins two sites by a cable.
func link(a *site, aName string, b *site, bName string) {
	a.t.Helper()
	script := fmt.Sprintf("ip link add %s type veth peer name %s netns /proc/%d/fd/%d; ip link set %[1]s up",
		aName, bName, os.Getpid(), b.ns.Fd())
	a.sh(script)
	b.sh("ip link set " + bName + " up")
}

// host opens the site's network.
func (s *site) host() *Host {
	s.t.Helper()
	var h *Host
	s.must(func() (err error) {
		h, err = Open()
		return err
	})
	s.t.Cleanup(h.Close)
	return h
}

func (s *site) apply(h *Host, steps ...Step) {
	s.t.Helper()
	s.must(func() error {
		_, err := h.ApplyAll(context.Background(), steps)
		return err
	})
}

func (s *site) revert(h *Host, steps ...Step) {
	s.t.Helper()
	s.must(func() error { return h.RevertAll(context.Background(), steps) })
}

var (
	bridgeTimers = regexp.MustCompile(`(_timer|_ver_age) +[0-9.]+`)
	peers        = regexp.MustCompile(`@if[0-9]+`)
)

// dump returns all that steps can change. What bridges and neighbours learn by
// themselves is left out.
func (s *site) dump() string {
	s.t.Helper()
	text := s.sh(`for f in -4 -6; do
		printf '%s\n' rule 'route show table all' 'neigh show nud permanent' 'neigh show proxy' addr | ip $f -batch -
	done
	echo links; ip -d link
	echo fdb; bridge fdb show | grep -E 'permanent|static' | sort
	echo nftables; nft list ruleset
	echo sysctls; grep -r . /proc/sys/net/ipv4/conf/br0 /proc/sys/net/ipv6/conf/br0 2>/dev/null | grep -v stable_secret | sort`)
	return peers.ReplaceAllString(bridgeTimers.ReplaceAllString(text, "timer"), "")
}

// same compares dumps by line.
func same(t *testing.T, what, want, got string) {
	t.Helper()
	if want == got {
		return
	}
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
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
	t.Errorf("%s: dumps differ", what)
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
	s := newSite(t)
	s.sh(`
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

// settled is a dump after the kernel has done what it does by itself.
func (s *site) settled() string {
	s.t.Helper()
	return settled(s.t, s.dump)
}

func settled(t *testing.T, dump func() string) string {
	t.Helper()
	last := dump()
	eventually(t, "dumps stay the same", func() bool {
		time.Sleep(100 * time.Millisecond)
		before := last
		last = dump()
		return before == last
	})
	return last
}
