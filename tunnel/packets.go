package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/quic-go/quic-go"
)

const packetsProtocol = "wanmig/1/packets" // ALPN of a connection for packets

// Packets carries packets to one agent whose identity was verified, each whole or
// not at all, perhaps late or in another order. Its methods are safe for concurrent
// use.
type Packets struct {
	peer ID
	tag  []byte
	conn *quic.Conn

	ctx    context.Context // ends with the connection, and has the reason
	cancel context.CancelCauseFunc
}

// DialPackets opens a connection for packets to the agent peer at addr, which
// Dial describes. The tag, at most MaxTag bytes, tells the peer what it is for.
// DialPackets succeeds when the peer's AcceptPackets has taken the connection up.
func (e *Endpoint) DialPackets(ctx context.Context, addr string, peer ID, tag []byte) (*Packets, error) {
	if len(tag) > MaxTag {
		return nil, fmt.Errorf("dial %s: tag of %d bytes, allowed are %d", addr, len(tag), MaxTag)
	}
	var p *Packets
	err := e.dialHost(ctx, addr, peer, func(ctx context.Context, addr netip.AddrPort, peer ID) error {
		conn, err := e.dialConn(ctx, addr, peer, packetsProtocol)
		if err != nil {
			return err
		}
		if err = requestPackets(ctx, conn, tag); err == nil {
			p, err = e.keepPackets(conn, tag)
		}
		if err != nil {
			conn.CloseWithError(closeReason, "not taken up")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// requestPackets asks the listener to take the connection, and waits until it has.
func requestPackets(ctx context.Context, conn *quic.Conn, tag []byte) error {
	stream, err := conn.OpenStream()
	if err != nil {
		return err
	}
	if _, err := stream.Write(appendTag(nil, tag)); err != nil {
		return err
	}
	if err := stream.Close(); err != nil {
		return err
	}
	return interruptible(ctx, stream.SetReadDeadline, func() error { return readTaken(stream) })
}

// offer is a dialer's connection for packets that waits for AcceptPackets.
type offer struct {
	conn   *quic.Conn
	stream *quic.Stream // for the answer
	tag    []byte
}

// offerPackets hands a dialer's connection to AcceptPackets. The dialer has
// headerTimeout for its request and for being accepted together.
func (e *Endpoint) offerPackets(conn *quic.Conn) {
	ctx, cancel := context.WithTimeout(conn.Context(), headerTimeout)
	defer cancel()
	o, err := awaitOffer(ctx, conn)
	if err == nil {
		select {
		case e.offers <- o:
			return
		case <-ctx.Done():
			err = fmt.Errorf("not accepted within %v", headerTimeout)
		}
	}
	if !leave(conn) {
		return // it ended, and was logged then
	}
	peer, _ := peerID(conn.ConnectionState().TLS)
	e.logRefusal("refused a connection for packets", "peer", peer, "addr", conn.RemoteAddr(), "error", err)
	conn.CloseWithError(closeReason, printable("not taken up: "+err.Error()))
}

func awaitOffer(ctx context.Context, conn *quic.Conn) (offer, error) {
	stream, err := conn.AcceptStream(ctx)
	if err != nil {
		return offer{}, err
	}
	var tag []byte
	err = interruptible(ctx, stream.SetReadDeadline, func() error {
		if tag, err = readTag(stream); err != nil {
			return err
		}
		return skipLater(stream)
	})
	return offer{conn, stream, tag}, err
}

// AcceptPackets returns the next connection for packets that a trusted agent has
// dialled. One that is not accepted within 10 s is refused.
func (e *Endpoint) AcceptPackets(ctx context.Context) (*Packets, error) {
	for {
		var o offer
		select {
		case o = <-e.offers:
		case <-e.deaf:
			return nil, fmt.Errorf("accept packets: %w", ErrClosed)
		case <-ctx.Done():
			return nil, fmt.Errorf("accept packets: %w", context.Cause(ctx))
		}
		if !leave(o.conn) {
			continue // it ended while it waited, and was logged then
		}
		p, err := e.keepPackets(o.conn, o.tag)
		if err == nil {
			if _, err = o.stream.Write([]byte{takenVersion}); err == nil {
				err = o.stream.Close()
			}
		}
		if err != nil {
			e.log.Debug("connection for packets ended before it was accepted", "addr", o.conn.RemoteAddr(), "cause", err)
			o.conn.CloseWithError(closeReason, "not accepted")
			continue
		}
		return p, nil
	}
}

// keepPackets holds a connection until it ends, so that Close can close it.
func (e *Endpoint) keepPackets(conn *quic.Conn, tag []byte) (*Packets, error) {
	peer, ok := peerID(conn.ConnectionState().TLS)
	if !ok {
		return nil, &identityError{}
	}
	p := &Packets{peer: peer, tag: append([]byte(nil), tag...), conn: conn}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, ErrClosed
	}
	e.packets[p] = struct{}{}
	e.running.Go(func() {
		<-conn.Context().Done()
		p.cancel(explainEnd(conn.RemoteAddr(), context.Cause(conn.Context())))
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.packets, p)
	})
	e.running.Go(p.discover)
	return p, nil
}

// Discovery of the path's MTU goes on when something is sent: one probe each
// five round trips, half as far from the goal each time.
const (
	discoveryProbes   = 12
	discoveryTrips    = 5
	discoveryInterval = 10 * time.Millisecond
)

// discover sends empty packets, which are not delivered, until the path's MTU is
// known, since a tunnel that awaits its first packet needs to know it.
func (p *Packets) discover() {
	for range discoveryProbes {
		wait := max(discoveryInterval, discoveryTrips*p.conn.ConnectionStats().SmoothedRTT)
		select {
		case <-p.ctx.Done():
			return
		case <-time.After(wait + discoveryInterval):
		}
		if p.conn.SendDatagram(nil) != nil {
			return
		}
	}
}

// Peer returns the peer's verified ID.
func (p *Packets) Peer() ID { return p.peer }

// Tag returns what the dialer said that the connection is for.
func (p *Packets) Tag() []byte { return p.tag }

// LocalAddr returns the address from which this host sends to the peer.
func (p *Packets) LocalAddr() net.Addr { return localAddr(p.conn) }

// RemoteAddr returns the peer's address.
func (p *Packets) RemoteAddr() net.Addr { return p.conn.RemoteAddr() }

// Send sends one packet. The error is an ErrTooLarge when b is larger than
// MaxSize.
func (p *Packets) Send(b []byte) error {
	err := p.conn.SendDatagram(b)
	var large *quic.DatagramTooLargeError
	if errors.As(err, &large) {
		return fmt.Errorf("%w: %d bytes, at most %d fit", ErrTooLarge, len(b), large.MaxDatagramPayloadSize)
	}
	if err != nil {
		return fmt.Errorf("send packet: %w", p.explain(err))
	}
	return nil
}

// Receive returns the next packet.
func (p *Packets) Receive(ctx context.Context) ([]byte, error) {
	for {
		b, err := p.conn.ReceiveDatagram(ctx)
		switch {
		case err == nil && len(b) > 0:
			return b, nil
		case err == nil:
			continue
		case ctx.Err() != nil:
			return nil, fmt.Errorf("receive packet: %w", context.Cause(ctx))
		}
		return nil, fmt.Errorf("receive packet: %w", p.explain(err))
	}
}

// beyond is larger than any packet.
var beyond = make([]byte, 1<<16)

// MaxSize returns how many bytes a packet may have now. It is 1163 at first,
// and grows to 1400 or so within 30 round trips where the path lets it.
func (p *Packets) MaxSize() int {
	var large *quic.DatagramTooLargeError
	if errors.As(p.conn.SendDatagram(beyond), &large) {
		return int(large.MaxDatagramPayloadSize)
	}
	return 0
}

// Close ends the connection and tells the peer the reason, of which it gets at
// most 256 bytes.
func (p *Packets) Close(reason string) {
	reason = printable(reason)
	p.cancel(fmt.Errorf("%w here: %s", ErrClosed, reason))
	p.conn.CloseWithError(closeReason, reason)
}

// Done is closed when the connection has ended.
func (p *Packets) Done() <-chan struct{} { return p.ctx.Done() }

// Err returns nil while the connection lives, and then why it ended: ErrClosed,
// ErrClosedByPeer or ErrLost, with the details.
func (p *Packets) Err() error { return context.Cause(p.ctx) }

func (p *Packets) explain(err error) error {
	if cause := p.Err(); cause != nil {
		return cause
	}
	return explainEnd(p.RemoteAddr(), err)
}
