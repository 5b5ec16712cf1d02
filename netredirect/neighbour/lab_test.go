//go:build lab

package neighbour

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/pprof"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gopacket/gopacket/layers"
)

func TestGuestFindsEveryoneAtTheBridge(t *testing.T) {
	s := newSite(t)
	heard := s.observe(s.other, "eth0", bridgeHardware)
	r := s.respond()
	for _, a := range []netip.Addr{nobody4, nobody6, gateway4, netip.MustParseAddr("fe80::1")} {
		s.guest.Try("ping -c 1 -W 1 -I eth0 " + a.String())
		s.finds(s.guest, a, bridgeHardware)
	}
	if n := r.Answered(); n < 4 {
		t.Errorf("%d answers counted, want at least 4", n)
	}
	if got := heard.Addresses(); len(got) > 0 {
		t.Errorf("others on the bridge heard answers for %v", got)
	}
	// They would have.
	s.host.Must(func() error { return AnnounceOnce("br0", bridgeHardware[:], []netip.Addr{nobody4}) })
	s.until("others hear an announcement", func() (string, bool) {
		got := heard.Addresses()
		return fmt.Sprint(got), slices.Equal(got, []netip.Addr{nobody4})
	})
}

func TestDuplicatesAreNotFound(t *testing.T) {
	s := newSite(t)
	r := s.respond()
	detected := func(addr string) (out string) {
		s.guest.Sh("ip addr add " + addr + "/64 dev eth0")
		s.until("detection of duplicates of "+addr, func() (string, bool) {
			out = s.guest.Sh("ip -6 addr show dev eth0 to " + addr)
			return out, !strings.Contains(out, "tentative") || strings.Contains(out, "dadfailed")
		})
		return out
	}
	if out := detected("2001:db8::50"); strings.Contains(out, "dadfailed") {
		t.Errorf("a duplicate of a new address was found: %s", out)
	}
	if out := detected(other6.String()); !strings.Contains(out, "dadfailed") {
		t.Fatalf("a real duplicate was not found: %s", out)
	}
	before := r.Answered()
	for _, a := range []string{vm4.String(), "10.0.0.50"} {
		if out, err := s.guest.Try("arping -0 -c 2 -w 2 -i eth0 " + a); err == nil || !strings.Contains(out, " 0 packets received") {
			t.Errorf("a duplicate of %s was found: %v: %s", a, err, out)
		}
	}
	if got := r.Answered(); got != before {
		t.Errorf("%d probes answered", got-before)
	}
	if out := s.guest.Sh("arping -c 1 -w 5 -i eth0 10.0.0.50"); !strings.Contains(out, "from "+net.HardwareAddr(bridgeHardware[:]).String()) {
		t.Errorf("a question is not answered: %s", out)
	}
}

func TestTellCorrectsWhatTheGuestKnows(t *testing.T) {
	s := newSite(t)
	// Linux keeps a young ARP entry from changing: it comes last.
	gateways := []netip.Addr{otherLocal, other6, other4}
	// The guest knows its default route from the other's advertisement. A router
	// says that it is one when it is asked for, too.
	s.other.Must(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0o644) })
	ra := s.listen(s.other, vmHardware)
	if err := ra.send(routerAdvertisement(t)); err != nil {
		t.Fatal(err)
	}
	defaultRoute := func() (string, bool) {
		out := s.guest.Sh("ip -6 route show default")
		return out, strings.Contains(out, "via "+otherLocal.String())
	}
	s.until("default route", defaultRoute)
	for _, a := range gateways {
		s.learn(s.guest, a, otherHardware)
	}
	r := s.respond()
	if err := r.Tell(gateways); err != nil {
		t.Fatal(err)
	}
	for _, a := range gateways {
		s.finds(s.guest, a, bridgeHardware)
	}
	if out, ok := defaultRoute(); !ok {
		t.Errorf("the default route is gone: %s", out)
	}
	// It would be without the router flag.
	m := discovery{otherLocal, allNodes, advertisement, flagOverride, otherLocal, bridgeHardware}
	if err := r.port.send(m.append(ethernet{vmHardware, bridgeHardware, etherTypeIPv6}.append(nil))); err != nil {
		t.Fatal(err)
	}
	s.until("default route is gone", func() (string, bool) {
		out, ok := defaultRoute()
		return out, !ok
	})
	if err := r.Tell([]netip.Addr{other4, netip.IPv4Unspecified()}); err == nil {
		t.Error("0.0.0.0 could be told")
	}
}

