package tunnel

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"
)

const (
	protocol     = "wanmig/1"      // ALPN of a session's first connection
	joinProtocol = "wanmig/1/join" // and of the others

	// maxHandshakes is how many dialers may be in their handshake, or wait for
	// Accept; above retryFrom of them a dialer first proves its address. Every
	// carrier is a dialer.
	maxHandshakes = 16 * Carriers
	retryFrom     = 2 * Carriers

	// Refusals are logged once a second, after a burst.
	refusalInterval = time.Second
	refusalBurst    = 20
)

// Endpoint is an agent's UDP socket, from which it dials other agents and at
// which it accepts their sessions.
type Endpoint struct {
	id        *Identity
	log       *slog.Logger
	socket    net.PacketConn
	transport *quic.Transport
	listener  *quic.Listener

	handshakes atomic.Int64
	refusals   *rate.Limiter
	unlogged   atomic.Int64
	arrivals   chan *quic.Conn // dialled sessions that wait for Accept
	offers     chan offer      // dialled connections for packets that wait for AcceptPackets
	deaf       chan struct{}   // closed when no dialer is heard any more
	accepting  sync.WaitGroup  // what fills arrivals and offers
	running    sync.WaitGroup  // everything else that the endpoint and its sessions run

	mu     sync.Mutex
	open   map[bundled]struct{}
	tokens map[token]bundled // what may be joined
	closed bool
}

// Listen opens the UDP address addr ("host:port"; without a host, all addresses
// of both families). trusted says whose sessions are accepted; it is called for
// each handshake, also concurrently. Refused peers are logged with their ID and
// address.
func Listen(addr string, id *Identity, trusted func(ID) bool, log *slog.Logger) (*Endpoint, error) {
	local, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	network := "udp"
	if local.IP.To4() != nil { // else 0.0.0.0 would listen on IPv6 too
		network = "udp4"
	}
	socket, err := net.ListenUDP(network, local)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	silenceBufferWarning()
	e, err := newEndpoint(socket, id, trusted, log)
	if err != nil {
		socket.Close()
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	reportBuffers(socket, wantedBuffer, log)
	return e, nil
}

func newEndpoint(socket net.PacketConn, id *Identity, trusted func(ID) bool, log *slog.Logger) (*Endpoint, error) {
	resetKey, err := id.resetKey()
	if err != nil {
		return nil, err
	}
	e := &Endpoint{
		id:       id,
		log:      log,
		socket:   socket,
		refusals: rate.NewLimiter(rate.Every(refusalInterval), refusalBurst),
		arrivals: make(chan *quic.Conn, maxHandshakes),
		offers:   make(chan offer),
		deaf:     make(chan struct{}),
		open:     make(map[bundled]struct{}),
		tokens:   make(map[token]bundled),
	}
	e.transport = &quic.Transport{
		Conn:                socket,
		StatelessResetKey:   (*quic.StatelessResetKey)(&resetKey),
		VerifySourceAddress: func(net.Addr) bool { return e.handshakes.Load() >= retryFrom },
		ConnContext:         e.admit,
	}
	tlsConfig := e.tlsConfig(trusted, protocol, joinProtocol, packetsProtocol)
	tlsConfig.ClientAuth = tls.RequireAnyClientCert
	e.listener, err = e.transport.Listen(tlsConfig, quicConfig())
	if err != nil {
		return nil, err
	}
	e.accepting.Go(e.acceptConns)
	return e, nil
}

// tlsConfig has both sides verify the key of the peer, and nothing else.
func (e *Endpoint) tlsConfig(accept func(ID) bool, protocols ...string) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{e.id.certificate},
		MinVersion:             tls.VersionTLS13,
		NextProtos:             protocols,
		SessionTicketsDisabled: true,
		InsecureSkipVerify:     true, // the key decides, in VerifyConnection
		VerifyConnection: func(state tls.ConnectionState) error {
			id, ok := peerID(state)
			if !ok || !accept(id) {
				return &identityError{presented: id}
			}
			return nil
		},
	}
}

func peerID(state tls.ConnectionState) (ID, bool) {
	if len(state.PeerCertificates) == 0 {
		return "", false
	}
	key, ok := state.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
	if !ok {
		return "", false
	}
	return idOf(key), true
}

type admissionKey struct{}

// admission is the place that a dialer takes from its first packet until Accept.
type admission struct{ leave func() bool }

func (e *Endpoint) admit(ctx context.Context, dialer *quic.ClientInfo) (context.Context, error) {
	if e.handshakes.Add(1) > maxHandshakes {
		e.handshakes.Add(-1)
		e.logRefusal("refused a dialer: too many handshakes", "addr", dialer.RemoteAddr, "limit", maxHandshakes)
		return nil, ErrBusy
	}
	e.running.Add(1)
	stop := context.AfterFunc(ctx, func() {
		defer e.running.Done()
		e.handshakes.Add(-1)
		e.logHandshake(dialer.RemoteAddr, context.Cause(ctx))
	})
	leave := func() bool {
		if !stop() {
			return false
		}
		e.handshakes.Add(-1)
		e.running.Done()
		return true
	}
	return context.WithValue(ctx, admissionKey{}, &admission{leave}), nil
}

