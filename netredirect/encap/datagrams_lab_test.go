//go:build lab

package encap

import (
	"context"
	"net"
	"testing"
	"time"
)

// udpDatagrams is a connection without the promises of QUIC.
type udpDatagrams struct {
	net.Conn
	limit int // bytes
}

func (d udpDatagrams) Send(b []byte) error {
	if len(b) > d.limit {
		return ErrTooBig
	}
	_, err := d.Write(b)
	return err
}

func (d udpDatagrams) Receive(ctx context.Context) ([]byte, error) {
	defer context.AfterFunc(ctx, func() { d.SetReadDeadline(time.Now()) })()
	b := make([]byte, 1<<16)
	n, err := d.Read(b)
	return b[:n], err
}

// datagramPair is a pair whose tunnel has no connection yet.
type datagramPair struct {
	*pair
	near, far *DatagramTunnel
}

func newDatagramPair(t *testing.T) *datagramPair {
	t.Helper()
	p := &datagramPair{pair: newPair(t)}
	open := func(s *space, c Config) (tunnel *DatagramTunnel) {
		t.Helper()
		c.MTU, c.Log = 1280, testLog(t)
		s.Must(func() (err error) {
			tunnel, err = OpenDatagrams(c)
			return err
		})
		t.Cleanup(func() { tunnel.Close() })
		return tunnel
	}
	p.near, p.far = open(p.source, p.pair.near(outer4Ends)), open(p.peer, p.pair.far(outer4Ends))
	p.route()
	p.routeBack()
	return p
}

// dial connects the two hosts at a port.
func (p *datagramPair) dial(port int) (near, far udpDatagrams) {
	t := p.source.t
	t.Helper()
	one := &net.UDPAddr{IP: outer4Ends.source.AsSlice(), Port: port}
	two := &net.UDPAddr{IP: outer4Ends.peer.AsSlice(), Port: port}
	dial := func(s *space, from, to *net.UDPAddr) (d udpDatagrams) {
		t.Helper()
		s.Must(func() error {
			c, err := net.DialUDP("udp", from, to)
			d = udpDatagrams{c, 1400}
			return err
		})
		t.Cleanup(func() { d.Close() })
		return d
	}
	return dial(p.source, one, two), dial(p.peer, two, one)
}

func TestDatagrams(t *testing.T) {
	p := newDatagramPair(t)
	p.peer.echo(":7")
	echo4, echo6 := net.JoinHostPort(vm4.String(), "7"), net.JoinHostPort(vm6.String(), "7")

	p.client.Try("ping -c 1 -W 0.1 " + vm4.String())
	await(t, p.near.Tunnel, "one unsent", func(s Stats) bool { return s.Drops.Unsent == 1 })

	near, far := p.dial(5001)
	p.near.Attach(near)
	p.far.Attach(far)
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())
	p.client.Sh("ping -c 1 -W 5 " + vm6.String())
	transfer(t, p.client, echo4, 1<<20)

	// Another connection, while packets are on their way.
	moved := make(chan bool)
	go func() {
		defer close(moved)
		transfer(t, p.client, echo6, 8<<20)
	}()
	await(t, p.near.Tunnel, "2 MiB sent", func(s Stats) bool { return s.Sent.Bytes > 2<<20 })
	near2, far2 := p.dial(5002)
	p.far.Attach(far2)
	p.near.Attach(near2)
	near.Close()
	far.Close()
	<-moved

	before := p.near.Stats().Drops
	if before.TooBig+before.Foreign+before.Malformed != 0 || p.far.Stats().Drops.Foreign != 0 {
		t.Errorf("dropped: %+v and %+v", before, p.far.Stats().Drops)
	}

	// A connection whose datagrams are shorter than the MTU.
	near3, far3 := p.dial(5003)
	near3.limit = 500
	p.far.Attach(far3)
	p.near.Attach(near3)
	p.client.Try("ping -c 1 -W 0.1 -s 600 " + vm4.String())
	await(t, p.near.Tunnel, "one too big", func(s Stats) bool { return s.Drops.TooBig == 1 })
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())

	// A connection that is lost, then none, then one again.
	near3.Close()
	p.client.Try("ping -c 1 -W 0.1 " + vm4.String())
	await(t, p.near.Tunnel, "another unsent", func(s Stats) bool { return s.Drops.Unsent > before.Unsent })
	p.near.Attach(nil)
	before = p.near.Stats().Drops
	p.client.Try("ping -c 1 -W 0.1 " + vm4.String())
	await(t, p.near.Tunnel, "yet another unsent", func(s Stats) bool { return s.Drops.Unsent > before.Unsent })
	near4, far4 := p.dial(5004)
	p.near.Attach(near4)
	p.far.Attach(far4)
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())

	for _, end := range []struct {
		*DatagramTunnel
		*space
	}{{p.near, p.source}, {p.far, p.peer}} {
		if err := end.DatagramTunnel.Close(); err != nil {
			t.Error(err)
		}
		if out, err := end.space.Try("ip link show wm0"); err == nil {
			t.Errorf("the device is left:\n%s", out)
		}
	}
	p.near.Attach(near4) // nobody is left to use it
	if p.near.link.current.Load() != nil {
		t.Error("a closed tunnel has a connection")
	}
}

func TestHostileDatagrams(t *testing.T) {
	p := newDatagramPair(t)
	near, far := p.dial(5001)
	p.near.Attach(near)
	good := packetOf(vm4, client4, udp, 0, udpOf(1, 2, "hello"))
	var want Drops
	send := func(counter *uint64, b []byte) {
		t.Helper()
		if _, err := far.Write(b); err != nil {
			t.Fatal(err)
		}
		*counter++
	}
	for n := range len(good) {
		send(&want.Malformed, good[:n])
	}
	send(&want.Malformed, make([]byte, 60000))
	send(&want.Nested, packetOf(vm4, client4, protocolIPv4, 0, good))
	send(&want.Foreign, packetOf(addr("10.2.0.3"), client4, udp, 0, udpOf(1, 2, "hello")))
	await(t, p.near.Tunnel, "all drops", func(s Stats) bool { return s.Drops == want })
	if s := p.near.Stats(); s.Received.Packets != 0 {
		t.Errorf("received %+v", s)
	}
	p.far.Attach(far)
	p.client.Sh("ping -c 1 -W 5 " + vm4.String())
}
