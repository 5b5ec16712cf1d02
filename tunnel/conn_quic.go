package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/quic-go/quic-go"
)

// Windows of one connection. What a session holds is bounded by its channels'
// credit; these let one connection fill 400 Mbit/s at 120 ms.
const (
	windowStart = 512 << 10
	windowMost  = 6 << 20
)

func (e *Endpoint) quicConfig() *quic.Config {
	return &quic.Config{
		EnableDatagrams:                true, // a listener cannot tell what will be dialled
		HandshakeIdleTimeout:           handshakeSilence,
		MaxIdleTimeout:                 IdleTimeout,
		KeepAlivePeriod:                KeepAlive,
		InitialStreamReceiveWindow:     windowStart,
		MaxStreamReceiveWindow:         windowMost,
		InitialConnectionReceiveWindow: windowStart,
		MaxConnectionReceiveWindow:     windowMost,
		MaxIncomingStreams:             1,
		MaxIncomingUniStreams:          1,
		// The least that QUIC allows, so that a path with the smallest MTU of
		// IPv6 works too; discovery of the path's MTU raises it.
		InitialPacketSize: 1200,
		Tracer:            e.traceQUIC,
	}
}

// quicConn is a QUIC connection with the one stream that its dialer opens.
type quicConn struct {
	conn *quic.Conn
	*quic.Stream
}

// dialQUIC returns a connection to peer that is not greeted yet: from the port that
// all of the agent's share, or apart from them, from one of its own.
func (e *Endpoint) dialQUIC(ctx context.Context, addr netip.AddrPort, peer ID, apart bool) (*quicConn, error) {
	dial := e.dialConn
	if apart {
		dial = e.dialApart
	}
	conn, err := dial(ctx, addr, peer, sessionProtocol)
	if err != nil {
		return nil, err
	}
	stream, err := conn.OpenStream()
	if err != nil {
		conn.CloseWithError(closeReason, "no stream")
		return nil, err
	}
	return &quicConn{conn, stream}, nil
}

// dialApart is dialConn from a socket of the connection's own, with any port. Routers
// that spread flows over several links, and a NAT that has lost its way, take the
// connections of one port for one flow.
func (e *Endpoint) dialApart(ctx context.Context, addr netip.AddrPort, peer ID, protocol string) (*quic.Conn, error) {
	shared, ok := e.socket.(*net.UDPConn)
	if !ok {
		return e.dialConn(ctx, addr, peer, protocol)
	}
	local := shared.LocalAddr().(*net.UDPAddr)
	family := "udp"
	if local.IP.To4() != nil {
		family = "udp4"
	}
	socket, err := net.ListenUDP(family, &net.UDPAddr{IP: local.IP, Zone: local.Zone})
	if err != nil {
		return nil, fmt.Errorf("a port of its own: %w", err)
	}
	transport := &quic.Transport{Conn: socket}
	tlsConfig := e.tlsConfig(func(id ID) bool { return id == peer }, protocol)
	conn, err := transport.Dial(ctx, net.UDPAddrFromAddrPort(addr), tlsConfig, e.quicConfig())
	if err == nil {
		err = e.run(func() {
			<-conn.Context().Done()
			transport.Close()
			socket.Close()
		})
		if err != nil {
			conn.CloseWithError(closeReason, "the agent is stopping")
		}
	}
	if err != nil {
		transport.Close()
		socket.Close()
		return nil, err
	}
	return conn, nil
}

func (c *quicConn) transport() Transport { return QUIC }

func (c *quicConn) close(code closeCode, reason string) {
	c.conn.CloseWithError(code, printable(reason))
}

func (c *quicConn) LocalAddr() net.Addr { return localAddr(c.conn) }

func (c *quicConn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

func (c *quicConn) stats() connStats {
	st := c.conn.ConnectionStats()
	header := headerIP(c.conn.RemoteAddr()) + headerUDP
	return connStats{
		sent:        st.BytesSent + st.PacketsSent*header,
		received:    st.BytesReceived + st.PacketsReceived*header,
		packetsLost: st.PacketsLost,
		rtt:         st.SmoothedRTT,
		latestRTT:   st.LatestRTT,
		minRTT:      st.MinRTT,
	}
}

func (c *quicConn) explain(err error) error {
	return explainQUIC(err, c.RemoteAddr())
}

// explainQUIC turns what a connection to addr returns into this package's errors.
func explainQUIC(err error, addr net.Addr) error {
	var closed *quic.ApplicationError
	switch {
	case errors.As(err, &closed) && closed.Remote && closed.ErrorCode == closeLost:
		return fmt.Errorf("%w: the agent at %s reports: %s", ErrLost, addr, printable(closed.ErrorMessage))
	case errors.As(err, &closed) && closed.Remote:
		return fmt.Errorf("%w: %s", ErrClosedByPeer, printable(closed.ErrorMessage))
	case errors.As(err, &closed):
		return fmt.Errorf("%w here: %s", ErrClosed, closed.ErrorMessage)
	case errors.As(err, new(*quic.IdleTimeoutError)):
		return fmt.Errorf("%w: no answer from %s for %v: link down or agent gone", ErrLost, addr, IdleTimeout)
	case errors.As(err, new(*quic.StatelessResetError)):
		return fmt.Errorf("%w: the agent at %s was restarted", ErrLost, addr)
	case errors.Is(err, quic.ErrTransportClosed):
		return fmt.Errorf("%w here with its endpoint", ErrClosed)
	case err == nil, errors.Is(err, ErrFormat):
		return err
	}
	return fmt.Errorf("%w: connection to %s failed: %w", ErrLost, addr, err)
}