func routerAdvertisement(t *testing.T) []byte {
	t.Helper()
	to := groupHardware(allNodes)
	ip := &layers.IPv6{Version: 6, NextHeader: layers.IPProtocolICMPv6, HopLimit: 255, SrcIP: otherLocal.AsSlice(), DstIP: allNodes.AsSlice()}
	header := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeRouterAdvertisement, 0)}
	if err := header.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	return serialized(t,
		&layers.Ethernet{SrcMAC: otherHardware[:], DstMAC: to[:], EthernetType: layers.EthernetTypeIPv6},
		ip, header, &layers.ICMPv6RouterAdvertisement{HopLimit: 64, RouterLifetime: 1800})
}

func TestAnnounceChangesWhatOthersKnow(t *testing.T) {
	s := newSite(t)
	addrs := []netip.Addr{vm4, vm6}
	for _, a := range addrs {
		// Each right after it was learned.
		s.learn(s.other, a, vmHardware)
		s.host.Must(func() error { return AnnounceOnce("br0", bridgeHardware[:], []netip.Addr{a}) })
		s.finds(s.other, a, bridgeHardware)
	}
	for _, a := range addrs {
		s.host.Must(func() error { return AnnounceOnce("br0", vmHardware[:], []netip.Addr{a}) })
		s.finds(s.other, a, vmHardware)
	}
}

func TestAnnounceRepeats(t *testing.T) {
	s := newSite(t)
	p := s.listen(s.other, bridgeHardware)
	announced := func(frame []byte) bool {
		a := claimed(frame, bridgeHardware)
		return a == nobody4 || a == nobody6
	}
	addrs := []netip.Addr{nobody4, nobody6}
	s.host.Must(func() error { return Announce(t.Context(), "br0", bridgeHardware[:], addrs) })
	if n := p.hears(t, 4*3+1, time.Second, announced); n != 4*3 {
		t.Errorf("%d frames heard, want four times three", n)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	s.host.Must(func() error { return Announce(ended, "br0", bridgeHardware[:], addrs) })
	if n := p.hears(t, 3+1, time.Second, announced); n != 3 {
		t.Errorf("%d frames heard, want one time three", n)
	}
}

func TestAnnounceRefuses(t *testing.T) {
	s := newSite(t)
	s.host.Sh("ip link set br0 down")
	for _, c := range []struct {
		dev  string
		mac  net.HardwareAddr
		addr netip.Addr
		want string
	}{
		{"br9", bridgeHardware[:], vm4, "br9"},
		{"lo", bridgeHardware[:], vm4, "not an Ethernet device"},
		{"br0", broadcast[:], vm4, "hardware address"},
		{"br0", bridgeHardware[:], allNodes, "not the address of one host"},
		{"br0", bridgeHardware[:], netip.Addr{}, "not the address of one host"},
		{"br0", bridgeHardware[:], vm4, "network is down"},
	} {
		s.host.Must(func() error {
			err := AnnounceOnce(c.dev, c.mac, []netip.Addr{c.addr})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("announce %v on %s: %v, want %q", c.addr, c.dev, err, c.want)
			}
			return nil
		})
	}
}

