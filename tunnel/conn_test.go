package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"
)

var bothTransports = []Transport{QUIC, TCP}

// connPair returns the two ends of a greeted connection between two endpoints.
func connPair(t testing.TB, transport Transport) (from, to conn) {
	t.Helper()
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	return connConnect(t, a, b, transport)
}

// connConnect dials, at b, a door of its own behind which no session is made.
func connConnect(t testing.TB, a, b *Endpoint, transport Transport) (from, to conn) {
	t.Helper()
	addr, newcomers := door(t, b)
	from, told, err := a.connect(testContext(t), addr, b.id.ID(), transport, hello{carrier: 4, outage: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.close(closeReason, "end of the test") })
	n := <-newcomers
	if n.conn == nil {
		t.FailNow()
	}
	if n.peer != a.id.ID() || n.token != told || n.hello.carrier != 4 || n.hello.outage != time.Minute || int(n.hello.port) != a.Addr().(*net.UDPAddr).Port {
		t.Errorf("accepted %+v", n)
	}
	t.Cleanup(func() { n.conn.close(closeReason, "end of the test") })
	return from, n.conn
}

// door greets a dialer over each transport as the endpoint does.
func door(t testing.TB, e *Endpoint) (addr string, newcomers chan newcomer) {
	t.Helper()
	host := e.Addr().(*net.UDPAddr).IP
	socket, listener, err := listenBoth(net.JoinHostPort(host.String(), "0"), e.log)
	if err != nil {
		t.Fatal(err)
	}
	config := e.tlsConfig(e.trusted, sessionProtocol)
	config.ClientAuth = tls.RequireAnyClientCert
	transport := &quic.Transport{Conn: socket}
	quicListener, err := transport.Listen(config, e.quicConfig())
	if err != nil {
		t.Fatal(err)
	}
	newcomers = make(chan newcomer, 2)
	greet := func(c conn, peer ID, err error) {
		var n newcomer
		if err == nil {
			n, err = e.greet(context.Background(), c, peer)
		}
		if err != nil {
			t.Error(err)
		}
		newcomers <- n
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if raw, err := listener.Accept(); err == nil {
			c, peer, err := e.acceptTLS(raw.(*net.TCPConn))
			greet(c, peer, err)
		}
	})
	serving.Go(func() {
		if raw, err := quicListener.Accept(context.Background()); err == nil {
			peer, _ := peerID(raw.ConnectionState().TLS)
			stream, err := acceptStream(raw)
			greet(&quicConn{raw, stream}, peer, err)
		}
	})
	t.Cleanup(func() {
		listener.Close()
		quicListener.Close()
		transport.Close()
		socket.Close()
		serving.Wait()
	})
	return listener.Addr().String(), newcomers
}

func TestTransportNames(t *testing.T) {
	for _, want := range []Transport{Auto, QUIC, TCP} {
		if got, err := ParseTransport(want.String()); err != nil || got != want {
			t.Errorf("%s: %v, %v", want, got, err)
		}
	}
	for _, s := range []string{"", "udp", "QUIC", "transport 3"} {
		if got, err := ParseTransport(s); err == nil {
			t.Errorf("%q is %v", s, got)
		}
	}
	if s := Transport(3).String(); s != "transport 3" {
		t.Error(s)
	}
}

