package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
)

// DialOptions are what a dialer may choose for its session.
type DialOptions struct {
	Transport Transport     // of all its connections
	MaxOutage time.Duration // how long it outlives the link; zero: DefaultOutage
}

// Dial opens a session with the agent peer at addr ("host:port"). It tries all
// addresses of the host, and UDP and TCP, and uses the first where that agent
// answers. The errors name the agents and the remedy; ErrUntrusted, ErrRefused,
// ErrUnreachable, ErrVersion and ErrBusy tell them apart.
func (e *Endpoint) Dial(ctx context.Context, addr string, peer ID, o DialOptions) (*Session, error) {
	s, err := e.open(ctx, addr, peer, o)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	return s, nil
}

func (e *Endpoint) open(ctx context.Context, addr string, peer ID, o DialOptions) (*Session, error) {
	peer, err := ParseID(string(peer))
	if err != nil {
		return nil, err
	}
	if o.MaxOutage == 0 {
		o.MaxOutage = DefaultOutage
	}
	first, t, err := e.connect(ctx, addr, peer, o.Transport, hello{outage: o.MaxOutage, transport: o.Transport})
	if err != nil {
		return nil, err
	}
	s, err := e.begin(sessionConfig{
		peer:      peer,
		token:     t,
		dialled:   true,
		outage:    o.MaxOutage,
		transport: o.Transport,
		redial: func(ctx context.Context, transport Transport, number uint32) (conn, error) {
			c, _, err := e.connect(ctx, addr, peer, transport, hello{token: t, carrier: number, outage: o.MaxOutage, transport: o.Transport})
			return c, err
		},
	}, first, 0)
	if err != nil {
		first.close(closeReason, "no session")
		return nil, err
	}
	return s, nil
}

// opener makes one address's connection and what is built on it.
type opener func(ctx context.Context, addr netip.AddrPort, peer ID) error

// dialHost runs open for the addresses of a host in turn, until one succeeds.
func (e *Endpoint) dialHost(ctx context.Context, addr string, peer ID, open opener) error {
	peer, err := ParseID(string(peer))
	if err != nil {
		return fmt.Errorf("dial %s: %w", addr, err)
	}
	addrs, err := e.resolve(ctx, addr)
	if err != nil {
		return fmt.Errorf("dial %s: %w", addr, err)
	}
	if err := e.dialFirst(ctx, addrs, peer, open); err != nil {
		return fmt.Errorf("dial %s: %w", addr, err)
	}
	return nil
}

// dialFirst succeeds with the first of addrs where peer answers.
func (e *Endpoint) dialFirst(ctx context.Context, addrs []netip.AddrPort, peer ID, open opener) error {
	var failed error
	for i, a := range addrs {
		err := e.dialOne(ctx, a, peer, len(addrs)-i, open)
		if err == nil {
			return nil
		}
		if failed == nil {
			failed = err
		} else {
			failed = fmt.Errorf("%w; %w", failed, err)
		}
		if ctx.Err() != nil || errors.Is(err, ErrRefused) { // refused by the right agent
			break
		}
	}
	return failed
}

// resolve returns the addresses of a host that this endpoint's socket can reach.
func (e *Endpoint) resolve(ctx context.Context, addr string) ([]netip.AddrPort, error) {
	host, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("%w: expected HOST:PORT", err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 {
		return nil, fmt.Errorf("port %q is not a number from 1 to 65535", portText)
	}
	if host == "" {
		return nil, errors.New("no host: expected HOST:PORT")
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("find the address of %q: %w", host, err)
	}
	var addrs []netip.AddrPort
	for _, ip := range ips {
		ip = ip.Unmap()
		if e.reaches(ip) {
			addrs = append(addrs, netip.AddrPortFrom(ip, uint16(port)))
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("%w: %s has only the addresses %v, and this agent listens on %s, of the other IP version",
			ErrUnreachable, host, ips, e.Addr())
	}
	return addrs, nil
}

// reaches says whether the socket can send to an address of ip's family: one
// bound to an address speaks that address's family, the wildcard [::] both.
func (e *Endpoint) reaches(ip netip.Addr) bool {
	local, ok := e.Addr().(*net.UDPAddr)
	if !ok {
		return true
	}
	if local.IP.To4() != nil {
		return ip.Is4()
	}
	return ip.Is6() || local.IP.IsUnspecified()
}

// dialOne dials one address; several that are left share the time that ctx has.
func (e *Endpoint) dialOne(ctx context.Context, addr netip.AddrPort, peer ID, left int, open opener) error {
	timeout := handshakeTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(deadline)/time.Duration(left))
	}
	began := time.Now()
	dialCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := e.handshake(dialCtx, addr, peer, open)
	if err != nil && ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", addr, context.Cause(ctx))
	}
	if err != nil {
		return e.explainDial(attempt{addr: addr, transport: QUIC}, peer, time.Since(began), err)
	}
	return nil
}

