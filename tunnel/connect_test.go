package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestConnectRaces(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	from, _ := connect(t, a, b)
	if l := from.Link(); len(l.Carriers) == 0 || l.Carriers[0].Transport != QUIC {
		t.Errorf("with both there: %+v", l)
	}
}

// doorway lets a port of its own stand for an endpoint's, over TCP alone.
func doorway(t *testing.T, e *Endpoint, silentUDP bool) string {
	t.Helper()
	socket, listener, err := listenBoth("127.0.0.1:0", (&logBook{}).logger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	if !silentUDP {
		socket.Close()
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			outside, err := listener.Accept()
			if err != nil {
				return
			}
			inside, err := net.Dial("tcp", e.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			for _, way := range [][2]net.Conn{{outside, inside}, {inside, outside}} {
				go func() {
					io.Copy(way[0], way[1])
					way[0].Close()
				}()
			}
		}
	}()
	return listener.Addr().String()
}

func TestConnectWithoutUDP(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	for _, silent := range []bool{true, false} {
		c, _, err := a.connect(testContext(t), doorway(t, b, silent), idB.ID(), Auto, hello{})
		if err != nil {
			t.Fatalf("UDP silent: %v: %v", silent, err)
		}
		if c.transport() != TCP {
			t.Errorf("UDP silent: %v: it runs over %v", silent, c.transport())
		}
		c.close(closeReason, "")
	}
}

// An Auto race leaves the listener one connection, whoever wins.
func TestLosersOfARaceLeaveNothing(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, book := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	at := mustAddrPort(t, b.Addr().String())
	for _, transport := range bothTransports {
		g, err := a.try(testContext(t), attempt{addr: at, transport: transport}, idB.ID(), hello{})
		if err != nil {
			t.Fatal(err)
		}
		g.conn.close(closeReason, "another connection was faster")
	}
	book.await(t, "level=DEBUG", "handshake ended", "another connection was faster")
	book.await(t, "level=DEBUG", "a dialer gave up", "transport=tcp", "peer="+string(idA.ID()))
	if n := len(b.arrivals) + len(b.sessions); n != 0 {
		t.Errorf("%d sessions", n)
	}
	if strings.Contains(book.String(), "level=WARN") {
		t.Errorf("warnings: %s", book)
	}
}

func TestConnectRefusals(t *testing.T) {
	for _, transport := range []Transport{QUIC, TCP, Auto} {
		t.Run(transport.String(), func(t *testing.T) {
			idA, idB, idC := testIdentity(t), testIdentity(t), testIdentity(t)
			a, _ := listen(t, "127.0.0.1:0", idA, only())
			b, book := listen(t, "127.0.0.1:0", idB, only())
			_, _, err := a.connect(testContext(t), b.Addr().String(), idB.ID(), transport, hello{})
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "wanmig site add NAME --id "+string(idA.ID())) {
				t.Errorf("not trusted: %v", err)
			}
			book.await(t, "level=WARN", "not trusted", "peer="+string(idA.ID()), "wanmig site add")

			_, _, err = a.connect(testContext(t), b.Addr().String(), idC.ID(), transport, hello{})
			if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), string(idB.ID())) || strings.Contains(err.Error(), "\n") {
				t.Errorf("another agent: %v", err)
			}
			book.await(t, "level=WARN", "did not accept this agent's identity", "id="+string(idB.ID()))
		})
	}
}