// logHandshake logs why a handshake did not lead to a session. The ID of an
// agent that is not trusted is what its certificate claims: it is refused before
// TLS checks that it holds the key.
func (e *Endpoint) logHandshake(addr net.Addr, cause error) {
	var unknown *identityError
	var failed *quic.TransportError
	switch {
	case errors.As(cause, &unknown) && unknown.presented != "":
		e.logRefusal("refused an agent that is not trusted", "peer", unknown.presented, "addr", addr,
			"remedy", fmt.Sprintf("if it is one of yours: wanmig site add NAME --id %s", unknown.presented))
	case errors.As(cause, &unknown):
		e.logRefusal("refused a dialer without an Ed25519 key", "addr", addr)
	case errors.As(cause, &failed) && failed.Remote && failed.ErrorCode == alertBadCert:
		e.logRefusal("a dialer did not accept this agent's identity", "addr", addr, "id", e.id.ID())
	case errors.As(cause, &failed) && failed.ErrorCode == alertNoApplication:
		e.logRefusal("refused a dialer of another protocol version", "addr", addr, "protocol", protocol)
	default:
		e.log.Debug("handshake ended", "addr", addr, "cause", cause)
	}
}

// logRefusal keeps strangers from filling the log.
func (e *Endpoint) logRefusal(msg string, args ...any) {
	if !e.refusals.Allow() {
		e.unlogged.Add(1)
		return
	}
	if n := e.unlogged.Swap(0); n > 0 {
		args = append(args, "not_logged_before", n)
	}
	e.log.Warn(msg, args...)
}

// leave gives up a connection's place, and says whether the connection lives.
func leave(conn *quic.Conn) bool {
	a, ok := conn.Context().Value(admissionKey{}).(*admission)
	return ok && a.leave()
}

// acceptConns sorts the connections of dialers into new sessions, carriers of
// sessions and connections for packets, until the listener is closed.
func (e *Endpoint) acceptConns() {
	for {
		conn, err := e.listener.Accept(context.Background())
		if err != nil {
			close(e.arrivals)
			close(e.deaf)
			return
		}
		switch conn.ConnectionState().TLS.NegotiatedProtocol {
		case joinProtocol:
			e.accepting.Go(func() { e.join(conn) })
			continue
		case packetsProtocol:
			e.accepting.Go(func() { e.offerPackets(conn) })
			continue
		}
		select {
		case e.arrivals <- conn:
		default:
			e.logRefusal("refused a dialer: too many wait", "addr", conn.RemoteAddr(), "limit", maxHandshakes)
			leave(conn)
			conn.CloseWithError(closeReason, "too many dialers wait")
		}
	}
}

// Accept returns the next session that a trusted agent has dialled. The dialer's
// Dial succeeds when Accept has taken it up.
func (e *Endpoint) Accept(ctx context.Context) (*Session, error) {
	for {
		var conn *quic.Conn
		var open bool
		select {
		case conn, open = <-e.arrivals:
		case <-ctx.Done():
			return nil, fmt.Errorf("accept session: %w", context.Cause(ctx))
		}
		if !open {
			return nil, fmt.Errorf("accept session: %w", ErrClosed)
		}
		if !leave(conn) {
			continue // it ended while it waited, and was logged then
		}
		var t token
		rand.Read(t[:]) // never fails
		s, err := e.keep(conn, &t)
		if err == nil {
			err = greet(conn, t)
		}
		if err != nil {
			e.log.Debug("session ended before it was accepted", "addr", conn.RemoteAddr(), "cause", err)
			conn.CloseWithError(closeReason, "not accepted")
			continue
		}
		return s, nil
	}
}

func greet(conn *quic.Conn, t token) error {
	stream, err := conn.OpenUniStream()
	if err != nil {
		return fmt.Errorf("greet: %w", err)
	}
	if _, err := stream.Write(t.append(nil)); err != nil {
		return fmt.Errorf("greet: %w", err)
	}
	return stream.Close()
}

// keep makes a session of its first connection. With a token it can be joined.
func (e *Endpoint) keep(conn *quic.Conn, t *token) (*Session, error) {
	peer, ok := peerID(conn.ConnectionState().TLS)
	if !ok {
		return nil, &identityError{}
	}
	s := newSession(conn, peer, t == nil, &e.running)
	return s, e.hold(s, t)
}

// hold keeps a bundle until it ends, so that Close can close it.
func (e *Endpoint) hold(it bundled, t *token) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	e.open[it] = struct{}{}
	if t != nil {
		e.tokens[*t] = it
	}
	b := it.common()
	b.run(func() {
		<-b.Done()
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.open, it)
		if t != nil {
			delete(e.tokens, *t)
		}
	})
	b.watch(b.first, 1)
	return nil
}

// Addr returns the local address.
func (e *Endpoint) Addr() net.Addr { return e.socket.LocalAddr() }

// Close tells the peers of all sessions and connections for packets that the
// agent stops, and closes the socket. It returns when everything that the endpoint
// ran has ended.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	open := slices.Collect(maps.Keys(e.open))
	e.mu.Unlock()

	const reason = "the agent is stopping"
	err := e.listener.Close()
	for _, it := range open {
		it.common().Close(reason)
	}
	for conn := range e.arrivals { // dialers that nobody has accepted
		leave(conn)
		conn.CloseWithError(closeReason, reason)
	}
	err = errors.Join(err, e.transport.Close(), e.socket.Close())
	e.accepting.Wait()
	e.running.Wait()
	if err != nil {
		return fmt.Errorf("close endpoint: %w", err)
	}
	return nil
}
