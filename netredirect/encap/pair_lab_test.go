//go:build lab

package encap

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// pair is a client that reaches a VM through two hosts, of which the source has the tunnel's near end and the peer the far
// one. The peer has the VM's addresses itself.
//
//	client --- source ===== peer (vm)
type pair struct {
	client, source, peer *space
}

// outer are the addresses of the two hosts, and the MTU that is left of 1500 bytes.
type outer struct {
	name         string
	source, peer netip.Addr
	mtu          int
}

var (
	outer4Ends = outer{"outer IPv4", addr("10.9.0.1"), addr("10.9.0.2"), 1480}
	outer6Ends = outer{"outer IPv6", addr("fd09::1"), addr("fd09::2"), 1460}
	outers     = []outer{outer4Ends, outer6Ends}

	vm4, vm6         = addr("10.2.0.2"), addr("fd02::2")
	client4, client6 = addr("10.1.0.2"), addr("fd01::2")
)

const probePort = 4790

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{newSpace(t, "client"), newSpace(t, "source"), newSpace(t, "peer")}
	testnet.Join(p.client.Space, "eth0", p.source.Space, "lan")
	testnet.Join(p.source.Space, "wan", p.peer.Space, "wan")
	p.addresses()
	return p
}

func (p *pair) addresses() {
	p.client.ip(`addr add 10.1.0.2/24 dev eth0
		addr add fd01::2/64 dev eth0 nodad
		route add default via 10.1.0.1
		route add default via fd01::1`)
	p.source.ip(`addr add 10.1.0.1/24 dev lan
		addr add fd01::1/64 dev lan nodad
		addr add 10.9.0.1/24 dev wan
		addr add fd09::1/64 dev wan nodad`)
	p.peer.ip(`addr add 10.9.0.2/24 dev wan
		addr add fd09::2/64 dev wan nodad
		addr add 10.2.0.2/32 dev lo
		addr add fd02::2/128 dev lo nodad`)
}

func (p *pair) near(o outer) Config {
	g := NewGate()
	g.Set(nil, []netip.Addr{vm4, vm6})
	return Config{Name: "wm0", MTU: o.mtu, Local: o.source, Remote: o.peer, ProbePort: probePort, Gate: g}
}

func (p *pair) far(o outer) Config {
	g := NewGate()
	g.Set([]netip.Addr{vm4, vm6}, nil)
	return Config{Name: "wm0", MTU: o.mtu, Local: o.peer, Remote: o.source, ProbePort: probePort, Gate: g}
}

// route sends what is for the VM into the near device.
func (p *pair) route() {
	p.source.t.Helper()
	p.source.ip(`route add 10.2.0.2/32 dev wm0
		route add fd02::2/128 dev wm0`)
}

// routeBack sends what is for the client into the far device.
func (p *pair) routeBack() {
	p.peer.t.Helper()
	p.peer.ip(`route add 10.1.0.0/24 dev wm0 src 10.2.0.2
		route add fd01::/64 dev wm0 src fd02::2`)
}

// connect opens both ends.
func (p *pair) connect(o outer) (near, far *Tunnel) {
	p.source.t.Helper()
	near, far = p.source.open(p.near(o)), p.peer.open(p.far(o))
	p.route()
	p.routeBack()
	return near, far
}

// transfer sends random bytes to an echo server and checks what comes back.
func transfer(t *testing.T, from *space, address string, size int64) {
	t.Helper()
	var c net.Conn
	from.Must(func() (err error) {
		c, err = net.DialTimeout("tcp", address, 10*time.Second)
		return err
	})
	defer c.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	sent, received := sha256.New(), sha256.New()
	failed := make(chan error, 1)
	go func() {
		data := io.LimitReader(rand.NewChaCha8([32]byte{1}), size)
		_, err := io.Copy(c, io.TeeReader(data, sent))
		c.(*net.TCPConn).CloseWrite()
		failed <- err
	}()
	n, err := io.Copy(received, c)
	if err := <-failed; err != nil {
		t.Fatalf("send to %s: %v", address, err)
	}
	if err != nil || n != size {
		t.Fatalf("received %d bytes of %d from %s: %v", n, size, address, err)
	}
	if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
		t.Errorf("other bytes came back from %s than were sent", address)
	}
}

// await waits until a tunnel's counters are as wanted; a packet may arrive a little before it is counted.
func await(t *testing.T, tunnel *Tunnel, want string, reached func(Stats) bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !reached(tunnel.Stats()); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("want %s, have %+v", want, tunnel.Stats())
		}
	}
}

// mergeReceived makes a veth pair like most network cards: what is sent is split, what is received is merged again.
func mergeReceived(t *testing.T, a *space, nameA string, b *space, nameB string) {
	const setTSO, setGRO = 0x1f, 0x2c // linux/ethtool.h
	t.Helper()
	a.offload(nameA, setTSO, 0)
	b.offload(nameB, setTSO, 0)
	a.offload(nameA, setGRO, 1)
	b.offload(nameB, setGRO, 1)
	// A card raises few interrupts, so that packets come together; a veth's come one by one, and have to wait for others.
	const wait = "unshare -m sh -c 'mount -t sysfs sysfs /sys && echo 1000000 > /sys/class/net/%s/gro_flush_timeout'"
	a.Sh(fmt.Sprintf(wait, nameA))
	b.Sh(fmt.Sprintf(wait, nameB))
}

func (s *space) offload(name string, command, value uint32) {
	s.t.Helper()
	s.Must(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		data := [2]uint32{command, value}
		request := struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&data)}
		copy(request.name[:], name)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
			return fmt.Errorf("set offload %#x of %s: %w", command, name, errno)
		}
		return nil
	})
}

// bindToDevice makes a socket use the tunnel, whatever the routes.
func bindToDevice(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) { failed = unix.BindToDevice(int(fd), "wm0") })
	return errors.Join(err, failed)
}