func TestConnectWhereNothingAnswers(t *testing.T) {
	a, _ := listen(t, "127.0.0.1:0", testIdentity(t), only())
	socket, listener, err := listenBoth("127.0.0.1:0", (&logBook{}).logger())
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	ctx, cancel := context.WithTimeout(testContext(t), 500*time.Millisecond)
	defer cancel()
	_, _, err = a.connect(ctx, addr, testID(t), Auto, hello{}) // the kernel takes the TCP connection
	for _, want := range []string{"firewalls let UDP port", "firewalls let TCP port"} {
		if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), want) {
			t.Errorf("silent port: %v", err)
		}
	}
	socket.Close()
	listener.Close()
	_, _, err = a.connect(testContext(t), addr, testID(t), Auto, hello{})
	for _, want := range []string{"nothing listens on UDP " + addr, "nothing listens on TCP " + addr} {
		if !errors.Is(err, ErrUnreachable) || strings.Count(err.Error(), want) != 1 {
			t.Errorf("closed port: %v", err)
		}
	}
	ctx, stop := context.WithCancel(testContext(t))
	stop()
	if _, _, err = a.connect(ctx, addr, testID(t), Auto, hello{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestTCPListenerRefusesStrangers(t *testing.T) {
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
	ours := []string{sessionProtocol}

	for _, test := range []struct {
		name   string
		config *tls.Config
		logged []string
	}{
		{"no certificate", &tls.Config{NextProtos: ours}, []string{"handshake ended", "certificate"}},
		{"another kind of key", &tls.Config{NextProtos: ours, Certificates: []tls.Certificate{ecdsaCert}}, []string{"without an Ed25519 key"}},
		{"another protocol", &tls.Config{NextProtos: []string{"h2"}, Certificates: []tls.Certificate{trusted.certificate}}, []string{"another protocol version"}},
		{"no protocol", &tls.Config{Certificates: []tls.Certificate{trusted.certificate}}, []string{"another protocol version"}},
		{"an old TLS", &tls.Config{NextProtos: ours, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{trusted.certificate}}, []string{"handshake ended", "version"}},
		{"a certificate without its key", &tls.Config{NextProtos: ours, Certificates: []tls.Certificate{stolen}}, []string{"handshake ended", "invalid signature"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			e, book := listen(t, "127.0.0.1:0", testIdentity(t), only(trusted.ID()))
			test.config.InsecureSkipVerify = true
			c, err := tls.Dial("tcp", e.Addr().String(), test.config)
			if err == nil { // a TLS 1.3 client may finish first
				defer c.Close()
				_, err = c.Read(make([]byte, 1))
			}
			if told := new(net.OpError); !errors.Is(err, io.EOF) && (!errors.As(err, &told) || told.Op != "remote error") {
				t.Errorf("the stranger learns %v", err)
			}
			book.await(t, test.logged...)
		})
	}
}

func TestGarbageOverTCP(t *testing.T) {
	e, book := listen(t, "127.0.0.1:0", testIdentity(t), only())
	for _, junk := range []string{"", "\x00", "GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff" + strings.Repeat("x", 1<<17), "\x16\x03\x01\x00\x05\x01\x00\xff\xff\xff"} {
		c, err := net.Dial("tcp", e.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			io.WriteString(c, junk)
			c.(*net.TCPConn).CloseWrite()
		}()
		io.Copy(io.Discard, c) // until the listener has had enough
		c.Close()
	}
	book.awaitCount(t, "handshake ended", 5)
	awaitNobody(t, e)
}

func awaitNobody(t *testing.T, e *Endpoint) {
	t.Helper()
	for range 1000 {
		e.tcpCrowd.mu.Lock()
		all, hosts := e.tcpCrowd.all, len(e.tcpCrowd.hosts)
		e.tcpCrowd.mu.Unlock()
		if all == 0 && hosts == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("dialers that are gone are counted still")
}

func TestCrowdOverTCPIsBounded(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, book := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	stranger := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	var silent []net.Conn
	for range maxFromHost {
		c, err := stranger.Dial("tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	for all := 0; all < maxFromHost; time.Sleep(time.Millisecond) {
		b.tcpCrowd.mu.Lock()
		all = b.tcpCrowd.all
		b.tcpCrowd.mu.Unlock()
	}
	c, err := stranger.Dial("tcp", b.Addr().String())
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil || errors.Is(err, io.EOF) {
		t.Errorf("one too many from a host: %v", err)
	}
	book.await(t, "too many handshakes", "addr=127.0.0.9:", "limit=64")
	connectOver(t, a, b, TCP) // from another host
	for _, c := range silent {
		c.Close()
	}
	awaitNobody(t, b)
}

func TestCrowdCounts(t *testing.T) {
	c := newCrowd(3, 2)
	one := hostOf(&net.TCPAddr{IP: net.ParseIP("2001:db8::1")})
	same := hostOf(&net.TCPAddr{IP: net.ParseIP("2001:db8::ffff"), Zone: "eth0"})
	two := hostOf(&net.TCPAddr{IP: net.ParseIP("::ffff:192.0.2.1")})
	three := hostOf(&net.TCPAddr{IP: net.ParseIP("192.0.2.2")})
	if one != same || two == three {
		t.Fatalf("hosts %v, %v, %v, %v", one, same, two, three)
	}
	steps := []struct {
		ok    bool
		limit int
	}{{true, 0}, {true, 0}, {false, 2}, {true, 0}, {false, 3}}
	for i, host := range []netip.Prefix{one, same, one, two, three} {
		limit, ok := c.enter(host)
		if ok != steps[i].ok || limit != steps[i].limit {
			t.Errorf("dialer %d: %v, limit %d", i, ok, limit)
		}
	}
}

func TestJoinsThatAreRefused(t *testing.T) {
	for _, transport := range bothTransports {
		t.Run(transport.String(), func(t *testing.T) {
			idA, idB, idC := testIdentity(t), testIdentity(t), testIdentity(t)
			a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
			c, _ := listen(t, "127.0.0.1:0", idC, only(idB.ID()))
			b, book := listen(t, "127.0.0.1:0", idB, only(idA.ID(), idC.ID()))
			from, to := connect(t, a, b)
			for _, test := range []struct {
				name   string
				dialer *Endpoint
				hello  hello
				want   string
				told   bool // by an answer
			}{
				{"wrong token", a, hello{token: token{9}, carrier: 8}, "no such session", true},
				{"another agent that is trusted", c, hello{token: from.token, carrier: 8}, "no such session", true},
				{"number of the first", a, hello{token: from.token}, "second carrier 0", false},
				{"number of the other side", a, hello{token: from.token, carrier: 3}, "carrier 3 of the side", false},
			} {
				joined, _, err := test.dialer.connect(testContext(t), b.Addr().String(), idB.ID(), transport, test.hello)
				if test.told && !errors.Is(err, errNoSession) {
					t.Errorf("%s: %v", test.name, err)
				}
				if !test.told {
					if err != nil {
						t.Fatal(err)
					}
					if _, err := joined.Read(make([]byte, 1)); err == nil || errors.Is(joined.explain(err), ErrClosedByPeer) {
						t.Errorf("%s: %v would end a session", test.name, joined.explain(err))
					}
					joined.close(closeLost, "")
				}
				book.await(t, "refused a carrier", "peer="+string(test.dialer.id.ID()), test.want)
			}
			exchange(t, from, to)
		})
	}
}

func TestListenerThatIsBusy(t *testing.T) {
	for _, transport := range bothTransports {
		idA, idB := testIdentity(t), testIdentity(t)
		a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
		b, book := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
		_, waiting := connect(t, a, b)
		for range cap(b.arrivals) {
			b.arrivals <- waiting
		}
		if _, err := a.Dial(testContext(t), b.Addr().String(), idB.ID(), DialOptions{Transport: transport}); !errors.Is(err, ErrBusy) {
			t.Errorf("over %v: %v", transport, err)
		}
		book.await(t, "refused a carrier", ErrBusy.Error())
	}
}

// pipeConn is a conn without a network.
type pipeConn struct{ net.Conn }

func (c pipeConn) close(closeCode, string) { c.Close() }
func (c pipeConn) explain(err error) error { return err }
func (c pipeConn) stats() connStats        { return connStats{} }
func (c pipeConn) transport() Transport    { return TCP }

func TestSlowGreetings(t *testing.T) {
	e, _ := listen(t, "127.0.0.1:0", testIdentity(t), only())
	for _, said := range [][]byte{nil, hello{}.append(nil)[:7], hello{}.append(nil)} {
		synctest.Test(t, func(t *testing.T) {
			here, there := net.Pipe()
			go func() {
				there.Write(said)
				io.Copy(io.Discard, there)
			}()
			began := time.Now()
			if n, err := e.greet(context.Background(), pipeConn{here}, testID(t)); err == nil {
				t.Errorf("greeted %+v", n)
			}
			if took := time.Since(began); took != headerTimeout {
				t.Errorf("%d bytes: waited %v", len(said), took)
			}
		})
	}
}

// The rule that tries small segments stands on this: a handshake has packets
// of full size in both directions, those of Ethernet.
func TestHandshakeFillsPackets(t *testing.T) {
	e, _ := listen(t, "127.0.0.1:0", testIdentity(t), func(ID) bool { return true })
	here, there := net.Pipe()
	config := e.tlsConfig(e.trusted, sessionProtocol)
	config.ClientAuth = tls.RequireAnyClientCert
	var client, server int
	listener := tls.Server(countedConn{there, &server}, config)
	done := make(chan error)
	go func() { done <- listener.Handshake() }()
	if err := tls.Client(countedConn{here, &client}, e.tlsConfig(e.trusted, sessionProtocol)).Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if full := 1500 - headerIPv4 - headerTCP - headerTimestamps; client < full || server < full {
		t.Errorf("the longest flights have %d and %d bytes", client, server)
	}
}

type countedConn struct {
	net.Conn
	longest *int
}

func (c countedConn) Write(b []byte) (int, error) {
	*c.longest = max(*c.longest, len(b))
	return c.Conn.Write(b)
}

// Every second carrier over QUIC has a port of its own, which closes with it.
func TestCarriersComeFromSeveralPorts(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	from, to := connectOver(t, a, b, QUIC)
	for range 4 {
		if err := from.addCarrier(QUIC); err != nil {
			t.Fatal(err)
		}
	}
	ports := map[string]int{}
	for len(to.Link().Carriers) < 5 {
		time.Sleep(10 * time.Millisecond)
	}
	for _, c := range to.Link().Carriers {
		ports[c.Remote]++
	}
	if len(ports) != 3 || ports[a.Addr().String()] != 3 {
		t.Errorf("the carriers come from %v, the agent listens at %s", ports, a.Addr())
	}
	from.Close("done")
	<-to.Done()
}
