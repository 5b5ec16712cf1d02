package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
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

// Flow-control windows of one carrier. While one carrier recovers from a loss,
// which takes up to a second, the others run ahead of the bytes that it owes: 2 MiB
// on each of 16 carriers are 0.3 s of 1 Gbit/s. Windows a half as large cost a
// quarter of 200 Mbit/s. The connection starts at its full window, since a few
// stopped channels must not take the share of the others.
const (
	streamWindowStart = 512 << 10
	streamWindow      = 2 << 20
	connectionWindow  = 12 << 20
)

func quicConfig() *quic.Config {
	return &quic.Config{
		EnableDatagrams:                true, // a listener cannot tell what will be dialled
		HandshakeIdleTimeout:           handshakeSilence,
		MaxIdleTimeout:                 IdleTimeout,
		KeepAlivePeriod:                KeepAlive,
		InitialStreamReceiveWindow:     streamWindowStart,
		MaxStreamReceiveWindow:         streamWindow,
		InitialConnectionReceiveWindow: connectionWindow,
		MaxConnectionReceiveWindow:     connectionWindow,
		MaxIncomingStreams:             MaxChannels,
		MaxIncomingUniStreams:          1,
		// The least that QUIC allows, so that a path with the smallest MTU of
		// IPv6 works too; discovery of the path's MTU raises it.
		InitialPacketSize: 1200,
	}
}

// Session is a set of connections to one agent whose identity was verified. Its
// methods are safe for concurrent use.
type Session struct {
	peer    ID
	first   *quic.Conn
	running *sync.WaitGroup // the endpoint's, which waits for it

	ctx    context.Context // ends with the session, and has the reason
	cancel context.CancelCauseFunc

	accepting chan struct{} // holds a token while a channel is accepted

	mu           sync.Mutex
	ended        bool
	carriers     []*quic.Conn
	stripes      map[quic.StreamID]*stripe
	waiting      map[quic.StreamID][]lane // streams of channels that are not accepted yet
	nextAccepted quic.StreamID            // of the next channel that the peer opens
}

func newSession(first *quic.Conn, peer ID, dialled bool, running *sync.WaitGroup) *Session {
	s := &Session{
		peer:      peer,
		first:     first,
		running:   running,
		accepting: make(chan struct{}, 1),
		carriers:  []*quic.Conn{first},
		stripes:   make(map[quic.StreamID]*stripe),
		waiting:   make(map[quic.StreamID][]lane),
	}
	if dialled {
		s.nextAccepted = 1 // RFC 9000, section 2.1: the listener's streams are 1, 5, 9
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// run runs f, for which the endpoint waits, unless the session has ended.
func (s *Session) run(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.running.Go(f)
	}
}

// Peer returns the peer's verified ID.
func (s *Session) Peer() ID { return s.peer }

// LocalAddr returns the address from which this host sends to the peer: of a
// socket that is bound to all of them, the one that the kernel's routes choose.
func (s *Session) LocalAddr() net.Addr { return localAddr(s.first) }

// RemoteAddr returns the peer's address.
func (s *Session) RemoteAddr() net.Addr { return s.first.RemoteAddr() }

// Open makes a channel to the peer. The name has 1 to 64 of the characters a-z,
// 0-9, '.', '_', '-' and '/'. Open waits while MaxChannels are open.
func (s *Session) Open(ctx context.Context, name string, priority Priority) (*Channel, error) {
	header := channelHeader{name: name, priority: priority}
	if err := header.check(); err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	stream, err := s.first.OpenStreamSync(ctx)
	if err != nil {
		return nil, fmt.Errorf("open channel %s: %w", name, s.explain(err))
	}
	priority.apply(stream)
	if _, err := stream.Write(header.append(nil)); err != nil {
		return nil, fmt.Errorf("open channel %s: %w", name, s.explain(err))
	}
	if priority == Control {
		return newChannel(s, newPlain(stream), name), nil
	}
	st := newStripe(s, stream.StreamID(), priority, true)
	for _, carrier := range s.register(st) {
		if carrier != s.first {
			s.run(func() { st.extend(carrier) })
		}
	}
	if err := st.attach(s.first, stream); err != nil {
		return nil, fmt.Errorf("open channel %s: %w", name, err)
	}
	return newChannel(s, st, name), nil
}

// register keeps a striped channel until it is over, and returns the carriers
// that it can use; those that join later find it.
func (s *Session) register(st *stripe) []*quic.Conn {
	s.mu.Lock()
	s.stripes[st.id] = st
	carriers := slices.Clone(s.carriers)
	s.mu.Unlock()
	s.run(func() {
		st.await()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.stripes, st.id)
	})
	return carriers
}

// Accept returns the next channel that the peer has opened. A peer that sends
// no proper header loses the session.
func (s *Session) Accept(ctx context.Context) (*Channel, error) {
	select {
	case s.accepting <- struct{}{}:
		defer func() { <-s.accepting }()
	case <-ctx.Done():
		return nil, fmt.Errorf("accept channel: %w", context.Cause(ctx))
	}
	for {
		stream, err := s.first.AcceptStream(ctx)
		if err != nil {
			return nil, fmt.Errorf("accept channel: %w", s.explain(err))
		}
		var header channelHeader
		err = s.readHeader(ctx, stream, func() error {
			var err error
			header, err = readChannelHeader(stream)
			return err
		})
		if err == nil {
			return s.newAccepted(stream, header)
		}
		s.passOver(stream.StreamID())
		var abandoned *quic.StreamError
		switch {
		case errors.As(err, &abandoned): // the peer opened and closed it at once
			stream.CancelWrite(resetClosed)
			continue
		case ctx.Err() != nil:
			stream.CancelRead(resetClosed)
			stream.CancelWrite(resetClosed)
			return nil, fmt.Errorf("accept channel: %w", context.Cause(ctx))
		case errors.Is(err, ErrFormat), errors.Is(err, io.ErrUnexpectedEOF):
			s.breach(fmt.Errorf("channel header: %w", err))
			return nil, fmt.Errorf("accept channel from %s at %s: %w", s.peer, s.RemoteAddr(), err)
		}
		return nil, fmt.Errorf("accept channel: %w", s.explain(err))
	}
}

