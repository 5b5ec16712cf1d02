//go:build lab

package hostnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// listen echoes what comes to an address of the site by TCP, and sends the
// largest segment that each client has offered to mss.
func (s *site) listen(at netip.AddrPort, mss chan<- int) {
	s.t.Helper()
	var l net.Listener
	s.Must(func() (err error) {
		l, err = net.Listen("tcp", at.String())
		return err
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if mss != nil {
				mss <- segmentOf(c.(*net.TCPConn))
			}
			go func() { // ends with its client
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	s.t.Cleanup(func() {
		l.Close()
		<-done
	})
}

func segmentOf(c *net.TCPConn) (mss int) {
	raw, err := c.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { mss, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
	}
	return mss
}

// dial connects from the site.
func (s *site) dial(from netip.Addr, to netip.AddrPort, timeout time.Duration) (c net.Conn, err error) {
	d := net.Dialer{Timeout: timeout, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
	err = s.Run(func() (err error) {
		c, err = d.Dial("tcp", to.String())
		return err
	})
	return c, err
}

// echo sends a line over a connection and waits for it to come back.
func echo(c net.Conn, line string, timeout time.Duration) error {
	c.SetDeadline(time.Now().Add(timeout))
	if _, err := io.WriteString(c, line); err != nil {
		return err
	}
	back := make([]byte, len(line))
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if string(back) != line {
		return fmt.Errorf("sent %q, got back %q", line, back)
	}
	return nil
}

// TestBridgeTurnsFramesToTheHost shows what redirection at the source rests on:
// frames on a bridge to the MAC address of a VM that is not there become packets
// of the host, which routes them elsewhere. The clients keep the VM's MAC.
//
//	client                 host                        away
//	eth0 ---------------- v0=br0  up0 ---------------- eth0
//	192.0.2.9             192.0.2.1  198.51.100.1      198.51.100.2
//	2001:db8:1::9         ::1        2001:db8:2::1     2001:db8:2::2, the VM's 192.0.2.5, 2001:db8:1::5
func TestBridgeTurnsFramesToTheHost(t *testing.T) {
	host, client, away := newSite(t, "host"), newSite(t, "client"), newSite(t, "away")
	host.Sh(`ip link add br0 address 02:00:00:00:00:01 type bridge; ip link set br0 up
		ip addr add 192.0.2.1/24 dev br0; ip addr add 2001:db8:1::1/64 dev br0 nodad
		sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.br0.rp_filter=0
		sysctl -qw net.ipv4.conf.all.send_redirects=0`)
	testnet.Join(host.Space, "v0", client.Space, "eth0")
	testnet.Join(host.Space, "up0", away.Space, "eth0")
	host.Sh(`ip link set v0 master br0
		ip addr add 198.51.100.1/24 dev up0; ip addr add 2001:db8:2::1/64 dev up0 nodad`)
	client.Sh(`ip addr add 192.0.2.9/24 dev eth0; ip addr add 2001:db8:1::9/64 dev eth0 nodad
		ip neigh add 192.0.2.5 lladdr 52:54:00:00:00:01 dev eth0 nud permanent
		ip neigh add 2001:db8:1::5 lladdr 52:54:00:00:00:01 dev eth0 nud permanent`)
	away.Sh(`ip addr add 198.51.100.2/24 dev eth0; ip addr add 2001:db8:2::2/64 dev eth0 nodad
		ip addr add 192.0.2.5/32 dev lo; ip addr add 2001:db8:1::5/128 dev lo nodad
		ip route add default via 198.51.100.1; ip route add default via 2001:db8:2::1`)

	h := host.host()
	routes := []Step{
		{Route: &Route{Table: 11901, Dst: prefix("192.0.2.5/32"), Dev: "up0", Via: addr("198.51.100.2")}},
		{Route: &Route{Table: 11901, Dst: prefix("2001:db8:1::5/128"), Dev: "up0", Via: addr("2001:db8:2::2")}},
		{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.5/32"), Table: 11901}},
		{Rule: &Rule{Priority: 1190, To: prefix("2001:db8:1::5/128"), Table: 11901}},
	}
	redirect := Step{Table: &Table{Family: "bridge", Name: "wanmig_0", Body: redirectBody}}
	host.apply(h, routes...)

	for _, c := range []struct{ from, vm string }{{"192.0.2.9", "192.0.2.5"}, {"2001:db8:1::9", "2001:db8:1::5"}} {
		from, vm := addr(c.from), netip.AddrPortFrom(addr(c.vm), 7)
		away.listen(vm, nil)
		if conn, err := client.dial(from, vm, 500*time.Millisecond); err == nil {
			conn.Close()
			t.Fatalf("%s is reached without the redirection", vm)
		}
		host.apply(h, redirect)
		conn, err := client.dial(from, vm, 5*time.Second)
		if err != nil {
			t.Fatalf("with the redirection: %v", err)
		}
		for i := range 10 {
			if err := echo(conn, fmt.Sprintf("line %d of %s\n", i, strings.Repeat("x", 1000*i)), 5*time.Second); err != nil {
				t.Fatalf("%s: %v", vm, err)
			}
		}
		host.revert(h, redirect)
		if err := echo(conn, "nothing\n", 500*time.Millisecond); err == nil {
			t.Fatalf("%s is reached after the redirection", vm)
		}
		conn.Close()
	}
}

// TestProxyAnswersForTheGuest asks for the VM's addresses on its old network.
func TestProxyAnswersForTheGuest(t *testing.T) {
	host, client := newSite(t, "host"), newSite(t, "client")
	host.Sh(`ip link add br0 address 02:00:00:00:00:01 type bridge; ip link set br0 up
		ip addr add 192.0.2.1/24 dev br0; ip addr add 2001:db8:1::1/64 dev br0 nodad
		sysctl -qw net.ipv4.conf.br0.forwarding=1 net.ipv6.conf.all.forwarding=1 net.ipv4.neigh.br0.proxy_delay=0 net.ipv6.neigh.br0.proxy_delay=0
		ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up`)
	testnet.Join(host.Space, "v0", client.Space, "eth0")
	host.Sh("ip link set v0 master br0")
	client.Sh("ip addr add 192.0.2.9/24 dev eth0; ip addr add 2001:db8:1::9/64 dev eth0 nodad")
	h := host.host()
	host.apply(h,
		Step{Sysctl: &Sysctl{Key: "net/ipv6/conf/br0/proxy_ndp", Value: "1", Was: "0"}},
		Step{Route: &Route{Table: 11901, Dst: prefix("192.0.2.5/32"), Dev: "up0"}},
		Step{Route: &Route{Table: 11901, Dst: prefix("2001:db8:1::5/128"), Dev: "up0"}},
		Step{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.5/32"), Table: 11901}},
		Step{Rule: &Rule{Priority: 1190, To: prefix("2001:db8:1::5/128"), Table: 11901}},
		Step{Neighbour: &Neighbour{Dev: "br0", IP: addr("192.0.2.5"), Proxy: true}},
		Step{Neighbour: &Neighbour{Dev: "br0", IP: addr("2001:db8:1::5"), Proxy: true}})
	c := client.host()
	for _, vm := range []string{"192.0.2.5:7", "[2001:db8:1::5]:7"} {
		at := netip.MustParseAddrPort(vm)
		client.Must(func() error { // a packet that makes the client ask
			conn, err := net.Dial("udp", vm)
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.Write([]byte("x"))
			return err
		})
		eventually(t, vm+" is answered for", func() bool {
			var known map[netip.Addr]net.HardwareAddr
			client.Must(func() (err error) {
				known, err = c.Neighbours("eth0")
				return err
			})
			return known[at.Addr()].String() == "02:00:00:00:00:01"
		})
	}
}

// pathsSites are a host with a guest, and a client that reaches it over two paths.
//
//	client           host              guest
//	a0 ------------- wm0
//	b0 ------------- up0   br0 ------- eth0
//	203.0.113.9 (lo)                   192.0.2.5
//	2001:db8:9::9                      2001:db8:1::5
func pathsSites(t *testing.T) (client, host, guest *site) {
	client, host, guest = newSite(t, "client"), newSite(t, "host"), newSite(t, "guest")
	host.Sh(`ip link add br0 address 02:00:00:00:00:01 type bridge; ip link set br0 up
		ip addr add 192.0.2.1/24 dev br0; ip addr add 2001:db8:1::1/64 dev br0 nodad
		sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0
		sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 net.ipv4.conf.default.rp_filter=0`)
	client.Sh(`ip addr add 203.0.113.9/32 dev lo; ip addr add 2001:db8:9::9/128 dev lo nodad
		sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0`)
	testnet.Join(host.Space, "wm0", client.Space, "a0")
	testnet.Join(host.Space, "up0", client.Space, "b0")
	testnet.Join(host.Space, "v0", guest.Space, "eth0")
	host.Sh(`ip link set v0 master br0
		ip addr add 198.51.100.1/30 dev wm0; ip addr add 2001:db8:a::1/64 dev wm0 nodad
		ip addr add 198.51.100.5/30 dev up0; ip addr add 2001:db8:b::1/64 dev up0 nodad
		ip route add default via 198.51.100.6; ip route add default via 2001:db8:b::2
		sysctl -qw net.ipv4.conf.wm0.rp_filter=0 net.ipv4.conf.up0.rp_filter=0`)
	client.Sh(`ip addr add 198.51.100.2/30 dev a0; ip addr add 2001:db8:a::2/64 dev a0 nodad
		ip addr add 198.51.100.6/30 dev b0; ip addr add 2001:db8:b::2/64 dev b0 nodad
		sysctl -qw net.ipv4.conf.a0.rp_filter=0 net.ipv4.conf.b0.rp_filter=0`)
	guest.Sh(`ip addr add 192.0.2.5/24 dev eth0; ip addr add 2001:db8:1::5/64 dev eth0 nodad
		ip route add default via 192.0.2.1; ip route add default via 2001:db8:1::1`)
	return client, host, guest
}

const (
	viaTunnel = "ip route replace 192.0.2.5 via 198.51.100.1; ip route replace 2001:db8:1::5 via 2001:db8:a::1"
	viaUplink = "ip route replace 192.0.2.5 via 198.51.100.5; ip route replace 2001:db8:1::5 via 2001:db8:b::1"
)

// pathBody marks the connections that come by wm0, and the packets that answer
// them, and counts what leaves by either path.
const pathBody = `	counter tunnel { }
	counter uplink { }
	chain marks {
		type filter hook prerouting priority mangle; policy accept;
		iifname "wm0" ct state new ct mark set ct mark & 0xffff00ff | 0x00000100
		iifname "br0" ct mark & 0x0000ff00 == 0x00000100 meta mark set ct mark
	}
	chain paths {
		type filter hook postrouting priority 300; policy accept;
		oifname "wm0" counter name tunnel
		oifname "up0" counter name uplink
	}`

// TestFlowIsAnsweredByItsPath shows that the answers of a connection leave by
// the interface that it came from, and those of others by the default route.
func TestFlowIsAnsweredByItsPath(t *testing.T) {
	client, host, guest := pathsSites(t)
	h := host.host()
	steps := []Step{
		{Route: &Route{Table: 11901, Dst: prefix("0.0.0.0/0"), Dev: "wm0", Via: addr("198.51.100.2")}},
		{Route: &Route{Table: 11901, Dst: prefix("::/0"), Dev: "wm0", Via: addr("2001:db8:a::2")}},
		{Rule: &Rule{Priority: 1190, From: prefix("192.0.2.5/32"), Mark: 0x100, Mask: 0xff00, Table: 11901}},
		{Rule: &Rule{Priority: 1190, From: prefix("2001:db8:1::5/128"), Mark: 0x100, Mask: 0xff00, Table: 11901}},
		{Table: &Table{Family: "inet", Name: "wanmig_0", Body: pathBody}},
	}
	host.Sh("sysctl -qw net.netfilter.nf_conntrack_acct=1")
	host.apply(h, steps...)
	// left returns what has left by each path since it was last asked.
	var before map[string]Counter
	left := func() (tunnel, uplink uint64) {
		var now map[string]Counter
		host.Must(func() (err error) {
			now, err = h.Counters(context.Background(), *steps[4].Table)
			return err
		})
		defer func() { before = now }()
		return now["tunnel"].Packets - before["tunnel"].Packets, now["uplink"].Packets - before["uplink"].Packets
	}

	for _, c := range []struct{ from, vm string }{{"203.0.113.9", "192.0.2.5"}, {"2001:db8:9::9", "2001:db8:1::5"}} {
		from, vm := addr(c.from), netip.AddrPortFrom(addr(c.vm), 7)
		guest.listen(vm, nil)
		dial := func() net.Conn {
			conn, err := client.dial(from, vm, 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			return conn
		}
		send := func(conn net.Conn) {
			for i := range 20 {
				if err := echo(conn, fmt.Sprint("line ", i, "\n"), 5*time.Second); err != nil {
					t.Fatal(err)
				}
			}
		}
		client.Sh(viaTunnel)
		old := dial()
		left()
		send(old)
		if tunnel, uplink := left(); tunnel < 20 || uplink > 2 {
			t.Errorf("%s: of a connection by the tunnel, %d answers went there and %d elsewhere", vm, tunnel, uplink)
		}
		client.Sh(viaUplink)
		send(old)
		if tunnel, uplink := left(); tunnel < 20 || uplink > 2 {
			t.Errorf("%s: after the route has moved, %d answers went to the tunnel and %d elsewhere", vm, tunnel, uplink)
		}
		fresh := dial()
		left()
		send(fresh)
		if tunnel, uplink := left(); uplink < 20 || tunnel > 2 {
			t.Errorf("%s: of a new connection, %d answers went to the tunnel and %d elsewhere", vm, tunnel, uplink)
		}

		var marked, all []Flow
		host.Must(func() (err error) {
			if marked, err = h.Flows([]netip.Addr{vm.Addr()}, 0x100, 0xff00); err != nil {
				return err
			}
			all, err = h.Flows([]netip.Addr{vm.Addr()}, 0, 0)
			return err
		})
		local := func(c net.Conn) netip.AddrPort { return netip.MustParseAddrPort(c.LocalAddr().String()) }
		established := func(f Flow) bool {
			return f.Proto == "tcp" && f.State == "ESTABLISHED" && f.Dst == vm && f.Packets >= 80
		}
		if len(marked) != 1 || !established(marked[0]) || marked[0].Src != local(old) {
			t.Errorf("marked: %+v, want that of %v", marked, local(old))
		}
		if len(all) != 2 {
			t.Errorf("all: %+v", all)
		}
	}
	host.Must(func() error {
		flows, err := h.Flows([]netip.Addr{addr("192.0.2.77")}, 0, 0)
		if len(flows) != 0 {
			t.Errorf("flows of someone else: %+v", flows)
		}
		return err
	})
	host.revert(h, steps...)
	host.Must(func() error {
		if _, err := h.Counters(context.Background(), *steps[4].Table); !strings.Contains(fmt.Sprint(err), "not exist") {
			t.Errorf("counters of no table: %v", err)
		}
		return nil
	})
}

// TestSegmentsAreClamped has both families offer segments that fit the path.
func TestSegmentsAreClamped(t *testing.T) {
	client, host, guest := pathsSites(t)
	h := host.host()
	client.Sh(viaTunnel)
	host.Sh("ip link set wm0 mtu 1400; ip route replace default via 198.51.100.2; ip route replace default via 2001:db8:a::2")
	clamp := Step{Table: &Table{Family: "inet", Name: "wanmig_0", Body: strings.ReplaceAll(clampBody, "up0", "wm0")}}
	for _, c := range []struct {
		from, vm  string
		unclamped int
		clamped   int
	}{
		{"203.0.113.9", "192.0.2.5", 1460, 1360},
		{"2001:db8:9::9", "2001:db8:1::5", 1440, 1340},
	} {
		// The guest is the client here: its SYN goes out by wm0.
		at := netip.AddrPortFrom(addr(c.from), 7)
		offered := make(chan int, 1)
		client.listen(at, offered)
		for _, want := range []int{c.unclamped, c.clamped} {
			conn, err := guest.dial(addr(c.vm), at, 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			// Timestamps take 12 bytes of each segment.
			if mss := <-offered + 12; mss != want {
				t.Errorf("%s offers segments of %d bytes, want %d", c.vm, mss, want)
			}
			host.apply(h, clamp)
		}
		host.revert(h, clamp)
	}
}

func TestFacts(t *testing.T) {
	s := bridgeSite(t)
	h := s.host()
	s.Sh(`nft add table ip filter; nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'
		nft add chain ip filter INPUT '{ type filter hook input priority 0; policy drop; }'
		ip route add 198.51.100.128/25 dev up0 mtu 1300
		ip neigh add 192.0.2.8 lladdr 52:54:00:00:00:08 dev br0 nud stale
		ip neigh add 2001:db8:1::8 lladdr 52:54:00:00:00:08 dev br0 nud permanent
		ip neigh add 192.0.2.7 lladdr 52:54:00:00:00:07 dev br0 nud failed`)
	s.apply(h, Step{Table: &Table{Family: "inet", Name: "wanmig_0", Body: "chain c { type filter hook forward priority 0; policy drop; }"}})
	s.Must(func() error {
		b, err := h.Bridge("br0")
		if err != nil {
			return err
		}
		want := fmt.Sprint([]string{"192.0.2.1/24", "2001:db8:1::1/64"})
		if b.Name != "br0" || b.Index == 0 || b.MAC.String() != "02:00:00:00:00:01" || b.MTU != 1500 || fmt.Sprint(b.Prefixes) != want || b.VLANAware {
			t.Errorf("bridge: %+v", b)
		}
		if _, err := h.Bridge("up0"); err == nil || !strings.Contains(err.Error(), "up0 is no Linux bridge but of kind veth") {
			t.Errorf("a bridge that is none: %v", err)
		}
		if _, err := h.Bridge("nowhere"); !errors.Is(err, unix.ENODEV) {
			t.Errorf("a bridge that is not there: %v", err)
		}

		if vlan, err := h.PortVLAN("v0"); vlan != 0 || err != nil {
			t.Errorf("VLAN of a port: %d, %v", vlan, err)
		}
		if _, err := h.PortVLAN("up0"); err == nil {
			t.Error("VLAN of what is no port")
		}

		for dst, want := range map[string]string{
			"192.0.2.9":         "br0 192.0.2.1 1500",
			"203.0.113.1":       "up0 198.51.100.1 1500",
			"198.51.100.200":    "up0 198.51.100.1 1300",
			"2001:db8:1::9":     "br0 2001:db8:1::1 1500",
			"2001:db8:ffff::20": "up0 2001:db8:2::1 1500",
		} {
			dev, source, mtu, err := h.RouteTo(addr(dst))
			if got := fmt.Sprint(dev, " ", source, " ", mtu); err != nil || got != want {
				t.Errorf("route to %s: %s, %v, want %s", dst, got, err, want)
			}
		}

		known, err := h.Neighbours("br0")
		if err != nil {
			return err
		}
		if len(known) != 2 || known[addr("192.0.2.8")].String() != "52:54:00:00:00:08" || known[addr("2001:db8:1::8")].String() != "52:54:00:00:00:08" {
			t.Errorf("neighbours: %v", known)
		}

		chains, err := h.ForwardPolicyDrops(context.Background())
		if fmt.Sprint(chains) != "[ip filter FORWARD]" {
			t.Errorf("chains that drop: %v", chains)
		}
		if _, err := h.Sysctl("net/ipv4/conf/../../../kernel/osrelease"); !errors.Is(err, ErrInvalid) {
			t.Errorf("a path elsewhere: %v", err)
		}
		return err
	})
	s.Sh("ip route del default")
	s.Must(func() error {
		if _, _, _, err := h.RouteTo(addr("203.0.113.1")); !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("route to nowhere: %v", err)
		}
		return nil
	})
}