func TestConnCarriesBothWays(t *testing.T) {
	for _, transport := range bothTransports {
		t.Run(transport.String(), func(t *testing.T) {
			from, to := connPair(t, transport)
			want := pattern(3, 3<<20)
			for _, way := range []struct{ from, to conn }{{from, to}, {to, from}} {
				if way.from.transport() != transport {
					t.Errorf("it runs over %v", way.from.transport())
				}
				sent := make(chan error, 1)
				go func() {
					_, err := way.from.Write(want)
					sent <- err
				}()
				got := make([]byte, len(want))
				if _, err := io.ReadFull(way.to, got); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("received %v", err)
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				out, in := way.from.stats(), way.to.stats()
				most := uint64(len(want))*2 - 1 // QUIC sends some again where the other side had no CPU time
				if out.sent < uint64(len(want)) || out.sent > most || in.received < uint64(len(want)) || in.received > most {
					t.Errorf("%d bytes count as %d sent and %d received", len(want), out.sent, in.received)
				}
				if out.rtt <= 0 || out.minRTT <= 0 || out.latestRTT <= 0 {
					t.Errorf("times %+v", out)
				}
			}
			if to.RemoteAddr().String() != from.LocalAddr().String() || from.RemoteAddr().String() != to.LocalAddr().String() {
				t.Errorf("addresses %v and %v, %v and %v", from.LocalAddr(), to.RemoteAddr(), to.LocalAddr(), from.RemoteAddr())
			}
		})
	}
}

func TestConnCloseEndsReadAndWrite(t *testing.T) {
	for _, transport := range bothTransports {
		t.Run(transport.String(), func(t *testing.T) {
			from, to := connPair(t, transport)
			read, wrote := make(chan error, 1), make(chan error, 1)
			go func() {
				_, err := from.Read(make([]byte, 1))
				read <- err
			}()
			go func() {
				var err error
				for err == nil { // until all buffers are full, and then some
					_, err = from.Write(make([]byte, 1<<20))
				}
				wrote <- err
			}()
			for before := uint64(0); before == 0 || from.stats().sent != before; time.Sleep(50 * time.Millisecond) {
				before = from.stats().sent
			}
			before := from.stats().sent
			from.close(closeLost, "line\ncut")
			for _, err := range []error{<-read, <-wrote} {
				if err = from.explain(err); !errors.Is(err, ErrClosed) {
					t.Errorf("here %v", err)
				}
			}
			from.close(closeReason, "twice")
			_, err := io.Copy(io.Discard, to)
			if err = to.explain(err); transport == QUIC && (!errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "reports: line?cut")) {
				t.Errorf("there %v", err)
			}
			if _, err := from.Write([]byte{1}); err == nil {
				t.Error("it takes bytes still")
			}
			if after := from.stats().sent; after < before {
				t.Errorf("%d bytes were sent, and %d after the end", before, after)
			}
		})
	}
}

func TestConnThatThePeerCloses(t *testing.T) {
	for _, transport := range bothTransports {
		from, to := connPair(t, transport)
		to.close(closeReason, "no more")
		_, err := from.Read(make([]byte, 1))
		err = from.explain(err)
		if transport == QUIC && (!errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "no more")) {
			t.Errorf("over QUIC: %v", err)
		}
		if transport == TCP && (!errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "has ended the connection")) {
			t.Errorf("over TCP: %v", err)
		}
	}
}

// What TCP has taken still arrives, although unread bytes make the kernel reset
// a connection that is closed.
func TestLastBytesBeforeATCPClose(t *testing.T) {
	from, to := connPair(t, TCP)
	go from.Write(make([]byte, 16<<20)) // nobody reads this
	if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	farewell := pattern(5, 300<<10)
	go func() {
		to.Write(farewell)
		to.close(closeReason, "")
	}()
	got, err := io.ReadAll(from)
	if err != nil || !bytes.Equal(got, farewell) {
		t.Errorf("%d of %d bytes, %v", len(got), len(farewell), err)
	}
}