func TestObserverFindsAddresses(t *testing.T) {
	s := newSite(t)
	o := s.observe(s.host, "tap0", vmHardware)
	s.until("answer to a ping", func() (string, bool) {
		out, err := s.other.Try("ping -c 1 -W 1 " + vm4.String())
		return out, err == nil
	})
	s.other.Sh("ping -c 1 -W 5 " + vm6.String())
	want := []netip.Addr{vm4, vm6}
	s.until("addresses of the guest", func() (string, bool) {
		got := o.Addresses()
		return fmt.Sprint(got), slices.Equal(got, want)
	})
	// A later address is found beside a flood of those, which is no longer heard.
	p := s.listen(s.guest, otherHardware)
	for i := range 20_000 {
		if err := p.send(packet4(vmHardware, want[0]), packet6(vmHardware, want[1])); err != nil {
			t.Fatal(i, err)
		}
	}
	if err := p.send(packet4(vmHardware, netip.MustParseAddr("10.0.0.6"))); err != nil {
		t.Fatal(err)
	}
	want = append(want, netip.MustParseAddr("10.0.0.6"))
	s.until("addresses of the guest", func() (string, bool) {
		got := o.Addresses()
		return fmt.Sprint(got), slices.Equal(got, want)
	})
}

func TestObserverIsBounded(t *testing.T) {
	s := newSite(t)
	o := s.observe(s.host, "tap0", vmHardware)
	p := s.listen(s.guest, otherHardware)
	// IPv6 makes the largest filter.
	for i := range byte(2 * observed) {
		a := vm6.As16()
		a[14] = 1 + i
		if err := p.send(packet6(vmHardware, netip.AddrFrom16(a))); err != nil {
			t.Fatal(err)
		}
		if err := p.send(packet6(otherHardware, host6)); err != nil {
			t.Fatal(err)
		}
	}
	s.until("addresses of the guest", func() (string, bool) {
		o.mu.Lock()
		defer o.mu.Unlock()
		return fmt.Sprint(o.seen), len(o.seen) == observed
	})
	if slices.Contains(o.Addresses(), host6) {
		t.Error("the address of another was taken")
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
}

func TestOnlyTheGuestItselfIsAnswered(t *testing.T) {
	s := newSite(t)
	r := s.respond()
	p := s.listen(s.guest, bridgeHardware)
	frame := askARP(t, sameARP)
	tagged := slices.Concat(frame[:offsetEtherType], []byte{0x81, 0, 0, 7}, frame[offsetEtherType:])
	// The bridge hands the guest what claims to be from it.
	forwarded := s.listen(s.guest, vmHardware)
	if err := s.listen(s.other, bridgeHardware).send(frame); err != nil {
		t.Fatal(err)
	}
	if forwarded.hears(t, 1, 5*time.Second, func(f []byte) bool { return bytes.Equal(f, frame) }) == 0 {
		t.Fatal("the bridge did not forward the question of another")
	}
	if err := p.send(tagged, frame); err != nil {
		t.Fatal(err)
	}
	answer := r.rules.answer(frame)
	isAnswer := func(f []byte) bool { return bytes.Equal(f, answer) }
	if p.hears(t, 1, 5*time.Second, isAnswer) == 0 {
		t.Error("the guest's question has no answer")
	}
	if p.hears(t, 1, 300*time.Millisecond, isAnswer) > 0 {
		t.Error("a question with a tag, or of another, has an answer")
	}
}

func TestFloodIsBounded(t *testing.T) {
	s := newSite(t)
	r := s.respond()
	p := s.listen(s.guest, bridgeHardware)
	frame := askARP(t, sameARP)
	start := time.Now()
	for range 20_000 {
		if err := p.send(frame); err != nil {
			t.Fatal(err)
		}
	}
	s.until("a burst of answers", func() (string, bool) {
		n := r.Answered()
		return fmt.Sprint(n), n >= readBurst
	})
	n := r.Answered()
	if most := readBurst + 1 + uint64(time.Since(start).Seconds()*readRate); n > most {
		t.Errorf("%d answers, want at most %d", n, most)
	}
	s.guest.Try("ping -c 1 -W 1 " + nobody4.String())
	s.finds(s.guest, nobody4, bridgeHardware)
}

func TestTapGoesDownAndUp(t *testing.T) {
	s := newSite(t)
	r := s.respond()
	s.host.Sh("ip link set tap0 down")
	if err := r.Tell([]netip.Addr{other4}); err == nil {
		t.Error("told through a tap that is down")
	}
	s.host.Sh("ip link set tap0 up")
	s.guest.Try("ping -c 1 -W 1 " + nobody4.String())
	s.finds(s.guest, nobody4, bridgeHardware)
	s.host.Sh("ip link del tap0")
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// A real tap, of a VM that is written here, and that stops reading it.
func TestTap(t *testing.T) {
	s := newSite(t)
	var vm *os.File
	s.host.Must(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		request, err := unix.NewIfreq("tap1")
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return err
		}
		vm = os.NewFile(uintptr(fd), "tap1")
		return nil
	})
	defer vm.Close()
	s.host.Sh("ip link set tap1 master br0 up")
	var r *Responder
	s.host.Must(func() (err error) {
		r, err = NewResponder("tap1", vmHardware[:], bridgeHardware[:], []netip.Addr{vm4, vm6}, slog.New(slog.NewTextHandler(t.Output(), nil)))
		return err
	})
	defer r.Close()
	hears := func(want []byte) {
		t.Helper()
		buf := make([]byte, frameLimit)
		for n := 0; string(buf[:n]) != string(want); { // others on the bridge speak too
			var err error
			vm.SetReadDeadline(time.Now().Add(5 * time.Second))
			if n, err = vm.Read(buf); err != nil {
				t.Fatalf("% x is not heard: %v", want, err)
			}
		}
	}
	asks := func() {
		t.Helper()
		for _, question := range [][]byte{askARP(t, sameARP), askND(t, sameND)} {
			if _, err := vm.Write(question); err != nil {
				t.Fatal(err)
			}
			hears(r.rules.answer(question))
		}
	}
	asks()
	// What it is told while it stands still is there when it goes on, and too much
	// of it is lost without harm.
	start := time.Now()
	if err := r.Tell(append([]netip.Addr{gateway6}, slices.Repeat([]netip.Addr{gateway4}, 10_000)...)); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("telling took %v", took)
	}
	hears(r.rules.told(gateway6))
	for err := error(nil); err == nil; {
		vm.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = vm.Read(make([]byte, frameLimit))
	}
	asks()
}

