package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

func TestListenerRefusesUnknownAgent(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, book := listen(t, "127.0.0.1:0", idB, only())
	_, err := a.Dial(testContext(t), b.Addr().String(), idB.ID(), DialOptions{})
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
	_, err := a.Dial(testContext(t), b.Addr().String(), idC.ID(), DialOptions{})
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
	return rawDialAs(t, addr, config, &quic.Config{EnableDatagrams: true})
}

func rawDialAs(t *testing.T, addr net.Addr, config *tls.Config, settings *quic.Config) (*quic.Conn, error) {
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
	return transport.Dial(testContext(t), addr, config, settings)
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
		{"no certificate", &tls.Config{NextProtos: []string{sessionProtocol}}, []string{"handshake ended", "certificate"}},
		{"another kind of key", &tls.Config{NextProtos: []string{sessionProtocol}, Certificates: []tls.Certificate{ecdsaCert}}, []string{"without an Ed25519 key"}},
		{"another protocol", &tls.Config{NextProtos: []string{"wanmig/9"}, Certificates: []tls.Certificate{trusted.certificate}}, []string{"another protocol version"}},
		{"a certificate without its key", &tls.Config{NextProtos: []string{sessionProtocol}, Certificates: []tls.Certificate{stolen}}, []string{"handshake ended", "invalid signature"}},
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

func TestNoSessionTickets(t *testing.T) {
	id := testIdentity(t)
	e, _ := listen(t, "127.0.0.1:0", testIdentity(t), only(id.ID()))
	cache := &ticketCounter{}
	for range 2 {
		conn, err := rawDial(t, e.Addr(), &tls.Config{
			NextProtos:         []string{sessionProtocol},
			Certificates:       []tls.Certificate{id.certificate},
			ClientSessionCache: cache,
		})
		if err != nil {
			t.Fatal(err)
		}
		// The answer comes when the handshake is confirmed, as tickets would.
		greetRaw(t, &quicConn{conn, junkStream(t, conn, nil)})
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

func (c *ticketCounter) Put(string, *tls.ClientSessionState) { c.put.Add(1) }

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
	for _, test := range []struct {
		handshakes int64
		retry      bool
		want       error
	}{
		{retryFrom - 1, false, nil},
		{retryFrom, true, nil}, // the dialer proves its address, and gets in
		{maxHandshakes - 1, true, nil},
		{maxHandshakes, true, ErrBusy},
	} {
		b.handshakes.Add(test.handshakes)
		if retry := b.transport.VerifySourceAddress(a.Addr()); retry != test.retry {
			t.Errorf("beside %d handshakes: addresses are verified: %v", test.handshakes, retry)
		}
		go b.Accept(testContext(t))
		s, err := a.Dial(testContext(t), b.Addr().String(), idB.ID(), DialOptions{Transport: QUIC})
		if !errors.Is(err, test.want) {
			t.Errorf("beside %d handshakes: %v", test.handshakes, err)
		}
		if err == nil {
			s.Close("its further carriers are dialers too")
		}
		for b.handshakes.Load() > test.handshakes {
			time.Sleep(time.Millisecond)
		}
		b.handshakes.Add(-test.handshakes)
	}
	book.await(t, "too many handshakes", fmt.Sprint("limit=", maxHandshakes))
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
