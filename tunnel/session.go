package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// Session carries channels to one agent whose identity was verified. Its methods
// are safe for concurrent use.
type Session struct {
	*bundle

	accepting chan struct{} // holds a token while a channel is accepted

	// bundle.mu guards these too.
	stripes      map[quic.StreamID]*stripe
	waiting      map[quic.StreamID][]lane // streams of channels that are not accepted yet
	nextAccepted quic.StreamID            // of the next channel that the peer opens
}

func newSession(first *quic.Conn, peer ID, dialled bool, running *sync.WaitGroup) *Session {
	s := &Session{
		bundle:    newBundle(first, peer, Carriers, running),
		accepting: make(chan struct{}, 1),
		stripes:   make(map[quic.StreamID]*stripe),
		waiting:   make(map[quic.StreamID][]lane),
	}
	if dialled {
		s.nextAccepted = 1 // RFC 9000, section 2.1: the listener's streams are 1, 5, 9
	}
	return s
}

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