func TestCloseLeavesNothing(t *testing.T) {
	s := newSite(t)
	traces := func() string {
		var sockets []byte
		s.host.Must(func() (err error) {
			sockets, err = os.ReadFile("/proc/thread-self/net/packet")
			return err
		})
		link := s.host.Sh("ip -d link show dev tap0")
		_, promiscuity, _ := strings.Cut(link, "promiscuity ")
		return fmt.Sprintf("%d sockets, promiscuity %s", strings.Count(string(sockets), "\n")-1, strings.Fields(promiscuity)[0])
	}
	serving := func() int {
		var b strings.Builder
		if err := pprof.Lookup("goroutine").WriteTo(&b, 2); err != nil {
			t.Fatal(err)
		}
		return strings.Count(b.String(), "(*port).serve")
	}
	before := traces()
	r := s.respond()
	o := s.observe(s.host, "tap0", vmHardware)
	if traces() == before || serving() != 2 {
		t.Fatalf("%s, %d goroutines at work", traces(), serving())
	}
	for _, err := range []error{r.Close(), o.Close()} {
		if err != nil {
			t.Error(err)
		}
	}
	if after := traces(); after != before || serving() != 0 {
		t.Errorf("%s, %d goroutines left behind; before: %s", after, serving(), before)
	}
	if err := r.Tell([]netip.Addr{other4}); err == nil {
		t.Error("told after the end")
	}
}