// handshake runs open, and ends it when the network says that nothing is there.
func (e *Endpoint) handshake(ctx context.Context, addr netip.AddrPort, peer ID, open opener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var probe sync.WaitGroup
	defer probe.Wait()
	defer cancel(nil)
	if socket, ok := e.socket.(*net.UDPConn); ok {
		probe.Go(func() {
			if err := awaitRefusal(ctx, socket.LocalAddr().(*net.UDPAddr), addr); err != nil {
				cancel(err)
			}
		})
	}
	err := open(ctx, addr, peer)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (e *Endpoint) dialConn(ctx context.Context, addr netip.AddrPort, peer ID, protocol string) (*quic.Conn, error) {
	tlsConfig := e.tlsConfig(func(id ID) bool { return id == peer }, protocol)
	return e.transport.Dial(ctx, net.UDPAddrFromAddrPort(addr), tlsConfig, e.quicConfig())
}

func awaitGreeting(ctx context.Context, conn *quic.Conn) (token, error) {
	stream, err := conn.AcceptUniStream(ctx)
	if err != nil {
		return token{}, err
	}
	return readGreeting(ctx, stream)
}

// greetingStream is a quic.Stream or quic.ReceiveStream.
type greetingStream interface {
	io.Reader
	SetReadDeadline(time.Time) error
}

// readGreeting reads a greeting up to the end of its stream.
func readGreeting(ctx context.Context, stream greetingStream) (t token, err error) {
	err = interruptible(ctx, stream.SetReadDeadline, func() error {
		if t, err = readToken(stream); err != nil {
			return err
		}
		return skipLater(stream)
	})
	return t, err
}

// awaitRefusal returns an error when the network says that addr cannot be
// reached, and nil when ctx ends before. Only a connected socket is told of
// ICMP errors, so it sends a datagram of its own: one zero byte, which no QUIC
// endpoint answers.
func awaitRefusal(ctx context.Context, local *net.UDPAddr, addr netip.AddrPort) error {
	dialer := net.Dialer{}
	if !local.IP.IsUnspecified() {
		dialer.LocalAddr = &net.UDPAddr{IP: local.IP, Zone: local.Zone}
	}
	conn, err := dialer.DialContext(ctx, "udp", addr.String())
	if err == nil {
		defer conn.Close()
		_, err = conn.Write([]byte{0})
	}
	if err == nil {
		err = interruptible(ctx, conn.SetReadDeadline, func() error {
			_, err := conn.Read(make([]byte, 1))
			return err
		})
	}
	for _, refusal := range []error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH} {
		if errors.Is(err, refusal) {
			return err
		}
	}
	return nil
}

// explainDial says why no session came about, and what an operator can do.
func (e *Endpoint) explainDial(a attempt, peer ID, took time.Duration, err error) error {
	var wrong *identityError
	var failed *quic.TransportError
	var closed *quic.ApplicationError
	var timeout net.Error
	switch {
	case errors.As(err, &wrong):
		presented := "no Ed25519 key"
		if wrong.presented != "" {
			presented = "the ID " + string(wrong.presented)
		}
		return fmt.Errorf("%w: the agent at %s presents %s, expected is %s: check the address; if the agent has a new identity, run wanmig site add NAME --id with its new ID",
			ErrUntrusted, a.addr, presented, peer)
	case gotAlert(err, alertBadCert):
		return fmt.Errorf("%w: the agent at %s does not know this agent's ID: run there wanmig site add NAME --id %s",
			ErrRefused, a.addr, e.id.ID())
	case errors.As(err, new(*quic.VersionNegotiationError)), errors.Is(err, errProtocol), errors.As(err, new(tls.RecordHeaderError)),
		gotAlert(err, alertNoApplication), sentAlert(err, alertNoApplication):
		return fmt.Errorf("%w: what answers at %s does not speak %s: install the same version of wanmig on both hosts",
			ErrVersion, a, sessionProtocol)
	case errors.As(err, &failed) && failed.Remote && failed.ErrorCode == quic.ConnectionRefused:
		return fmt.Errorf("%w: %s has too many dialers or is stopping: try again", ErrBusy, a.addr)
	case errors.As(err, &closed) && closed.Remote:
		return fmt.Errorf("%s: %w: %s", a.addr, ErrClosedByPeer, printable(closed.ErrorMessage))
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nothing listens on %s: start the agent there", ErrUnreachable, a)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fmt.Errorf("%w: no route to %s: %w", ErrUnreachable, a.addr, err)
	case errors.As(err, new(*quic.IdleTimeoutError)), errors.As(err, new(*quic.HandshakeTimeoutError)),
		errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: nothing from %s for %v: check that the agent runs there and that firewalls let %s port %d through",
			ErrUnreachable, a, took.Round(100*time.Millisecond), a.transport.network(), a.addr.Port())
	case errors.Is(err, quic.ErrTransportClosed), errors.Is(err, ErrClosed):
		return fmt.Errorf("%w: this agent is stopping", ErrClosed)
	}
	return fmt.Errorf("handshake with %s: %w", a, err)
}

