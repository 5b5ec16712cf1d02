//go:build lab

package encap

import (
	"bytes"
	_ "embed"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/netredirect/internal/kerneltest"
	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

//go:embed testdata/kernel-end.sh
var kernelEnd string

// bootKernelEnd boots Debian's kernel at the other end of the interface tap of
// the namespace. It returns the path of the guest's console.
func (s *space) bootKernelEnd(tap, encapLimit string) (console string) {
	s.t.Helper()
	command, console := kerneltest.Guest{
		Modules:  []string{"virtio_pci", "virtio_net", "ipip", "sit", "ip6_tunnel"},
		Programs: []string{"ip"},
		Script:   fmt.Sprintf("encaplimit=%q\n%s", encapLimit, kernelEnd),
		Tap:      tap,
		Memory:   256,
	}.QEMU(s.t)
	s.background(command[0], command[1:]...)
	return console
}

// TestKernelAtTheOtherEnd has ipip, sit and ip6tnl of Debian's kernel as the far end of our tunnels:
//
//	client --- source ===== guest (vm)
func TestKernelAtTheOtherEnd(t *testing.T) {
	// The kernel's default is a destination option that limits nesting (RFC 2473, 4.1.1).
	for _, limit := range []string{"", "encaplimit none"} {
		t.Run("ip6tnl "+limit, func(t *testing.T) { testKernelEnd(t, limit) })
	}
}

func testKernelEnd(t *testing.T, limit string) {
	client, source := newSpace(t, "client"), newSpace(t, "source")
	testnet.Join(client.Space, "eth0", source.Space, "lan")
	client.ip(`addr add 10.1.0.2/24 dev eth0
		addr add 10.1.0.3/24 dev eth0
		addr add fd01::2/64 dev eth0 nodad
		addr add fd01::3/64 dev eth0 nodad
		route add 10.2.0.2/32 via 10.1.0.1 src 10.1.0.2
		route add 10.2.0.3/32 via 10.1.0.1 src 10.1.0.3
		route add fd02::2/128 via fd01::1 src fd01::2
		route add fd02::3/128 via fd01::1 src fd01::3`)
	source.ip(`tuntap add tap0 mode tap vnet_hdr
		link set tap0 up
		addr add 10.1.0.1/24 dev lan
		addr add fd01::1/64 dev lan nodad
		addr add 10.9.0.1/24 dev tap0
		addr add fd09::1/64 dev tap0 nodad`)
	console := source.bootKernelEnd("tap0", limit)

	gate := NewGate()
	gate.Set(nil, []netip.Addr{addr("10.2.0.2"), addr("10.2.0.3"), addr("fd02::2"), addr("fd02::3")})
	in4 := source.open(Config{Name: "wm0", MTU: 1480, Local: addr("10.9.0.1"), Remote: addr("10.9.0.2"), Gate: gate})
	in6 := source.open(Config{Name: "wm1", MTU: 1452, Local: addr("fd09::1"), Remote: addr("fd09::2"), Gate: gate})
	source.ip(`route add 10.2.0.2/32 dev wm0
		route add fd02::2/128 dev wm0
		route add 10.2.0.3/32 dev wm1
		route add fd02::3/128 dev wm1`)

	deadline := time.Now().Add(90 * time.Second)
	for {
		var c net.Conn
		err := client.Run(func() (err error) {
			c, err = net.DialTimeout("tcp", "[fd02::3]:7", time.Second)
			return err
		})
		if err == nil {
			c.Close()
			break
		}
		said, _ := os.ReadFile(console)
		if time.Now().After(deadline) || bytes.Contains(said, []byte("Kernel panic")) {
			t.Fatalf("no answer from the guest; its console:\n%s", said)
		}
		time.Sleep(100 * time.Millisecond)
	}

	for _, c := range []struct {
		vm              string
		outer, protocol byte
	}{{"10.2.0.2", 4, protocolIPv4}, {"fd02::2", 4, protocolIPv6}, {"10.2.0.3", 6, protocolIPv4}, {"fd02::3", 6, protocolIPv6}} {
		next := source.capture("tap0")
		client.Sh("ping -c 1 -W 10 -Q 0xb8 " + c.vm)
		compareOuter(t, c.vm, next, c.outer, c.protocol, limit == "")
		client.Sh("ping -c 1 -W 10 -M do -s 1400 " + c.vm)
		transfer(t, client, net.JoinHostPort(c.vm, "7"), 4<<20)
	}
	for _, tunnel := range []*Tunnel{in4, in6} {
		s := tunnel.Stats()
		t.Logf("%s: %+v", tunnel.Name(), s)
		if s.Drops != (Drops{}) {
			t.Errorf("%s dropped: %+v", tunnel.Name(), s.Drops)
		}
		if s.Sent.Bytes < 8<<20 || s.Received.Bytes < 8<<20 {
			t.Errorf("%s carried too little: %+v", tunnel.Name(), s)
		}
	}
}

// compareOuter compares the outer header of the kernel's answer with that of our question, as far as they should be equal.
func compareOuter(t *testing.T, vm string, next func() []byte, version, protocol byte, limited bool) {
	t.Helper()
	var ours, kernels []byte
	for ours == nil || kernels == nil {
		b := next()
		var source byte // the last of its address
		var same []byte
		switch {
		case b[0]>>4 != version:
		case version == 4 && b[9] == protocol:
			source = b[15]
			same = append(append(same, b[0:2]...), b[6:10]...) // version, length, TOS; flags, TTL, protocol
		case version == 6 && (b[6] == protocol || limited && b[6] == unix.IPPROTO_DSTOPTS):
			source = b[23]
			same = append(append(same, b[0], b[1]&0xf0), b[7]) // version, class; hop limit
			if !limited {
				same = append(same, b[6])
			}
		}
		switch source {
		case 1:
			ours = same
		case 2:
			kernels = same
		}
	}
	if !bytes.Equal(ours, kernels) {
		t.Errorf("%s: our outer header has % x where the kernel's has % x", vm, ours, kernels)
	}
}
