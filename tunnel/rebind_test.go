package tunnel

import (
	"io"
	"net"
	"sync"
	"testing"
)

// nat passes datagrams between a dialer and one address, from a port of its own
// that can change.
type nat struct {
	inside *net.UDPConn
	to     *net.UDPAddr

	mu      sync.Mutex
	outside *net.UDPConn
	dialer  net.Addr
	passing sync.WaitGroup
}

func newNAT(t *testing.T, to string) *nat {
	t.Helper()
	addr, err := net.ResolveUDPAddr("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	n := &nat{inside: loopbackUDP(t), to: addr}
	n.rebind(t)
	n.passing.Go(func() {
		b := make([]byte, 1<<16)
		for {
			size, from, err := n.inside.ReadFrom(b)
			if err != nil {
				return
			}
			n.mu.Lock()
			n.dialer = from
			n.outside.WriteTo(b[:size], n.to)
			n.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		n.inside.Close()
		n.outside.Close()
		n.passing.Wait()
	})
	return n
}

func loopbackUDP(t *testing.T) *net.UDPConn {
	t.Helper()
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	return socket
}

// rebind forgets the mapping: what comes for the old port is lost.
func (n *nat) rebind(t *testing.T) {
	t.Helper()
	fresh := loopbackUDP(t)
	n.mu.Lock()
	if n.outside != nil {
		n.outside.Close()
	}
	n.outside = fresh
	n.mu.Unlock()
	n.passing.Go(func() {
		b := make([]byte, 1<<16)
		for {
			size, _, err := fresh.ReadFrom(b)
			if err != nil {
				return
			}
			n.mu.Lock()
			n.inside.WriteTo(b[:size], n.dialer)
			n.mu.Unlock()
		}
	})
}

// QUIC knows a connection by its ID: it goes on when a NAT gives the dialer
// another port, once the dialer has sent something.
func TestQUICOutlivesANATRebinding(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	addr, newcomers := door(t, b)
	n := newNAT(t, addr)
	from, _, err := a.connect(testContext(t), n.inside.LocalAddr().String(), idB.ID(), QUIC, hello{})
	if err != nil {
		t.Fatal(err)
	}
	defer from.close(closeReason, "end of the test")
	to := (<-newcomers).conn
	defer to.close(closeReason, "end of the test")
	for range 3 {
		for _, way := range []struct{ from, to conn }{{from, to}, {to, from}} {
			sent := make(chan error, 1)
			go func() {
				_, err := way.from.Write(make([]byte, 1<<20))
				sent <- err
			}()
			if _, err := io.ReadFull(way.to, make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
		}
		n.mu.Lock()
		port := n.outside.LocalAddr().String()
		n.mu.Unlock()
		if got := to.RemoteAddr().String(); got != port {
			t.Errorf("the peer is at %s, want %s", got, port)
		}
		n.rebind(t)
	}
}