// newAccepted makes a channel of a stream that the peer has opened.
func (s *Session) newAccepted(stream *quic.Stream, header channelHeader) (*Channel, error) {
	header.priority.apply(stream)
	if header.priority == Control {
		s.passOver(stream.StreamID())
		return newChannel(s, newPlain(stream), header.name), nil
	}
	st := newStripe(s, stream.StreamID(), header.priority, false)
	s.register(st)
	early := append([]lane{{s.first, stream}}, s.accepted(st.id)...)
	for _, l := range early {
		if err := st.attach(l.carrier, l.stream); err != nil {
			s.breach(err)
			return nil, fmt.Errorf("accept channel %s from %s at %s: %w", header.name, s.peer, s.RemoteAddr(), err)
		}
	}
	return newChannel(s, st, header.name), nil
}

// accepted notes that the peer's channel id is no longer awaited, and returns
// the streams on other carriers that came before.
func (s *Session) accepted(id quic.StreamID) []lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	early := s.waiting[id]
	delete(s.waiting, id)
	s.nextAccepted = id + 4
	return early
}

// passOver is for a channel that has no streams on other carriers.
func (s *Session) passOver(id quic.StreamID) {
	for _, l := range s.accepted(id) {
		refuseLane(l)
	}
}

// readHeader runs read, which reads a stream's header, and limits its time.
func (s *Session) readHeader(ctx context.Context, stream *quic.Stream, read func() error) error {
	ctx, cancel := context.WithTimeout(ctx, headerTimeout)
	defer cancel()
	err := interruptible(ctx, stream.SetReadDeadline, read)
	if interrupted(err) {
		err = fmt.Errorf("%w: incomplete after %v", ErrFormat, headerTimeout)
	}
	return err
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
	s.mu.Lock()
	carriers := slices.Clone(s.carriers)
	s.mu.Unlock()
	var sum Stats
	for _, conn := range carriers {
		st := conn.ConnectionStats()
		sum.BytesSent += st.BytesSent
		sum.BytesReceived += st.BytesReceived
		sum.PacketsLost += st.PacketsLost
		if conn == s.first {
			sum.RTT, sum.MinRTT = st.SmoothedRTT, st.MinRTT
		}
	}
	return sum
}

// Close ends the session and all its channels, and tells the peer the reason, of
// which it gets at most 256 bytes. Frames that the peer has not received yet are
// lost: a protocol that needs to know ends with an acknowledgement.
func (s *Session) Close(reason string) {
	reason = printable(reason)
	s.end(fmt.Errorf("%w here: %s", ErrClosed, reason), closeReason, reason)
}

// breach ends the session because the peer broke the format.
func (s *Session) breach(err error) {
	reason := printable(err.Error())
	s.end(fmt.Errorf("%w here: %s", ErrClosed, reason), closeFormat, reason)
}

// end closes every connection of the session, the first time that it is called.
func (s *Session) end(cause error, code quic.ApplicationErrorCode, reason string) {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return
	}
	s.ended = true
	s.cancel(cause)
	s.mu.Unlock()
	for _, conn := range s.carriers { // none is added any more
		conn.CloseWithError(code, reason)
	}
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.ctx.Done() }

// Err returns nil while the session lives, and then why it ended: ErrClosed,
// ErrClosedByPeer or ErrLost, with the details.
func (s *Session) Err() error { return context.Cause(s.ctx) }

// explain turns what a connection returns into this package's errors.
func (s *Session) explain(err error) error {
	if cause := s.Err(); cause != nil {
		return cause
	}
	return explainEnd(s.RemoteAddr(), err)
}

// explainEnd says why the connection to an agent ended.
func explainEnd(addr net.Addr, err error) error {
	var closed *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	var restarted *quic.StatelessResetError
	switch {
	case errors.As(err, &closed) && closed.Remote && closed.ErrorCode == closeLost:
		return fmt.Errorf("%w: the agent at %s reports: %s", ErrLost, addr, printable(closed.ErrorMessage))
	case errors.As(err, &closed) && closed.Remote:
		return fmt.Errorf("%w: %s", ErrClosedByPeer, printable(closed.ErrorMessage))
	case errors.As(err, &closed):
		return fmt.Errorf("%w here: %s", ErrClosed, closed.ErrorMessage)
	case errors.As(err, &idle):
		return fmt.Errorf("%w: no answer from %s for %v: link down or agent gone", ErrLost, addr, IdleTimeout)
	case errors.As(err, &restarted):
		return fmt.Errorf("%w: the agent at %s was restarted", ErrLost, addr)
	case errors.Is(err, quic.ErrTransportClosed):
		return fmt.Errorf("%w here with its endpoint", ErrClosed)
	case errors.Is(err, net.ErrClosed): // every other end of a QUIC connection
		return fmt.Errorf("%w: connection to %s failed: %w", ErrLost, addr, err)
	}
	return err
}
