//go:build lab || bench

package testnet

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

var changing = regexp.MustCompile(`(_timer|_ver_age) +[0-9.]+|@if[0-9]+`)

// Steady leaves out of what ip(8) says the timers of bridges and the numbers of
// cables' other ends.
func Steady(text string) string { return changing.ReplaceAllString(text, "") }

// Dump returns all that wanmig may change of a host's network, and of the
// settings those of devices. What bridges and neighbours learn by themselves is
// left out. It starts few programs, since a guest takes long to.
func (s *Space) Dump(devices ...string) string {
	s.t.Helper()
	return Steady(s.Sh(`for f in -4 -6; do
		printf '%s\n' rule 'route show table all' 'neigh show nud permanent' 'neigh show proxy' addr | ip $f -batch -
	done
	echo links; ip -d link
	echo fdb; bridge fdb show | grep -E 'permanent|static' | sort
	echo nftables; nft list ruleset
	echo sysctls; dirs=
	for d in ` + strings.Join(devices, " ") + `; do
		for i in ipv4/conf ipv6/conf ipv4/neigh ipv6/neigh; do dirs="$dirs /proc/sys/net/$i/$d"; done
	done
	grep -rs . $dirs | grep -v stable_secret | sort`))
}

// Settled reads until the kernel has done what it does by itself, and returns
// what was read twice.
func Settled(t testing.TB, read func() string) string {
	t.Helper()
	last := read()
	for end := time.Now().Add(10 * time.Second); ; {
		time.Sleep(100 * time.Millisecond)
		before := last
		if last = read(); before == last {
			return last
		}
		if time.Now().After(end) {
			t.Fatal("the network does not come to rest")
		}
	}
}

// Same compares dumps, and names the lines in which they differ.
func Same(t testing.TB, what, want, got string) {
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
	t.Errorf("%s: the network is not as it was: %d lines, not %d", what, len(g), len(w))
}
