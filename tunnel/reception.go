package tunnel

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// maxFromHost is how many dialers over TCP may be in their handshake from one
// address (of IPv6, one /64), so that a single stranger cannot lock others out.
const maxFromHost = maxHandshakes / 4

// acceptDelay is how long the listener rests when the kernel has no connection
// to give, for want of file descriptors say.
const acceptDelay = 100 * time.Millisecond

// acceptTCP greets dialers over TCP until the endpoint is closed.
func (e *Endpoint) acceptTCP(listener net.Listener) {
	defer listener.Close()
	defer context.AfterFunc(e.ctx, func() { listener.Close() })()
	for {
		accepted, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			e.logRefusal("no TCP connection can be accepted", "error", err)
			select {
			case <-time.After(acceptDelay):
			case <-e.ctx.Done():
			}
			continue
		}
		raw := accepted.(*net.TCPConn)
		host := hostOf(raw.RemoteAddr())
		if limit, ok := e.tcpCrowd.enter(host); !ok {
			e.logRefusal("refused a dialer: too many handshakes", "addr", raw.RemoteAddr(), "limit", limit)
			raw.SetLinger(0) // keeps nothing of it, not even its last state
			raw.Close()
			continue
		}
		e.accepting.Go(func() {
			defer e.tcpCrowd.leave(host)
			e.greetTCP(raw)
		})
	}
}

// greetTCP takes a dialer over TCP from its first byte to its session.
func (e *Endpoint) greetTCP(raw *net.TCPConn) {
	c, peer, err := e.acceptTLS(raw)
	if err != nil {
		e.logHandshake(raw.RemoteAddr(), err)
		linger(raw) // so that the alert arrives
		raw.Close()
		return
	}
	n, err := e.greet(e.ctx, c, peer)
	if err == nil {
		err = e.seat(n)
	}
	if err != nil {
		e.logGreeting(peer, c, err)
		c.close(closeLost, "")
	}
}

// acceptTLS takes a dialer over TCP through the handshake.
func (e *Endpoint) acceptTLS(raw *net.TCPConn) (*tcpConn, ID, error) {
	ctx, cancel := context.WithTimeout(e.ctx, handshakeTimeout)
	defer cancel()
	var offered []string
	config := e.tlsConfig(e.trusted, sessionProtocol)
	config.ClientAuth = tls.RequireAnyClientCert
	config.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		offered = h.SupportedProtos
		return nil, nil
	}
	secure := tls.Server(raw, config)
	err := secure.HandshakeContext(ctx)
	if err != nil && offered != nil && !slices.Contains(offered, sessionProtocol) {
		err = fmt.Errorf("%w: %w", errProtocol, err)
	}
	if err == nil && secure.ConnectionState().NegotiatedProtocol != sessionProtocol {
		err = errProtocol
	}
	if err != nil {
		return nil, "", err
	}
	peer, _ := peerID(secure.ConnectionState())
	c, err := e.newTCPConn(secure, raw)
	return c, peer, err
}

// greetQUIC takes a dialer over QUIC from its handshake to its session.
func (e *Endpoint) greetQUIC(conn *quic.Conn) {
	peer, _ := peerID(conn.ConnectionState().TLS)
	c := &quicConn{conn: conn}
	n, err := newcomer{}, error(nil)
	if c.Stream, err = acceptStream(conn); err == nil {
		n, err = e.greet(conn.Context(), c, peer)
	}
	if !leave(conn) && !isVerdict(err) {
		return // it ended, and was logged then
	}
	if err == nil {
		err = e.seat(n)
	}
	if err != nil {
		e.logGreeting(peer, c, err)
		c.close(closeLost, "not greeted: "+err.Error())
	}
}

func acceptStream(conn *quic.Conn) (*quic.Stream, error) {
	ctx, cancel := context.WithTimeout(conn.Context(), headerTimeout)
	defer cancel()
	return conn.AcceptStream(ctx)
}

// newcomer is a connection behind its greetings.
type newcomer struct {
	conn  conn
	peer  ID
	hello hello
	token token // of the session, a new one where hello has none
}

// greet exchanges the greetings with a dialer.
func (e *Endpoint) greet(ctx context.Context, c conn, peer ID) (newcomer, error) {
	ctx, cancel := context.WithTimeout(ctx, headerTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { c.close(closeLost, "the greeting takes too long") })()
	h, err := readHello(c)
	if err != nil {
		return newcomer{}, c.explain(err)
	}
	a := e.answer(h, peer)
	if _, err := c.Write(a.append(nil)); err != nil {
		return newcomer{}, c.explain(err)
	}
	if a.status != welcome {
		c.Read(make([]byte, 1)) // a close would overtake the answer: the dialer goes first
		return newcomer{}, verdict{a.err()}
	}
	if err := readConfirmation(c); err != nil {
		return newcomer{}, c.explain(err)
	}
	return newcomer{c, peer, h, a.token}, nil
}