// greeted is what an attempt makes: a connection to an agent that has welcomed
// it, but waits for the confirmation.
type greeted struct {
	conn  conn
	token token
}

// connect returns a connection to the agent peer at addr ("host:port"), with the
// token of the session that it is for: that of h, or a new one.
func (e *Endpoint) connect(ctx context.Context, addr string, peer ID, t Transport, h hello) (conn, token, error) {
	addrs, err := e.resolve(ctx, addr)
	if err != nil {
		return nil, token{}, err
	}
	won, err := e.connectTo(ctx, addrs, peer, t, h)
	if err != nil {
		return nil, token{}, err
	}
	return won.conn, won.token, nil
}

// connectTo has all addresses of a host and, for Auto, both transports race; the
// first that is greeted wins.
func (e *Endpoint) connectTo(ctx context.Context, addrs []netip.AddrPort, peer ID, t Transport, h hello) (greeted, error) {
	h.port = uint16(e.Addr().(*net.UDPAddr).Port)
	won, err := race(ctx, planAttempts(addrs, t),
		func(ctx context.Context, a attempt) (greeted, error) { return e.try(ctx, a, peer, h) },
		func(late greeted) { late.conn.close(closeReason, "another connection was faster") },
		isVerdict)
	if err != nil {
		return greeted{}, err
	}
	if _, err := won.conn.Write([]byte{confirmation}); err != nil {
		err = won.conn.explain(err)
		won.conn.close(closeReason, "not confirmed")
		return greeted{}, err
	}
	return won, nil
}

// verdict is a refusal by the right agent, which no other way to it changes.
type verdict struct{ error }

func (v verdict) Unwrap() error { return v.error }

func isVerdict(err error) bool {
	return errors.As(err, new(verdict)) || errors.Is(err, ErrRefused)
}

// try makes one attempt.
func (e *Endpoint) try(ctx context.Context, a attempt, peer ID, h hello) (greeted, error) {
	began := time.Now()
	attemptCtx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	g, err := e.tryConn(attemptCtx, a, peer, h)
	if err == nil {
		return g, nil
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return greeted{}, fmt.Errorf("%s: %w", a.addr, context.Cause(ctx))
	}
	if !isVerdict(err) {
		err = e.explainDial(a, peer, time.Since(began), err)
	}
	return greeted{}, err
}

func (e *Endpoint) tryConn(ctx context.Context, a attempt, peer ID, h hello) (greeted, error) {
	var c conn
	var err error
	if a.transport == TCP {
		c, err = opened(e.dialTCP(ctx, a.addr, peer, a.narrow))
	} else {
		c, err = opened(e.dialWatched(ctx, a.addr, peer, h.apart()))
	}
	if err != nil {
		return greeted{}, err
	}
	t, err := ask(ctx, c, h)
	if err != nil {
		c.close(closeReason, "not greeted")
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return greeted{}, err
	}
	return greeted{c, t}, nil
}

// dialWatched is dialQUIC, ended when the network says that nothing is there.
func (e *Endpoint) dialWatched(ctx context.Context, addr netip.AddrPort, peer ID, apart bool) (c *quicConn, err error) {
	err = e.handshake(ctx, addr, peer, func(ctx context.Context, addr netip.AddrPort, peer ID) error {
		c, err = e.dialQUIC(ctx, addr, peer, apart)
		return err
	})
	return c, err
}

// opened keeps a nil pointer from becoming a conn.
func opened[C conn](c C, err error) (conn, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// ask exchanges the greetings with a listener, but for the confirmation.
func ask(ctx context.Context, c conn, h hello) (token, error) {
	stop := context.AfterFunc(ctx, func() { c.close(closeReason, "gave up") })
	defer stop()
	// A listener that refuses this agent may be gone already, and its reason is
	// there to be read.
	_, writeErr := c.Write(h.append(nil))
	a, err := readAnswer(c)
	switch {
	case err != nil:
		return token{}, errors.Join(err, writeErr)
	case a.err() != nil:
		return token{}, verdict{fmt.Errorf("the agent at %s: %w", c.RemoteAddr(), a.err())}
	case h.token != token{} && a.token != h.token, a.token == token{}:
		return token{}, fmt.Errorf("%w: greeting of another session", ErrFormat)
	case !stop():
		return token{}, context.Cause(ctx)
	}
	return a.token, nil
}
