package tunnel

import (
	"context"
	"crypto/ed25519"
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
	joinProtocol = "wanmig/1/join" // ALPN of connections that join others for packets

	// maxHandshakes is how many dialers may be in their handshake, or wait for
	// Accept; above retryFrom of them a dialer first proves its address. Every
	// carrier is a dialer.
	maxHandshakes = 16 * Carriers
	retryFrom     = 2 * Carriers

	// Refusals are logged once a second, after a burst.
	refusalInterval = time.Second
	refusalBurst    = 20
)

// Endpoint is an agent's UDP socket and TCP listener, which have the same port
// number: from it the agent dials others, and accepts their sessions.
type Endpoint struct {
	id        *Identity
	log       *slog.Logger
	socket    net.PacketConn
	transport *quic.Transport
	listener  *quic.Listener
	trusted   func(ID) bool
	qlog      *qlogFolder   // nil: none
	network   *networkWatch // of this host's addresses and routes

	ctx    context.Context // ends when the endpoint is closed
	cancel context.CancelFunc

	handshakes atomic.Int64
	tcpCrowd   *crowd
	refusals   *rate.Limiter
	unlogged   atomic.Int64
	arrivals   chan *Session  // dialled sessions that wait for Accept
	offers     chan offer     // dialled connections for packets that wait for AcceptPackets
	deaf       chan struct{}  // closed when no dialer is heard any more
	accepting  sync.WaitGroup // what fills arrivals and offers
	carrying   sync.WaitGroup // what sessions run
	running    sync.WaitGroup // everything else

	mu       sync.Mutex
	sessions map[token]*Session
	packets  map[*Packets]struct{}
	tokens   map[token]*Packets // what may be joined
	closed   bool
}

// Options are what an endpoint does on request.
type Options struct {
	// Qlog names a folder that gets a file for each QUIC connection, as
	// QlogSize and QlogFiles bound them. Empty: none. It costs about as much CPU
	// time as QUIC itself, and a file is full after less than 200 MiB of data.
	Qlog string
}

// Listen opens addr ("host:port"; without a host, all addresses of both families)
// for UDP and TCP. trusted says whose sessions are accepted; it is called for
// each handshake, also concurrently. Refused peers are logged with their ID and
// address.
func Listen(addr string, id *Identity, trusted func(ID) bool, log *slog.Logger) (*Endpoint, error) {
	return ListenWith(addr, id, trusted, log, Options{})
}

