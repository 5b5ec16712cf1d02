//go:build lab

package neighbour

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The lab, three network namespaces without names, which end with the test:
//
//	guest           host                      other
//	eth0 ---- tap0 [br0] port0 ------------- eth0
//	.5, ::5                                   .7, ::7     of 10.0.0.0/24, 2001:db8::/64
//
// A veth stands for the tap: a bridge and a packet socket see no difference.
type site struct {
	t                  *testing.T
	guest, host, other *space
}

var (
	other4     = netip.MustParseAddr("10.0.0.7")
	other6     = netip.MustParseAddr("2001:db8::7")
	otherLocal = netip.MustParseAddr("fe80::5054:ff:fe09:909")
	nobody4    = netip.MustParseAddr("10.0.0.99")
	nobody6    = netip.MustParseAddr("2001:db8::99")
)

func newSite(t *testing.T) *site {
	s := &site{t, newSpace(t), newSpace(t), newSpace(t)}
	s.in(s.host, func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0", HardwareAddr: bridgeHardware[:]}}
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		for port, end := range map[string]struct {
			*space
			hardware
		}{"tap0": {s.guest, vmHardware}, "port0": {s.other, otherHardware}} {
			veth := &netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: port, MasterIndex: br.Index}, PeerName: "eth0",
				PeerHardwareAddr: end.hardware[:], PeerNamespace: netlink.NsFd(end.fd),
			}
			if err := netlink.LinkAdd(veth); err != nil {
				return fmt.Errorf("make %s: %w", port, err)
			}
		}
		return nil
	})
	for _, dev := range []string{"br0", "tap0", "port0"} {
		s.run(s.host, "ip", "link", "set", dev, "up")
	}
	for end, last := range map[*space]string{s.guest: "5", s.other: "7"} {
		s.run(end, "ip", "link", "set", "eth0", "up")
		s.run(end, "ip", "addr", "add", "10.0.0."+last+"/24", "dev", "eth0")
		s.run(end, "ip", "addr", "add", "2001:db8::"+last+"/64", "dev", "eth0", "nodad")
	}
	for dev, ready := range map[string]string{"br0": "state UP", "tap0": "state forwarding", "port0": "state forwarding"} {
		s.until(dev+" up", func() (string, bool) {
			out := s.run(s.host, "ip", "-d", "link", "show", "dev", dev)
			return out, strings.Contains(out, ready)
		})
	}
	return s
}

// A space is a thread in a network namespace of its own.
type space struct {
	fd    int
	calls chan func()
}

func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{calls: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			s.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		// A new namespace may have these from the host.
		for key, value := range map[string]string{"disable_ipv6": "0", "accept_dad": "1", "dad_transmits": "1", "forwarding": "0", "accept_ra": "1"} {
			if err == nil {
				err = os.WriteFile("/proc/sys/net/ipv6/conf/default/"+key, []byte(value), 0o644)
			}
		}
		ready <- err
		if err != nil {
			return
		}
		for f := range s.calls {
			f()
		}
		unix.Close(s.fd)
	}()
	if err := <-ready; err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() { close(s.calls) })
	return s
}

func (s *site) in(where *space, f func() error) {
	s.t.Helper()
	done := make(chan error)
	where.calls <- func() { done <- f() }
	if err := <-done; err != nil {
		s.t.Fatal(err)
	}
}

// try runs a command in a namespace; it may fail.
func (s *site) try(where *space, name string, args ...string) (string, error) {
	s.t.Helper()
	var out []byte
	var failed error
	s.in(where, func() error {
		cmd := exec.Command(name, args...)
		out, failed = cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			return failed // not a matter of what it found
		}
		return nil
	})
	return string(out), failed
}

func (s *site) run(where *space, name string, args ...string) string {
	s.t.Helper()
	out, err := s.try(where, name, args...)
	if err != nil {
		s.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// until waits for what the kernel does in its own time.
func (s *site) until(what string, f func() (now string, ok bool)) {
	s.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		now, ok := f()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: still %q", what, now)
		}
	}
}

// finds waits until a neighbour entry has a hardware address.
func (s *site) finds(where *space, a netip.Addr, at hardware) {
	s.t.Helper()
	s.until(fmt.Sprintf("%v at %v", a, net.HardwareAddr(at[:])), func() (string, bool) {
		out := s.run(where, "ip", "neigh", "show", a.String(), "dev", "eth0")
		return out, strings.Contains(out, "lladdr "+net.HardwareAddr(at[:]).String()+" ")
	})
}

// learn makes an entry of a neighbour that is there.
func (s *site) learn(where *space, a netip.Addr, at hardware) {
	s.t.Helper()
	s.until("ping "+a.String(), func() (string, bool) {
		out, err := s.try(where, "ping", "-c", "1", "-W", "1", "-I", "eth0", a.String())
		return out, err == nil
	})
	s.finds(where, a, at)
	if out := s.run(where, "ip", "neigh", "show", a.String(), "dev", "eth0"); !strings.Contains(out, "REACHABLE") {
		s.t.Fatalf("%v is not sure of where %v is: %s", where, a, out)
	}
}

func (s *site) respond() *Responder {
	s.t.Helper()
	var r *Responder
	s.in(s.host, func() (err error) {
		r, err = NewResponder("tap0", vmHardware[:], bridgeHardware[:], []netip.Addr{vm4, vm6}, slog.New(slog.NewTextHandler(s.t.Output(), nil)))
		return err
	})
	s.t.Cleanup(func() { r.Close() })
	return r
}

func (s *site) observe(where *space, dev string, mac hardware) *Observer {
	s.t.Helper()
	var o *Observer
	s.in(where, func() (err error) {
		o, err = Observe(dev, mac[:])
		return err
	})
	s.t.Cleanup(func() { o.Close() })
	return o
}

// listen opens a port that hears what another station than its own sends.
func (s *site) listen(where *space, from hardware) *port {
	s.t.Helper()
	var p *port
	s.in(where, func() (err error) {
		if p, err = openPort("eth0"); err != nil {
			return err
		}
		return p.listen(slices.Concat(arriving(), sentBy(from), []bpf.Instruction{accept}))
	})
	s.t.Cleanup(func() { p.Close() })
	return p
}

// hears counts frames until n are heard or none more within patience.
func (p *port) hears(t *testing.T, n int, patience time.Duration, want func(frame []byte) bool) (heard int) {
	t.Helper()
	buf := make([]byte, frameLimit)
	deadline := time.Now().Add(patience)
	for heard < n {
		p.file.SetReadDeadline(deadline)
		size, err := p.file.Read(buf)
		if os.IsTimeout(err) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if want(buf[:size]) { // kernels speak for themselves too
			heard++
		}
	}
	return heard
}
