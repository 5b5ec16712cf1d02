package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/quic-go/quic-go"
)

const (
	// KeepAlive is how often an idle session shows that it lives.
	KeepAlive = 5 * time.Second
	// IdleTimeout is how long a session outlives the last packet of its peer.
	IdleTimeout = 30 * time.Second
	// MaxChannels is how many channels each side of a session may have opened
	// and not finished; Open waits for one to end.
	MaxChannels = 64

	// handshakeSilence ends a handshake that gets no answer, and
	// handshakeTimeout one that is not completed.
	handshakeSilence = 5 * time.Second
	handshakeTimeout = 2 * handshakeSilence
	headerTimeout    = 10 * time.Second
)

// Flow-control windows. 1 Gbit/s over 100 ms is 12.5 MB in flight; a window is
// renewed when a quarter of it was read, so 16 MiB carry that. The connection
// starts at its full window, since a few stopped channels must not take the
// control channel's share.
const (
	streamWindowStart = 512 << 10
	streamWindow      = 16 << 20
	connectionWindow  = 128 << 20
)

func quicConfig(peerStreams int64) *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout:           handshakeSilence,
		MaxIdleTimeout:                 IdleTimeout,
		KeepAlivePeriod:                KeepAlive,
		InitialStreamReceiveWindow:     streamWindowStart,
		MaxStreamReceiveWindow:         streamWindow,
		InitialConnectionReceiveWindow: connectionWindow,
		MaxConnectionReceiveWindow:     connectionWindow,
		MaxIncomingStreams:             MaxChannels,
		MaxIncomingUniStreams:          peerStreams,
		// The least that QUIC allows, so that a path with the smallest MTU of
		// IPv6 works too; discovery of the path's MTU raises it.
		InitialPacketSize: 1200,
	}
}

// Session is a connection to one agent whose identity was verified. Its methods
// are safe for concurrent use.
type Session struct {
	conn *quic.Conn
	peer ID
}

// Peer returns the peer's verified ID.
func (s *Session) Peer() ID { return s.peer }

// RemoteAddr returns the peer's address.
func (s *Session) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

// Open makes a channel to the peer. The name has 1 to 64 of the characters a-z,
// 0-9, '.', '_', '-' and '/'. Open waits while MaxChannels are open.
func (s *Session) Open(ctx context.Context, name string, priority Priority) (*Channel, error) {
	header := channelHeader{name: name, priority: priority}
	if err := header.check(); err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	stream, err := s.conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, fmt.Errorf("open channel %s: %w", name, s.explain(err))
	}
	c := newChannel(s, stream, header)
	if _, err := stream.Write(header.append(nil)); err != nil {
		return nil, fmt.Errorf("open channel %s: %w", name, s.explain(err))
	}
	return c, nil
}

// Accept returns the next channel that the peer has opened. A peer that sends
// no proper header loses the session.
func (s *Session) Accept(ctx context.Context) (*Channel, error) {
	for {
		stream, err := s.conn.AcceptStream(ctx)
		if err != nil {
			return nil, fmt.Errorf("accept channel: %w", s.explain(err))
		}
		header, err := s.readHeader(ctx, stream)
		var abandoned *quic.StreamError
		switch {
		case err == nil:
			return newChannel(s, stream, header), nil
		case errors.As(err, &abandoned): // the peer opened and closed it at once
			stream.CancelWrite(resetClosed)
			continue
		case ctx.Err() != nil:
			stream.CancelRead(resetClosed)
			stream.CancelWrite(resetClosed)
			return nil, fmt.Errorf("accept channel: %w", context.Cause(ctx))
		case errors.Is(err, ErrFormat), errors.Is(err, io.ErrUnexpectedEOF):
			s.conn.CloseWithError(closeFormat, printable("channel header: "+err.Error()))
			return nil, fmt.Errorf("accept channel from %s at %s: %w", s.peer, s.RemoteAddr(), err)
		}
		return nil, fmt.Errorf("accept channel: %w", s.explain(err))
	}
}

func (s *Session) readHeader(ctx context.Context, stream *quic.Stream) (channelHeader, error) {
	ctx, cancel := context.WithTimeout(ctx, headerTimeout)
	defer cancel()
	var header channelHeader
	err := interruptible(ctx, stream.SetReadDeadline, func() error {
		var err error
		header, err = readChannelHeader(stream)
		return err
	})
	if interrupted(err) {
		err = fmt.Errorf("%w: incomplete after %v", ErrFormat, headerTimeout)
	}
	return header, err
}

// Stats counts what a session has carried. Bytes include QUIC's own and sent-again
// data, but not the headers of UDP and IP.
type Stats struct {
	BytesSent     uint64
	BytesReceived uint64
	PacketsLost   uint64        // goes down again when one arrives after all
	RTT           time.Duration // smoothed
	MinRTT        time.Duration
}

// Stats returns the session's counters.
func (s *Session) Stats() Stats {
	st := s.conn.ConnectionStats()
	return Stats{
		BytesSent:     st.BytesSent,
		BytesReceived: st.BytesReceived,
		PacketsLost:   st.PacketsLost,
		RTT:           st.SmoothedRTT,
		MinRTT:        st.MinRTT,
	}
}

// Close ends the session and all its channels, and tells the peer the reason, of
// which it gets at most 256 bytes. Frames that the peer has not received yet are
// lost: a protocol that needs to know ends with an acknowledgement.
func (s *Session) Close(reason string) {
	s.conn.CloseWithError(closeReason, printable(reason))
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.conn.Context().Done() }

// Err returns nil while the session lives, and then why it ended: ErrClosed,
// ErrClosedByPeer or ErrLost, with the details.
func (s *Session) Err() error {
	ctx := s.conn.Context()
	if ctx.Err() == nil {
		return nil
	}
	return s.explain(context.Cause(ctx))
}

// explain turns what a connection returns into this package's errors.
func (s *Session) explain(err error) error {
	var closed *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	var restarted *quic.StatelessResetError
	switch {
	case errors.As(err, &closed) && closed.Remote:
		return fmt.Errorf("%w: %s", ErrClosedByPeer, printable(closed.ErrorMessage))
	case errors.As(err, &closed):
		return fmt.Errorf("%w here: %s", ErrClosed, closed.ErrorMessage)
	case errors.As(err, &idle):
		return fmt.Errorf("%w: no answer from %s for %v: link down or agent gone", ErrLost, s.RemoteAddr(), IdleTimeout)
	case errors.As(err, &restarted):
		return fmt.Errorf("%w: the agent at %s was restarted", ErrLost, s.RemoteAddr())
	case errors.Is(err, quic.ErrTransportClosed):
		return fmt.Errorf("%w here with its endpoint", ErrClosed)
	case errors.Is(err, net.ErrClosed): // every other end of a QUIC connection
		return fmt.Errorf("%w: connection to %s failed: %w", ErrLost, s.RemoteAddr(), err)
	}
	return err
}
