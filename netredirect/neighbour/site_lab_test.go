//go:build lab

package neighbour

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/bpf"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// The lab, three network namespaces:
//
//	guest           host                      other
//	eth0 ---- tap0 [br0] port0 ------------- eth0
//	.5, ::5                                   .7, ::7     of 10.0.0.0/24, 2001:db8::/64
//
// A veth stands for the tap: a bridge and a packet socket see no difference.
type site struct {
	t                  *testing.T
	guest, host, other *testnet.Space
}

var (
	other4     = netip.MustParseAddr("10.0.0.7")
	other6     = netip.MustParseAddr("2001:db8::7")
	otherLocal = netip.MustParseAddr("fe80::5054:ff:fe09:909")
	nobody4    = netip.MustParseAddr("10.0.0.99")
	nobody6    = netip.MustParseAddr("2001:db8::99")
)

func newSite(t *testing.T) *site {
	s := &site{t, testnet.New(t, "guest"), testnet.New(t, "host"), testnet.New(t, "other")}
	for _, where := range []*testnet.Space{s.guest, s.host, s.other} { // it may have these from the machine
		where.Sh(`cd /proc/sys/net/ipv6/conf/default
			echo 0 > forwarding; echo 1 > accept_ra; echo 1 > accept_dad; echo 1 > dad_transmits`)
	}
	s.host.Sh("ip link add br0 address " + net.HardwareAddr(bridgeHardware[:]).String() + " type bridge; ip link set br0 up")
	for port, end := range map[string]struct {
		*testnet.Space
		hardware
		last string
	}{"tap0": {s.guest, vmHardware, "5"}, "port0": {s.other, otherHardware, "7"}} {
		testnet.Join(s.host, port, end.Space, "eth0")
		s.host.Sh("ip link set " + port + " master br0")
		end.Sh(fmt.Sprintf(`ip link set eth0 down; ip link set eth0 address %s up
			ip addr add 10.0.0.%s/24 dev eth0; ip addr add 2001:db8::%[2]s/64 dev eth0 nodad`, net.HardwareAddr(end.hardware[:]), end.last))
	}
	for dev, ready := range map[string]string{"br0": "state UP", "tap0": "state forwarding", "port0": "state forwarding"} {
		s.until(dev+" up", func() (string, bool) {
			out := s.host.Sh("ip -d link show dev " + dev)
			return out, strings.Contains(out, ready)
		})
	}
	return s
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
func (s *site) finds(where *testnet.Space, a netip.Addr, at hardware) {
	s.t.Helper()
	s.until(fmt.Sprintf("%v at %v", a, net.HardwareAddr(at[:])), func() (string, bool) {
		out := where.Sh("ip neigh show " + a.String() + " dev eth0")
		return out, strings.Contains(out, "lladdr "+net.HardwareAddr(at[:]).String()+" ")
	})
}

// learn makes an entry of a neighbour that is there.
func (s *site) learn(where *testnet.Space, a netip.Addr, at hardware) {
	s.t.Helper()
	s.until("ping "+a.String(), func() (string, bool) {
		out, err := where.Try("ping -c 1 -W 1 -I eth0 " + a.String())
		return out, err == nil
	})
	s.finds(where, a, at)
	if out := where.Sh("ip neigh show " + a.String() + " dev eth0"); !strings.Contains(out, "REACHABLE") {
		s.t.Fatalf("%v is not sure of where %v is: %s", where, a, out)
	}
}

func (s *site) respond() *Responder {
	s.t.Helper()
	var r *Responder
	s.host.Must(func() (err error) {
		r, err = NewResponder("tap0", vmHardware[:], bridgeHardware[:], []netip.Addr{vm4, vm6}, slog.New(slog.NewTextHandler(s.t.Output(), nil)))
		return err
	})
	s.t.Cleanup(func() { r.Close() })
	return r
}

func (s *site) observe(where *testnet.Space, dev string, mac hardware) *Observer {
	s.t.Helper()
	var o *Observer
	where.Must(func() (err error) {
		o, err = Observe(dev, mac[:])
		return err
	})
	s.t.Cleanup(func() { o.Close() })
	return o
}

// listen opens a port that hears what another station than its own sends.
func (s *site) listen(where *testnet.Space, from hardware) *port {
	s.t.Helper()
	var p *port
	where.Must(func() (err error) {
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
