package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
)

// Dial opens a session with the agent peer at addr ("host:port"). It tries the
// addresses of the host in turn, and succeeds with the first where that agent
// answers; the session's other carriers join while it is used already. The
// errors name the agents and the remedy; ErrUntrusted, ErrRefused,
// ErrUnreachable, ErrVersion and ErrBusy tell them apart.
func (e *Endpoint) Dial(ctx context.Context, addr string, peer ID) (*Session, error) {
	var s *Session
	err := e.dialHost(ctx, addr, peer, func(ctx context.Context, addr netip.AddrPort, peer ID) error {
		var err error
		s, err = e.openSession(ctx, addr, peer)
		return err
	})
	if err != nil {
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
		return e.explainDial(addr, peer, time.Since(began), err)
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

func (e *Endpoint) openSession(ctx context.Context, addr netip.AddrPort, peer ID) (*Session, error) {
	conn, err := e.dialConn(ctx, addr, peer, protocol)
	if err != nil {
		return nil, err
	}
	t, err := awaitGreeting(ctx, conn)
	var s *Session
	if err == nil {
		s, err = e.keep(conn, nil)
	}
	if err != nil {
		conn.CloseWithError(closeReason, "not greeted")
		return nil, err
	}
	s.run(func() { e.joinAll(s, addr, t) })
	return s, nil
}

func (e *Endpoint) dialConn(ctx context.Context, addr netip.AddrPort, peer ID, protocol string) (*quic.Conn, error) {
	tlsConfig := e.tlsConfig(func(id ID) bool { return id == peer }, protocol)
	return e.transport.Dial(ctx, net.UDPAddrFromAddrPort(addr), tlsConfig, quicConfig())
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
func (e *Endpoint) explainDial(addr netip.AddrPort, peer ID, took time.Duration, err error) error {
	var wrong *identityError
	var failed *quic.TransportError
	var versions *quic.VersionNegotiationError
	var closed *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	var slow *quic.HandshakeTimeoutError
	switch {
	case errors.As(err, &wrong):
		presented := "no Ed25519 key"
		if wrong.presented != "" {
			presented = "the ID " + string(wrong.presented)
		}
		return fmt.Errorf("%w: the agent at %s presents %s, expected is %s: check the address; if the agent has a new identity, run wanmig site add NAME --id with its new ID",
			ErrUntrusted, addr, presented, peer)
	case errors.As(err, &failed) && failed.Remote && failed.ErrorCode == alertBadCert:
		return fmt.Errorf("%w: the agent at %s does not know this agent's ID: run there wanmig site add NAME --id %s",
			ErrRefused, addr, e.id.ID())
	case errors.As(err, &versions), errors.As(err, &failed) && failed.ErrorCode == alertNoApplication:
		return fmt.Errorf("%w: what answers at %s does not speak %s: install the same version of wanmig on both hosts",
			ErrVersion, addr, protocol)
	case errors.As(err, &failed) && failed.Remote && failed.ErrorCode == quic.ConnectionRefused:
		return fmt.Errorf("%w: %s has too many dialers or is stopping: try again", ErrBusy, addr)
	case errors.As(err, &closed) && closed.Remote:
		return fmt.Errorf("%s: %w: %s", addr, ErrClosedByPeer, printable(closed.ErrorMessage))
	case errors.As(err, &idle), errors.As(err, &slow), errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: nothing from %s for %v: check that the agent runs there and that firewalls let UDP port %d through",
			ErrUnreachable, addr, took.Round(100*time.Millisecond), addr.Port())
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nothing listens on UDP %s: start the agent there", ErrUnreachable, addr)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fmt.Errorf("%w: no route to %s: %w", ErrUnreachable, addr, err)
	case errors.Is(err, quic.ErrTransportClosed), errors.Is(err, ErrClosed):
		return fmt.Errorf("%w: this agent is stopping", ErrClosed)
	}
	return fmt.Errorf("handshake with %s: %w", addr, err)
}
