package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

func TestDialAnswersThatAreNoAgent(t *testing.T) {
	id, peer := testIdentity(t), testIdentity(t)
	for _, test := range []struct {
		name  string
		proto string
		serve func(*quic.Conn)
		want  error
	}{
		{"another protocol", "h3", func(*quic.Conn) {}, ErrVersion},
		{"an empty greeting", sessionProtocol, func(c *quic.Conn) {
			s, err := c.AcceptStream(context.Background())
			if err != nil {
				t.Error(err)
				return
			}
			s.Close()
		}, ErrFormat},
		{"a close", sessionProtocol, func(c *quic.Conn) { c.CloseWithError(0, "not today\n") }, ErrClosedByPeer},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, _ := listen(t, "127.0.0.1:0", id, only())
			server, err := quic.ListenAddr("127.0.0.1:0", &tls.Config{
				NextProtos:   []string{test.proto},
				Certificates: []tls.Certificate{peer.certificate},
			}, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			ctx := testContext(t)
			go func() {
				if conn, err := server.Accept(ctx); err == nil {
					test.serve(conn)
				}
			}()
			_, err = a.Dial(ctx, server.Addr().String(), peer.ID(), DialOptions{Transport: QUIC})
			if !errors.Is(err, test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %v, want %v", err, test.want)
			}
		})
	}
}

func TestDialWhereNothingAnswers(t *testing.T) {
	a, _ := listen(t, "127.0.0.1:0", testIdentity(t), only())
	peer := testID(t)
	closed, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	silent, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()

	_, err = a.Dial(testContext(t), closed.LocalAddr().String(), peer, DialOptions{})
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "nothing listens on UDP "+closed.LocalAddr().String()) {
		t.Errorf("closed port: %v", err)
	}

	ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
	defer cancel()
	_, err = a.Dial(ctx, silent.LocalAddr().String(), peer, DialOptions{})
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "firewalls") {
		t.Errorf("silent port: %v", err)
	}

	ctx, stop := context.WithCancel(testContext(t))
	stop()
	if _, err = a.Dial(ctx, silent.LocalAddr().String(), peer, DialOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}

	_, err = a.Dial(testContext(t), "[::1]:4000", peer, DialOptions{})
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "other IP version") {
		t.Errorf("other family: %v", err)
	}
}

func TestDialTriesAllAddresses(t *testing.T) {
	idA, idB, idC := testIdentity(t), testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only())
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	c, _ := listen(t, "127.0.0.1:0", idC, only())
	closed, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	nobody, wrong, right := addrPort(closed.LocalAddr()), addrPort(c.Addr()), addrPort(b.Addr())

	for _, transport := range bothTransports {
		_, err = a.connectTo(testContext(t), []netip.AddrPort{nobody, wrong}, idB.ID(), transport, hello{})
		if !errors.Is(err, ErrUnreachable) || !errors.Is(err, ErrUntrusted) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %v", err)
		}
		won, err := a.connectTo(testContext(t), []netip.AddrPort{nobody, wrong, right}, idB.ID(), transport, hello{})
		if err != nil {
			t.Fatal(err)
		}
		if got := mustAddrPort(t, won.conn.RemoteAddr().String()); got != right {
			t.Errorf("connected to %s, want %s", got, right)
		}
		won.conn.close(closeReason, "")
	}
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.UDPAddr).AddrPort() }

func TestDialArguments(t *testing.T) {
	a, _ := listen(t, "127.0.0.1:0", testIdentity(t), only())
	peer := testID(t)
	for _, test := range []struct {
		addr string
		peer ID
		want string
	}{
		{"127.0.0.1:4000", "typo", "not a wanmig ID"},
		{"127.0.0.1", peer, "expected HOST:PORT"},
		{":4000", peer, "no host"},
		{"127.0.0.1:0", peer, "not a number from 1"},
		{"127.0.0.1:65536", peer, "not a number from 1"},
		{"127.0.0.1:https", peer, "not a number from 1"},
		{"site-b.invalid:4000", peer, `find the address of "site-b.invalid"`},
	} {
		_, err := a.Dial(testContext(t), test.addr, test.peer, DialOptions{})
		if err == nil || !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), "dial "+test.addr) {
			t.Errorf("Dial(%q, %q): %v", test.addr, test.peer, err)
		}
	}
}

func TestDialTakesAnIDAsTyped(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only())
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	go b.Accept(testContext(t))
	typed := strings.ToLower(strings.ReplaceAll(string(idB.ID()), "-", " "))
	if _, err := a.Dial(testContext(t), b.Addr().String(), ID(typed), DialOptions{}); err != nil {
		t.Error(err)
	}
}

func portOf(e *Endpoint) string { return strconv.Itoa(e.Addr().(*net.UDPAddr).Port) }

func mustAddrPort(t *testing.T, s string) netip.AddrPort {
	t.Helper()
	addr, err := netip.ParseAddrPort(s)
	if err != nil {
		t.Fatal(err)
	}
	return addr
}
