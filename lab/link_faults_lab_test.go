//go:build lab

package lab

import (
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// inside runs a command in a site.
func inside(t *testing.T, l *Lab, site, name string, args ...string) (output string, err error) {
	t.Helper()
	cmd, err := l.Command(t.Context(), site, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// pings tells whether local-dc's echo request of so many bytes of IP is answered.
func pings(t *testing.T, l *Lab, to netip.Addr, size int) bool {
	t.Helper()
	header := 28
	if to.Is6() {
		header = 48
	}
	out, err := inside(t, l, LocalDC, "ping", "-c", "3", "-i", "0.05", "-W", "1", "-M", "dont", "-s", strconv.Itoa(size-header), to.String())
	if _, ended := err.(*exec.ExitError); err != nil && !ended {
		t.Fatalf("ping: %v: %s", err, out)
	}
	return err == nil
}

// TestLinkMTU finds the MTU of a path told by ICMP, and not in a black hole.
func TestLinkMTU(t *testing.T) {
	l := makeLab(t, LinkSettings{RTT: 4 * time.Millisecond})
	for _, to := range []netip.Addr{l.Sites[RemoteDC].WANAddr.Addr(), l.Sites[RemoteDC].WANAddr6.Addr()} {
		mtu, whole, silent, speaking := 1280, 0, true, false
		change(t, l, LinkChange{MTU: &mtu, NoICMP: &silent})
		if !pings(t, l, to, 1280) || pings(t, l, to, 1400) {
			t.Errorf("%s: in a black hole above 1280 bytes small packets must come and large ones vanish", to)
		}
		if c := counters(t, l, LocalDC); c.TooBig < 3 || c.Dropped+c.Lost > 0 {
			t.Errorf("%s: counters %+v", to, c)
		}
		// Once told, the kernel cuts what is larger into fragments.
		change(t, l, LinkChange{NoICMP: &speaking})
		pings(t, l, to, 1400)
		if !pings(t, l, to, 1400) {
			t.Errorf("%s: the kernel did not learn the path's MTU", to)
		}
		if out, err := inside(t, l, LocalDC, "ip", "route", "get", to.String()); err != nil || !strings.Contains(out, "mtu 1280") {
			t.Errorf("%s: route: %v %s", to, err, out)
		}
		change(t, l, LinkChange{MTU: &whole})
	}
}

func TestLinkBlocksProtocols(t *testing.T) {
	l := makeLab(t, LinkSettings{})
	p := newProbe(t, l)
	var server net.Listener
	err := l.Sites[RemoteDC].inNamespace(func() (err error) {
		server, err = net.Listen("tcp", l.Sites[RemoteDC].AgentAddr.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for _, c := range []struct {
		block    []string
		udp, tcp bool
	}{
		{[]string{"udp"}, false, true},
		{[]string{"tcp"}, true, false},
		{[]string{"tcp", "udp"}, false, false},
		{nil, true, true},
	} {
		change(t, l, LinkChange{Block: &c.block})
		if got := len(p.burst(t, 20)) == 20; got != c.udp {
			t.Errorf("without %v: UDP arrives %v", c.block, got)
		}
		err := l.Sites[LocalDC].inNamespace(func() error {
			conn, err := net.DialTimeout("tcp", server.Addr().String(), 500*time.Millisecond)
			if err == nil {
				conn.Close()
			}
			return err
		})
		if (err == nil) != c.tcp {
			t.Errorf("without %v: TCP: %v", c.block, err)
		}
		if blocked := counters(t, l, LocalDC).Blocked > 0; blocked == (c.udp && c.tcp) {
			t.Errorf("without %v: counters %+v", c.block, counters(t, l, LocalDC))
		}
	}
}

// TestLinkNAT lets a server see where a flow comes from, before and after the
// NAT is rebound.
func TestLinkNAT(t *testing.T) {
	l := makeLab(t, LinkSettings{NAT: []string{LocalDC}})
	p := newProbe(t, l)
	here := p.from.LocalAddr().(*net.UDPAddr).AddrPort()
	echo := func() (seen netip.AddrPort) {
		t.Helper()
		buf := make([]byte, 16)
		if _, err := p.from.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		for _, conn := range []*net.UDPConn{p.to, p.from} {
			if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
		}
		n, from, err := p.to.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.to.WriteToUDPAddrPort(buf[:n], from); err != nil {
			t.Fatal(err)
		}
		if n, err := p.from.Read(buf); err != nil || string(buf[:n]) != "ping" {
			t.Fatalf("answer %q: %v", buf[:n], err)
		}
		return from
	}
	first := echo()
	if first.Port() == here.Port() || first != echo() {
		t.Errorf("a flow from %v is seen as %v and then %v", here, first, echo())
	}
	if err := l.Rebind(t.Context(), LocalDC); err != nil {
		t.Fatal(err)
	}
	if after := echo(); after == first || after.Addr() != first.Addr() {
		t.Errorf("after the rebinding a flow is seen as %v, before as %v", after, first)
	}
	if err := l.Rebind(t.Context(), RemoteDC); err == nil || !strings.Contains(err.Error(), "no NAT") {
		t.Errorf("rebinding no NAT: %v", err)
	}
}

// TestReaddress gives local-dc other addresses, twice: the old ones are gone,
// all ways lead to the new ones, and names follow.
func TestReaddress(t *testing.T) {
	l := upWith(t, Options{NoAgent: true, Third: true})
	reaches := func(from, to string) bool {
		t.Helper()
		_, err := inside(t, l, from, "ping", "-c", "1", "-W", "2", to)
		return err == nil
	}
	for range 2 {
		old := []string{l.Sites[LocalDC].WANAddr.Addr().String(), l.Sites[LocalDC].WANAddr6.Addr().String()}
		if err := l.Readdress(t.Context(), LocalDC); err != nil {
			t.Fatal(err)
		}
		again, err := Open(l.Dir)
		if err != nil {
			t.Fatal(err)
		}
		s := again.Sites[LocalDC]
		for _, addr := range old {
			if addr == s.WANAddr.Addr().String() || reaches(RemoteDC, addr) {
				t.Errorf("the old address %s is still there", addr)
			}
		}
		for _, peer := range []string{RemoteDC, ThirdDC} {
			for _, to := range []string{s.WANAddr.Addr().String(), s.WANAddr6.Addr().String(), LocalDC, s.BridgeAddr.Addr().String(), s.BridgeAddr6.Addr().String()} {
				if !reaches(peer, to) {
					t.Errorf("%s does not reach %s", peer, to)
				}
			}
			for _, to := range []string{peer, l.Sites[peer].WANAddr6.Addr().String(), l.Sites[peer].BridgeAddr.Addr().String(), l.Sites[peer].BridgeAddr6.Addr().String()} {
				if !reaches(LocalDC, to) {
					t.Errorf("local-dc does not reach %s of %s", to, peer)
				}
			}
		}
	}
	if err := l.Readdress(t.Context(), Users); err == nil {
		t.Error("the users got another address in the WAN")
	}
}