// ListenWith is Listen with options.
func ListenWith(addr string, id *Identity, trusted func(ID) bool, log *slog.Logger, o Options) (*Endpoint, error) {
	silenceBufferWarning()
	socket, tcp, err := listenBoth(addr, log)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	qlog, err := openQlogFolder(o.Qlog)
	var e *Endpoint
	if err == nil {
		e, err = newEndpoint(socket, id, trusted, qlog, log)
	}
	if err != nil {
		socket.Close()
		tcp.Close()
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	e.accepting.Go(func() { e.acceptTCP(tcp) })
	e.running.Go(func() { e.network.watch(e.ctx, log) })
	reportBuffers(socket, wantedBuffer, log)
	return e, nil
}

// newEndpoint makes an endpoint of the part that speaks QUIC.
func newEndpoint(socket net.PacketConn, id *Identity, trusted func(ID) bool, qlog *qlogFolder, log *slog.Logger) (*Endpoint, error) {
	resetKey, err := id.resetKey()
	if err != nil {
		return nil, err
	}
	e := &Endpoint{
		trusted:  trusted,
		qlog:     qlog,
		network:  &networkWatch{},
		sessions: make(map[token]*Session),
		tcpCrowd: newCrowd(maxHandshakes, maxFromHost),
		id:       id,
		log:      log,
		socket:   socket,
		refusals: rate.NewLimiter(rate.Every(refusalInterval), refusalBurst),
		arrivals: make(chan *Session, maxHandshakes),
		offers:   make(chan offer),
		deaf:     make(chan struct{}),
		packets:  make(map[*Packets]struct{}),
		tokens:   make(map[token]*Packets),
	}
	e.transport = &quic.Transport{
		Conn:                socket,
		StatelessResetKey:   (*quic.StatelessResetKey)(&resetKey),
		VerifySourceAddress: func(net.Addr) bool { return e.handshakes.Load() >= retryFrom },
		ConnContext:         e.admit,
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	tlsConfig := e.tlsConfig(trusted, sessionProtocol, packetsProtocol, joinProtocol)
	tlsConfig.ClientAuth = tls.RequireAnyClientCert
	e.listener, err = e.transport.Listen(tlsConfig, e.quicConfig())
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
	switch {
	case errors.As(cause, &unknown) && unknown.presented != "":
		e.logRefusal("refused an agent that is not trusted", "peer", unknown.presented, "addr", addr,
			"remedy", fmt.Sprintf("if it is one of yours: wanmig site add NAME --id %s", unknown.presented))
	case errors.As(cause, &unknown):
		e.logRefusal("refused a dialer without an Ed25519 key", "addr", addr)
	case gotAlert(cause, alertBadCert):
		e.logRefusal("a dialer did not accept this agent's identity", "addr", addr, "id", e.id.ID())
	case errors.Is(cause, errProtocol), sentAlert(cause, alertNoApplication), gotAlert(cause, alertNoApplication):
		e.logRefusal("refused a dialer of another protocol version", "addr", addr, "protocol", sessionProtocol)
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

// acceptConns sorts the connections of dialers into those of sessions and those
// for packets, until the listener is closed.
func (e *Endpoint) acceptConns() {
	for {
		conn, err := e.listener.Accept(context.Background())
		if err != nil {
			close(e.deaf)
			return
		}
		switch conn.ConnectionState().TLS.NegotiatedProtocol {
		case sessionProtocol:
			e.accepting.Go(func() { e.greetQUIC(conn) })
		case joinProtocol:
			e.accepting.Go(func() { e.join(conn) })
		case packetsProtocol:
			e.accepting.Go(func() { e.offerPackets(conn) })
		}
	}
}

// Accept returns the next session that a trusted agent has dialled.
func (e *Endpoint) Accept(ctx context.Context) (*Session, error) {
	for {
		select {
		case s := <-e.arrivals:
			if s.Err() == nil {
				return s, nil
			}
			e.log.Debug("session ended before it was accepted", "peer", s.Peer(), "cause", s.Err())
		case <-e.deaf:
			return nil, fmt.Errorf("accept session: %w", ErrClosed)
		case <-ctx.Done():
			return nil, fmt.Errorf("accept session: %w", context.Cause(ctx))
		}
	}
}

// begin makes a session, of a connection that is its carrier c.
func (e *Endpoint) begin(config sessionConfig, c conn, number uint32) (*Session, error) {
	config.network = e.network.listen
	config.running = &e.carrying
	config.log = e.log
	s, err := e.enter(config)
	if err != nil {
		return nil, err
	}
	if err := s.carry(c, number); err != nil {
		s.Close(err.Error())
		return nil, err
	}
	return s, nil
}

// enter makes a session, and keeps it until it ends, so that it can be resumed
// and Close can close it.
func (e *Endpoint) enter(config sessionConfig) (*Session, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, ErrClosed
	}
	if e.sessions[config.token] != nil {
		return nil, fmt.Errorf("%w: the token of another session", ErrFormat)
	}
	s := newSession(config)
	e.sessions[config.token] = s
	s.run(func() {
		<-s.Done()
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.sessions, config.token)
	})
	return s, nil
}

// session returns the session that has the token, or nil.
func (e *Endpoint) session(t token) *Session {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sessions[t]
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

// hold keeps Packets until they end, so that Close can close them. With a token
// they can be joined.
func (e *Endpoint) hold(it *Packets, t *token) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	e.packets[it] = struct{}{}
	if t != nil {
		e.tokens[*t] = it
	}
	it.run(func() {
		<-it.Done()
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.packets, it)
		if t != nil {
			delete(e.tokens, *t)
		}
	})
	it.watch(it.first, 1)
	return nil
}

// run runs f, for which Close waits.
func (e *Endpoint) run(f func()) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	e.running.Go(f)
	return nil
}

// Addr returns the local address, of UDP; TCP has the same port.
func (e *Endpoint) Addr() net.Addr { return e.socket.LocalAddr() }

// Close tells the peers of all sessions and connections for packets that the
// agent stops, and closes the sockets. It returns when everything that the endpoint
// ran has ended.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	packets := slices.Collect(maps.Keys(e.packets))
	sessions := slices.Collect(maps.Values(e.sessions))
	e.mu.Unlock()

	const reason = "the agent is stopping"
	err := e.listener.Close()
	for _, p := range packets {
		p.Close(reason)
	}
	for _, s := range sessions {
		s.Close(reason)
	}
	e.carrying.Wait() // until the peers are told
	e.cancel()
	err = errors.Join(err, e.transport.Close(), e.socket.Close())
	e.accepting.Wait()
	e.running.Wait()
	if err != nil {
		return fmt.Errorf("close endpoint: %w", err)
	}
	return nil
}
