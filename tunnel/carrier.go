package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// Carriers is the most QUIC connections that a session uses. The measurements
// that chose it are in the package's part on carriers.
const Carriers = 16

var (
	errTooMany   = errors.New("all carriers are there")
	errNoSession = errors.New("no such session of this agent")
)

// joinAll dials the other carriers of what the token t names. Those that fail
// are missing, and nothing else.
func (e *Endpoint) joinAll(to bundled, addr netip.AddrPort, t token) {
	b := to.common()
	var mu sync.Mutex
	var failed []error
	var all sync.WaitGroup
	for range b.most - 1 {
		all.Go(func() {
			if err := e.joinOne(to, addr, t); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, err)
			}
		})
	}
	all.Wait()
	switch {
	case b.Err() != nil:
		return
	case len(failed) > 0:
		e.log.Warn("carriers are missing", "peer", b.peer, "addr", addr,
			"carriers", b.most-len(failed), "wanted", b.most, "error", failed[0])
	default:
		e.log.Debug("carriers are complete", "peer", b.peer, "addr", addr, "carriers", b.most)
	}
}

func (e *Endpoint) joinOne(to bundled, addr netip.AddrPort, t token) error {
	b := to.common()
	ctx, cancel := context.WithTimeout(b.ctx, handshakeTimeout)
	defer cancel()
	began := time.Now()
	conn, err := e.dialCarrier(ctx, addr, b.peer, t)
	if err != nil {
		return e.explainDial(addr, b.peer, time.Since(began), err)
	}
	if err := to.addCarrier(conn); err != nil {
		conn.CloseWithError(closeReason, "not needed")
		return err
	}
	return nil
}

// dialCarrier returns a connection that the listener has let join the session t.
func (e *Endpoint) dialCarrier(ctx context.Context, addr netip.AddrPort, peer ID, t token) (*quic.Conn, error) {
	conn, err := e.dialConn(ctx, addr, peer, joinProtocol)
	if err != nil {
		return nil, err
	}
	request, err := conn.OpenUniStream()
	if err == nil {
		_, err = request.Write(t.append(nil))
	}
	if err == nil {
		var answer token
		if answer, err = awaitGreeting(ctx, conn); err == nil && answer != t {
			err = fmt.Errorf("%w: greeting of another session", ErrFormat)
		}
	}
	if err == nil {
		err = request.Close() // now the listener may use the carrier too
	}
	if err != nil {
		conn.CloseWithError(closeReason, "not joined")
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	return conn, nil
}

// join takes a connection into the session, or the packets' connections, that it
// asks for.
func (e *Endpoint) join(conn *quic.Conn) {
	ctx, cancel := context.WithTimeout(conn.Context(), headerTimeout)
	defer cancel()
	peer, _ := peerID(conn.ConnectionState().TLS)
	err := e.admitCarrier(ctx, conn, peer)
	if !leave(conn) {
		return // it ended, and was logged then
	}
	if err != nil {
		e.logRefusal("refused a carrier", "peer", peer, "addr", conn.RemoteAddr(), "error", err)
		conn.CloseWithError(closeReason, printable("not joined: "+err.Error()))
	}
}

func (e *Endpoint) admitCarrier(ctx context.Context, conn *quic.Conn, peer ID) error {
	request, err := conn.AcceptUniStream(ctx)
	if err != nil {
		return err
	}
	var t token
	err = interruptible(ctx, request.SetReadDeadline, func() error {
		var err error
		t, err = readToken(request)
		return err
	})
	if err != nil {
		return err
	}
	to := e.joinable(t)
	if to == nil || to.common().peer != peer {
		return errNoSession
	}
	if err := greet(conn, t); err != nil {
		return err
	}
	// The dialer ends its request when it has the greeting. One that gave up
	// before costs the session nothing.
	err = interruptible(ctx, request.SetReadDeadline, func() error { return skipLater(request) })
	if err != nil {
		return err
	}
	return to.addCarrier(conn)
}

// joinable returns what the token names, or nil.
func (e *Endpoint) joinable(t token) bundled {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.tokens[t]
}

// addCarrier gives a session one more connection.
func (s *Session) addCarrier(conn *quic.Conn) error {
	s.mu.Lock()
	number, err := s.join(conn)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	var extend []*stripe
	for _, st := range s.stripes {
		if st.ours {
			extend = append(extend, st)
		}
	}
	s.mu.Unlock()
	s.watch(conn, number)
	s.run(func() { s.acceptLanes(conn) })
	for _, st := range extend {
		s.run(func() { st.extend(conn) })
	}
	return nil
}

// acceptLanes takes in the streams that the peer opens on a joined carrier.
func (s *Session) acceptLanes(conn *quic.Conn) {
	for {
		stream, err := conn.AcceptStream(s.ctx)
		if err != nil {
			return // the connection is over, and with it the session
		}
		var header laneHeader
		err = s.readHeader(s.ctx, stream, func() error {
			var err error
			header, err = readLaneHeader(stream)
			return err
		})
		if err == nil {
			err = s.takeLane(header.channel, lane{conn, stream})
		}
		var abandoned *quic.StreamError
		switch {
		case errors.As(err, &abandoned):
			stream.CancelWrite(resetClosed)
		case errors.Is(err, ErrFormat), errors.Is(err, io.ErrUnexpectedEOF):
			s.breach(fmt.Errorf("stream header: %w", err))
			return
		}
	}
}

// takeLane gives a stream to its channel. One that comes before its channel was
// accepted waits; there can be MaxChannels of these on each carrier.
func (s *Session) takeLane(id quic.StreamID, l lane) error {
	s.mu.Lock()
	st, open := s.stripes[id]
	early := !open && id >= s.nextAccepted
	foreign := (id-s.nextAccepted)%4 == 0 // of the kind that the peer opens
	if early && foreign {
		s.waiting[id] = append(s.waiting[id], l)
	}
	s.mu.Unlock()
	switch {
	case !foreign:
		return fmt.Errorf("%w: stream for channel %d, which the peer cannot open", ErrFormat, id)
	case open:
		return st.attach(l.carrier, l.stream)
	case !early:
		refuseLane(l)
	}
	return nil
}

func refuseLane(l lane) {
	l.stream.CancelRead(resetLate)
	l.stream.CancelWrite(resetLate)
}
