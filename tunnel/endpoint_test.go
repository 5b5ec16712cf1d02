package tunnel

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// logBook collects a logger's lines.
type logBook struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *logBook) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// await waits for a line that contains all the words.
func (b *logBook) await(t *testing.T, words ...string) {
	t.Helper()
	for range 1000 {
	lines:
		for line := range strings.Lines(b.String()) {
			for _, word := range words {
				if !strings.Contains(line, word) {
					continue lines
				}
			}
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no log line with %q in:\n%s", words, b)
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func only(ids ...ID) func(ID) bool {
	return func(id ID) bool {
		for _, known := range ids {
			if id == known {
				return true
			}
		}
		return false
	}
}

func listen(t testing.TB, addr string, id *Identity, trusted func(ID) bool) (*Endpoint, *logBook) {
	t.Helper()
	book := &logBook{}
	e, err := Listen(addr, id, trusted, book.logger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e, book
}

// connect opens a session from a to b.
func connect(t testing.TB, a, b *Endpoint) (from, to *Session) {
	t.Helper()
	ctx := testContext(t)
	accepted := make(chan *Session, 1)
	go func() {
		defer close(accepted)
		s, err := b.Accept(ctx)
		if err != nil {
			t.Error(err)
			return
		}
		accepted <- s
	}()
	from, err := a.Dial(ctx, b.Addr().String(), b.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	to = <-accepted
	if to == nil {
		t.FailNow()
	}
	return from, to
}

// pair returns the two ends of a session between two agents on loopback.
func pair(t testing.TB) (from, to *Session) {
	t.Helper()
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	return connect(t, a, b)
}

func TestSessionsOverBothFamilies(t *testing.T) {
	for _, test := range []struct{ dialer, listener, host string }{
		{"127.0.0.1:0", "127.0.0.1:0", "127.0.0.1"},
		{"[::1]:0", "[::1]:0", "::1"},
		{":0", ":0", "127.0.0.1"},
		{":0", ":0", "::1"},
		{":0", "127.0.0.1:0", "localhost"},
		{":0", "[::1]:0", "::1"},
		{"0.0.0.0:0", ":0", "127.0.0.1"},
	} {
		t.Run(test.dialer+" to "+test.listener+" as "+test.host, func(t *testing.T) {
			idA, idB := testIdentity(t), testIdentity(t)
			a, _ := listen(t, test.dialer, idA, only(idB.ID()))
			b, _ := listen(t, test.listener, idB, only(idA.ID()))
			ctx := testContext(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				s, err := b.Accept(ctx)
				if err != nil {
					t.Error(err)
					return
				}
				if s.Peer() != idA.ID() {
					t.Errorf("accepted %s, want %s", s.Peer(), idA.ID())
				}
			}()
			addr := net.JoinHostPort(test.host, fmt.Sprint(b.Addr().(*net.UDPAddr).Port))
			s, err := a.Dial(ctx, addr, idB.ID())
			if err != nil {
				t.Fatal(err)
			}
			if s.Peer() != idB.ID() {
				t.Errorf("dialled %s, want %s", s.Peer(), idB.ID())
			}
			<-done
		})
	}
}

func TestOneEndpointDialsAndAccepts(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	connect(t, a, b)
	connect(t, b, a)
}

func TestListenerRefusesUnknownAgent(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, book := listen(t, "127.0.0.1:0", idB, only())
	_, err := a.Dial(testContext(t), b.Addr().String(), idB.ID())
	if !errors.Is(err, ErrRefused) {
		t.Fatalf("error %v", err)
	}
	for _, want := range []string{b.Addr().String(), "wanmig site add NAME --id " + string(idA.ID())} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
	book.await(t, "level=WARN", "not trusted", "peer="+string(idA.ID()), "addr="+a.Addr().String(), "wanmig site add")
}

func TestDialerRefusesWrongAgent(t *testing.T) {
	idA, idB, idC := testIdentity(t), testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only())
	b, book := listen(t, "127.0.0.1:0", idB, func(ID) bool {
		t.Error("the dialer showed its identity to the wrong agent")
		return false
	})
	_, err := a.Dial(testContext(t), b.Addr().String(), idC.ID())
	if !errors.Is(err, ErrUntrusted) {
		t.Fatalf("error %v", err)
	}
	for _, want := range []string{string(idB.ID()), string(idC.ID()), b.Addr().String(), "wanmig site add"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
	book.await(t, "level=WARN", "did not accept this agent's identity", "addr="+a.Addr().String())
}

// rawDial is a peer that has a key but its own idea of the protocol.
func rawDial(t *testing.T, addr net.Addr, config *tls.Config) (*quic.Conn, error) {
	t.Helper()
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	transport := &quic.Transport{Conn: socket}
	t.Cleanup(func() {
		transport.Close()
		socket.Close()
	})
	config.InsecureSkipVerify = true
	return transport.Dial(testContext(t), addr, config, quicConfig(1))
}

func TestListenerRefusesStrangers(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ecdsaCert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	trusted := testIdentity(t)
	stolen := tls.Certificate{Certificate: trusted.certificate.Certificate, PrivateKey: testIdentity(t).key}

	for _, test := range []struct {
		name   string
		config *tls.Config
		logged []string
	}{
		{"no certificate", &tls.Config{NextProtos: []string{protocol}}, []string{"handshake ended", "certificate"}},
		{"another kind of key", &tls.Config{NextProtos: []string{protocol}, Certificates: []tls.Certificate{ecdsaCert}}, []string{"without an Ed25519 key"}},
		{"another protocol", &tls.Config{NextProtos: []string{"wanmig/2"}, Certificates: []tls.Certificate{trusted.certificate}}, []string{"another protocol version"}},
		{"a certificate without its key", &tls.Config{NextProtos: []string{protocol}, Certificates: []tls.Certificate{stolen}}, []string{"handshake ended", "invalid signature"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			e, book := listen(t, "127.0.0.1:0", testIdentity(t), only(trusted.ID()))
			conn, err := rawDial(t, e.Addr(), test.config)
			if err == nil { // a TLS 1.3 client may finish first
				<-conn.Context().Done()
				err = context.Cause(conn.Context())
			}
			var failed *quic.TransportError
			if !errors.As(err, &failed) || !failed.ErrorCode.IsCryptoError() || failed.ErrorMessage != "" {
				t.Errorf("the stranger learns %v", err)
			}
			book.await(t, test.logged...)
			if n := e.handshakes.Load(); n != 0 {
				t.Errorf("%d handshakes are still counted", n)
			}
		})
	}
}

func TestDialAnswersThatAreNoAgent(t *testing.T) {
	id, peer := testIdentity(t), testIdentity(t)
	for _, test := range []struct {
		name  string
		proto string
		serve func(*quic.Conn)
		want  error
	}{
		{"another protocol", "h3", func(*quic.Conn) {}, ErrVersion},
		{"an empty greeting", protocol, func(c *quic.Conn) {
			s, err := c.OpenUniStream()
			if err != nil {
				t.Error(err)
				return
			}
			s.Close()
		}, ErrFormat},
		{"a close", protocol, func(c *quic.Conn) { c.CloseWithError(0, "not today\n") }, ErrClosedByPeer},
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
			_, err = a.Dial(ctx, server.Addr().String(), peer.ID())
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

	_, err = a.Dial(testContext(t), closed.LocalAddr().String(), peer)
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "nothing listens on UDP "+closed.LocalAddr().String()) {
		t.Errorf("closed port: %v", err)
	}

	ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
	defer cancel()
	_, err = a.Dial(ctx, silent.LocalAddr().String(), peer)
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "firewalls") {
		t.Errorf("silent port: %v", err)
	}

	ctx, stop := context.WithCancel(testContext(t))
	stop()
	if _, err = a.Dial(ctx, silent.LocalAddr().String(), peer); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}

	_, err = a.Dial(testContext(t), "[::1]:4000", peer)
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

	_, err = a.dialFirst(testContext(t), []netip.AddrPort{nobody, wrong}, idB.ID())
	if !errors.Is(err, ErrUnreachable) || !errors.Is(err, ErrUntrusted) || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %v", err)
	}
	go b.Accept(testContext(t))
	s, err := a.dialFirst(testContext(t), []netip.AddrPort{nobody, wrong, right}, idB.ID())
	if err != nil {
		t.Fatal(err)
	}
	if got := addrPort(s.RemoteAddr()); got != right {
		t.Errorf("connected to %s, want %s", got, right)
	}
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.UDPAddr).AddrPort() }

func TestNoSessionTickets(t *testing.T) {
	id := testIdentity(t)
	e, _ := listen(t, "127.0.0.1:0", testIdentity(t), only(id.ID()))
	cache := &ticketCounter{}
	for range 2 {
		conn, err := rawDial(t, e.Addr(), &tls.Config{
			NextProtos:         []string{protocol},
			Certificates:       []tls.Certificate{id.certificate},
			ClientSessionCache: cache,
		})
		if err != nil {
			t.Fatal(err)
		}
		s, err := e.Accept(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		exchangeRaw(t, conn, s)
		if conn.ConnectionState().TLS.DidResume {
			t.Error("a session was resumed without its handshake")
		}
	}
	if n := cache.put.Load(); n != 0 {
		t.Errorf("%d session tickets were given out", n)
	}
}

// ticketCounter is a client's session cache that wants any ticket it can get.
type ticketCounter struct{ put atomic.Int64 }

func (c *ticketCounter) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (c *ticketCounter) Put(string, *tls.ClientSessionState)        { c.put.Add(1) }

// exchangeRaw waits until the handshake is confirmed, when tickets would come.
func exchangeRaw(t *testing.T, conn *quic.Conn, s *Session) {
	t.Helper()
	stream := junkStream(t, conn, channelHeader{"c", Control}.append(nil))
	c, err := s.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Send(testContext(t), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stream, make([]byte, frameHead)); err != nil {
		t.Fatal(err)
	}
}

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
		_, err := a.Dial(testContext(t), test.addr, test.peer)
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
	if _, err := a.Dial(testContext(t), b.Addr().String(), ID(typed)); err != nil {
		t.Error(err)
	}
}

func TestListenErrors(t *testing.T) {
	id := testIdentity(t)
	a, book := listen(t, "127.0.0.1:0", id, only())
	for _, addr := range []string{a.Addr().String(), "127.0.0.1", "127.0.0.1:99999", "192.0.2.1:4000"} {
		if e, err := Listen(addr, id, only(), book.logger()); err == nil || !strings.HasPrefix(err.Error(), "listen on "+addr) {
			t.Errorf("Listen(%q): %v, %v", addr, e, err)
		}
	}
}

func TestGarbageDatagrams(t *testing.T) {
	from, to := pair(t)
	socket, err := net.Dial("udp4", from.RemoteAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for i := range 2000 {
		b := make([]byte, 1+i%1400)
		rand.Read(b)
		switch i % 4 {
		case 0:
			b[0] |= 0xc0 // a long header
		case 1:
			b[0] = 0x40 | b[0]&0x3f // a short one
		case 2:
			copy(b, []byte{0xc3, 0, 0, 0, 1, 8}) // an Initial of version 1
		}
		if _, err := socket.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	exchange(t, from, to)
}

func TestCrowdOfDialersIsBounded(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only())
	b, book := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	// Handshakes that hang: clients whose packets stop after the first.
	b.handshakes.Add(maxHandshakes)
	_, err := a.Dial(testContext(t), b.Addr().String(), idB.ID())
	if !errors.Is(err, ErrBusy) {
		t.Errorf("a dialer above the limit gets %v", err)
	}
	book.await(t, "too many handshakes", "limit=64")
	// From here on a dialer proves its address first, and gets in.
	b.handshakes.Add(retryFrom - maxHandshakes)
	connect(t, a, b)
	b.handshakes.Add(-retryFrom)
}

func TestRefusalsDoNotFloodTheLog(t *testing.T) {
	e, book := listen(t, "127.0.0.1:0", testIdentity(t), only())
	for range 1000 {
		e.logRefusal("refused", "addr", "192.0.2.1")
	}
	if n := strings.Count(book.String(), "msg=refused"); n < refusalBurst || n > refusalBurst+30 {
		t.Errorf("%d of 1000 refusals are logged", n)
	}
}

func TestSmallBuffersAreReported(t *testing.T) {
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	book := &logBook{}
	reportBuffers(socket, 1<<30, book.logger())
	book.await(t, "level=WARN", "sysctl -w net.core.rmem_max=", "wanted=1073741824")
	before := book.String()
	reportBuffers(socket, 1024, book.logger())
	if book.String() != before {
		t.Errorf("large buffers are reported: %s", book)
	}
}

func TestEndpointClose(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	from, to := connect(t, a, b)

	accepted := make(chan error, 1)
	go func() {
		_, err := b.Accept(context.Background())
		accepted <- err
	}()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := <-accepted; !errors.Is(err, ErrClosed) {
		t.Errorf("Accept returns %v", err)
	}
	<-from.Done()
	if err := from.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "the agent is stopping") {
		t.Errorf("the peer's session ends with %v", err)
	}
	if err := to.Err(); !errors.Is(err, ErrClosed) {
		t.Errorf("our session ends with %v", err)
	}
	if _, err := b.Dial(testContext(t), a.Addr().String(), idA.ID()); !errors.Is(err, ErrClosed) {
		t.Errorf("Dial returns %v", err)
	}
}

func TestEndpointCloseTurnsAwayWhoWaits(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	dialled := make(chan error, 1)
	go func() { // completes its handshake, but nobody accepts
		_, err := a.Dial(testContext(t), b.Addr().String(), idB.ID())
		dialled <- err
	}()
	for b.handshakes.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-dialled; !errors.Is(err, ErrClosedByPeer) && !errors.Is(err, ErrBusy) {
		t.Errorf("Dial returns %v", err)
	}
	if n := b.handshakes.Load(); n != 0 {
		t.Errorf("%d handshakes are still counted", n)
	}
}

func TestRestartedAgentEndsOldSessionsAtOnce(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	from, _ := connect(t, a, b)
	addr := b.Addr().String()
	b.socket.Close() // the agent is gone without a word
	b.Close()

	listen(t, addr, idB, only(idA.ID()))
	c, err := from.Open(testContext(t), "control", Control)
	if err != nil {
		t.Fatal(err)
	}
	for from.Err() == nil {
		c.Send(testContext(t), []byte("still there?"))
	}
	if err := from.Err(); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "was restarted") {
		t.Errorf("the session ends with %v", err)
	}
}