// answer decides what a dialer gets. Nothing is kept for it before it confirms.
func (e *Endpoint) answer(h hello, peer ID) answer {
	a := answer{status: welcome, token: h.token}
	switch {
	case h.token != token{}:
		if s := e.session(h.token); s == nil || s.Peer() != peer {
			a.status = noSession
		} else if s.crowded() {
			a.status = crowded
		}
	case len(e.arrivals) == cap(e.arrivals):
		a.status = busy
	default:
		rand.Read(a.token[:]) // never fails
	}
	return a
}

// logGreeting logs why a peer that is trusted has got no session. One that gives
// up, as the loser of a dialer's race does, is nothing to warn of.
func (e *Endpoint) logGreeting(peer ID, c conn, err error) {
	for _, fault := range []error{ErrFormat, errNoSession, errTooMany, ErrBusy} {
		if errors.Is(err, fault) && !errors.Is(err, errIncomplete) {
			e.logRefusal("refused a carrier", "peer", peer, "addr", c.RemoteAddr(), "error", err)
			return
		}
	}
	e.log.Debug("a dialer gave up", "peer", peer, "addr", c.RemoteAddr(), "transport", c.transport(), "cause", err)
}

// crowd counts who is between the first packet and the session.
type crowd struct {
	most, fromHost int

	mu    sync.Mutex
	all   int
	hosts map[netip.Prefix]int
}

func newCrowd(most, fromHost int) *crowd {
	return &crowd{most: most, fromHost: fromHost, hosts: make(map[netip.Prefix]int)}
}

// enter says whether there is room for one more from host, or which limit it
// would break.
func (c *crowd) enter(host netip.Prefix) (limit int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= c.most {
		return c.most, false
	}
	if c.hosts[host] >= c.fromHost {
		return c.fromHost, false
	}
	c.all++
	c.hosts[host]++
	return 0, true
}

func (c *crowd) leave(host netip.Prefix) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.hosts[host]--; c.hosts[host] == 0 {
		delete(c.hosts, host)
	}
}

// hostOf returns what one stranger may be assumed to have: an address of IPv4, a
// /64 of IPv6.
func hostOf(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	prefix, _ := ip.Prefix(bits) // fails for addresses that are none
	return prefix
}

// seat gives a connection to its session, a new one where its dialer wants that.
func (e *Endpoint) seat(n newcomer) error {
	if n.hello.token != (token{}) {
		s := e.session(n.token)
		if s == nil {
			return errNoSession
		}
		if s.dialled == (n.hello.carrier%2 == 0) {
			return fmt.Errorf("%w: carrier %d of the side that does not dial it", ErrFormat, n.hello.carrier)
		}
		return s.carry(n.conn, n.hello.carrier)
	}
	s, err := e.begin(sessionConfig{
		peer:      n.peer,
		token:     n.token,
		outage:    min(n.hello.outage, maxOutage),
		transport: n.hello.transport,
		redial: func(ctx context.Context, t Transport, number uint32) (conn, error) {
			return e.dialBack(ctx, n, t, number)
		},
	}, n.conn, n.hello.carrier)
	if err != nil {
		return err
	}
	select {
	case e.arrivals <- s:
		return nil
	default:
		s.Close("too many sessions wait")
		return ErrBusy
	}
}

// maxOutage bounds what a dialer may ask of the listener.
const maxOutage = 24 * time.Hour

// dialBack makes a carrier to the side that has dialled the session, which may
// not reach this one any more: at the port where it says that it listens, and
// where its last carrier came from, which is the same agent behind a NAT.
func (e *Endpoint) dialBack(ctx context.Context, n newcomer, t Transport, number uint32) (conn, error) {
	s := e.session(n.token)
	if s == nil {
		return nil, errNoSession
	}
	last, err := netip.ParseAddrPort(s.RemoteAddr().String())
	if err != nil {
		return nil, fmt.Errorf("dial back: %w", err)
	}
	addrs := []netip.AddrPort{last}
	if n.hello.port != 0 && n.hello.port != last.Port() {
		addrs = append(addrs, netip.AddrPortFrom(last.Addr(), n.hello.port))
	}
	won, err := e.connectTo(ctx, addrs, n.peer, t, hello{token: n.token, carrier: number})
	if err != nil {
		return nil, fmt.Errorf("dial back: %w", err)
	}
	return won.conn, nil
}