func info(t *testing.T, c conn) *unix.TCPInfo {
	t.Helper()
	info, err := tcpInfo(c.(*tcpConn).raw)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestTCPWriteWaits(t *testing.T) {
	from, _ := connPair(t, TCP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 1000 {
			if _, err := from.Write(make([]byte, 16<<10)); err != nil {
				return
			}
		}
		t.Error("the kernel has taken everything")
	}()
	var last uint64
	for i := 0; i < 5; time.Sleep(20 * time.Millisecond) {
		if now := info(t, from).Bytes_sent; now != last || now == 0 {
			last, i = now, 0
		} else {
			i++
		}
	}
	if n := info(t, from).Notsent_bytes; n > 2*unsentLimit {
		t.Errorf("%d bytes wait in the kernel, about %d are wanted", n, unsentLimit)
	} else {
		t.Logf("%d bytes wait in the kernel", n)
	}
	from.close(closeReason, "")
	<-done
}

func congestionOf(t *testing.T, c conn) string {
	t.Helper()
	raw, err := c.(*tcpConn).raw.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var name string
	raw.Control(func(fd uintptr) { name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION) })
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimRight(name, "\x00")
}

func TestTCPSocketOptions(t *testing.T) {
	from, to := connPair(t, TCP)
	// What the kernel does with a socket of its own tells what it has.
	probe, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(probe)
	has := unix.SetsockoptString(probe, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr") == nil
	for _, c := range []conn{from, to} {
		if got := congestionOf(t, c); (got == "bbr") != has {
			t.Errorf("congestion control %s; the kernel has BBR: %v", got, has)
		}
		raw, err := c.(*tcpConn).raw.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		for option, want := range map[int]int{unix.TCP_NOTSENT_LOWAT: 65536, unix.TCP_USER_TIMEOUT: 30000, unix.TCP_NODELAY: 1, unix.TCP_KEEPIDLE: 5, unix.TCP_KEEPINTVL: 5, unix.TCP_KEEPCNT: 6} {
			var got int
			raw.Control(func(fd uintptr) { got, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option) })
			if err != nil || got != want {
				t.Errorf("option %d is %d, %v, want %d", option, got, err, want)
			}
		}
	}
}

func TestNarrowTCP(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, ":0", idA, only(idB.ID()))
	b, _ := listen(t, ":0", idB, only(idA.ID()))
	for _, host := range []string{"127.0.0.1", "::1"} {
		addr, newcomers := door(t, b)
		addr = net.JoinHostPort(host, strconv.Itoa(int(mustAddrPort(t, addr).Port())))
		from, err := a.dialTCP(testContext(t), mustAddrPort(t, addr), idB.ID(), true)
		if err != nil {
			t.Fatal(err)
		}
		defer from.close(closeReason, "")
		greetRaw(t, from)
		to := (<-newcomers).conn
		defer to.close(closeReason, "")
		for _, c := range []conn{from, to} {
			if mss := info(t, c).Snd_mss; mss > narrowSegment {
				t.Errorf("%s: segments of %d bytes", host, mss)
			}
		}
	}
}

func TestConnExplains(t *testing.T) {
	for _, transport := range bothTransports {
		from, _ := connPair(t, transport)
		if err := from.explain(nil); err != nil {
			t.Errorf("nothing: %v", err)
		}
		for err, want := range map[error]error{
			unix.ETIMEDOUT:  ErrLost,
			unix.ECONNRESET: ErrLost,
			io.EOF:          ErrLost,
			errIncomplete:   ErrFormat,
		} {
			if got := from.explain(err); !errors.Is(got, want) {
				t.Errorf("%v of %v: %v", err, transport, got)
			}
		}
	}
}

func TestEndpointCloseEndsConns(t *testing.T) {
	for _, transport := range bothTransports {
		idA, idB := testIdentity(t), testIdentity(t)
		a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
		b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
		from, to := connConnect(t, a, b, transport)
		ended := make(chan error, 1)
		go func() {
			_, err := to.Read(make([]byte, 1))
			ended <- to.explain(err)
		}()
		from.close(closeReason, "")
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err == nil {
			t.Errorf("%v: the peer's end goes on", transport)
		}
		if _, _, err := a.connect(context.Background(), b.Addr().String(), idB.ID(), transport, hello{}); !errors.Is(err, ErrClosed) {
			t.Errorf("%v: a closed endpoint dials: %v", transport, err)
		}
	}
}
