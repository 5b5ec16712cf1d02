//go:build lab

package hostnet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/netredirect/internal/kerneltest"
	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// onDebiansKernel needs tunnels, VLANs and bridges that tell VLANs apart, which
// not every kernel has.
var onDebiansKernel = []struct {
	name string
	test func(*testing.T)
}{
	{"plan is applied and reverted", TestPlanAppliedAndReverted},
	{"devices are made and undone", devicesAreMadeAndUndone},
	{"foreign devices stay", foreignDevicesStay},
	{"tunnels carry both families", tunnelsCarryBothFamilies},
	{"bridge tells VLANs apart", bridgeTellsVLANsApart},
	{"bridge on a VLAN is plain", bridgeOnVLANIsPlain},
	{"kernel without modules", kernelWithoutModules}, // removes them
}

// inGuest is set in the environment of the test that runs in the guest.
const inGuest = "WANMIG_TEST_IN_GUEST"

// TestOnDebiansKernel runs in a guest once more, as root of a machine of its own.
func TestOnDebiansKernel(t *testing.T) {
	if os.Getenv(inGuest) != "" {
		for _, c := range onDebiansKernel {
			t.Run(c.name, c.test)
		}
		return
	}
	// Built anew: the guest has no C library, nor the time for the race detector.
	self := filepath.Join(t.TempDir(), "hostnet.test")
	build := exec.Command("go", "test", "-c", "-tags", "lab", "-ldflags", "-s -w", "-o", self, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the guest's tests: %v\n%s", err, out)
	}
	said := boot(t, kerneltest.Guest{
		Modules:  []string{"veth", "bridge", "8021q", "ipip", "sit", "ip6_tunnel", "nf_tables", "nft_objref", "nft_meta_bridge"},
		Programs: []string{self, "ip", "bridge", "nft"},
		Script:   fmt.Sprintf("%s=yes %s -test.v -test.timeout 8m -test.run '^%s$' || true", inGuest, self, t.Name()),
		Memory:   512,
	})
	t.Logf("console of the guest:\n%s", said)
	for _, c := range onDebiansKernel {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(said, "--- PASS: "+t.Name()+" ") {
				t.Error("has not passed in the guest: see its console")
			}
		})
	}
}

// boot runs a guest until it stops, and returns what its console says.
func boot(t *testing.T, g kerneltest.Guest) (said string) {
	t.Helper()
	command, console := g.QEMU(t)
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	defer cancel()
	runtime.LockOSThread() // QEMU is to go with the process, not with a thread
	defer runtime.UnlockOSThread()
	qemu := exec.CommandContext(ctx, command[0], command[1:]...)
	qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := qemu.CombinedOutput()
	text, _ := os.ReadFile(console)
	said = strings.ReplaceAll(string(text), "\r", "")
	if err != nil {
		t.Fatalf("guest: %v: %s; its console:\n%s", err, out, said)
	}
	return said
}

// linkSite has the interface up0. Of IPv6 it has no more than each device's
// settings, since the kernel makes addresses in its own time.
func linkSite(t *testing.T) *site {
	s := newSite(t, "host")
	s.Sh(`echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
		ip link add up0 type veth peer name up1; ip link set up1 up; ip link set up0 up`)
	return s
}

// joined are two sites, each with an interface eth0 to the other.
func joined(t *testing.T) (a, b *site) {
	a, b = newSite(t, "one site"), newSite(t, "the other")
	for _, s := range []*site{a, b} {
		s.Sh("echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad")
	}
	testnet.Join(a.Space, "eth0", b.Space, "eth0")
	return a, b
}

// changing is what the kernel gives each device anew, and what it tells late.
var changing = regexp.MustCompile(`(?m)^[0-9]+: | permaddr \S+| state \S+`)

// links returns all that there is of devices. A guest takes long to start a
// program: two have to do.
func (s *site) links() string {
	s.t.Helper()
	text := s.Sh(`printf '%s\n' link addr 'route show table all' | ip -d -batch -
		ip -6 route show table all`)
	return changing.ReplaceAllString(testnet.Steady(text), "")
}

// kernelWithoutModules asks for each kind of device where there is none.
func kernelWithoutModules(t *testing.T) {
	s := linkSite(t)
	h := s.host()
	s.Sh("rmmod ipip sit ip6_tunnel 8021q")
	before := s.links()
	for _, d := range devices {
		step := Step{Device: &d.device}
		s.Must(func() error {
			if err := h.Apply(context.Background(), step); !errors.Is(err, ErrNoKernelSupport) || !strings.Contains(err.Error(), d.device.Kind) {
				t.Errorf("%s: %v", d.device.Kind, err)
			}
			return h.Revert(context.Background(), step)
		})
	}
	testnet.Same(t, "after", before, s.links())
}
