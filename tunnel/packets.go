package tunnel

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

const packetsProtocol = "wanmig/1/packets" // ALPN of a connection for packets

// packetCarriers is how many connections carry packets together. The measurements
// that chose it are in the package's part on packets.
const packetCarriers = 8

// Packets carries packets to one agent whose identity was verified, each whole or
// not at all, nearly always in order. Its methods are safe for concurrent use.
type Packets struct {
	*bundle
	tag     []byte
	out     chan []byte  // from Send to the carriers
	arrived chan arrival // from the carriers
	in      chan []byte  // in order, to Receive
	sent    atomic.Uint32
	maxSize atomic.Int64
}

// arrival is a datagram that a carrier brought.
type arrival struct {
	carrier  int
	datagram []byte
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
		t, err := requestPackets(ctx, conn, tag)
		if err == nil {
			p, err = e.keepPackets(conn, tag, nil)
		}
		if err != nil {
			conn.CloseWithError(closeReason, "not taken up")
			return err
		}
		e.joinAll(p, addr, t)
		return p.Err()
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// requestPackets asks the listener to take the connection. It returns when that
// has, with the token for the other carriers.
func requestPackets(ctx context.Context, conn *quic.Conn, tag []byte) (t token, err error) {
	stream, err := conn.OpenStream()
	if err != nil {
		return token{}, err
	}
	if _, err := stream.Write(appendTag(nil, tag)); err != nil {
		return token{}, err
	}
	if err := stream.Close(); err != nil {
		return token{}, err
	}
	return readGreeting(ctx, stream)
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
		var t token
		rand.Read(t[:]) // never fails
		p, err := e.keepPackets(o.conn, o.tag, &t)
		if err == nil {
			if _, err = o.stream.Write(t.append(nil)); err == nil {
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

// keepPackets makes Packets of their first connection. With a token they can be
// joined.
func (e *Endpoint) keepPackets(conn *quic.Conn, tag []byte, t *token) (*Packets, error) {
	peer, ok := peerID(conn.ConnectionState().TLS)
	if !ok {
		return nil, &identityError{}
	}
	if err := takesDatagrams(conn); err != nil {
		return nil, err
	}
	p := &Packets{
		bundle:  newBundle(conn, peer, packetCarriers, &e.running),
		tag:     slices.Clone(tag),
		out:     make(chan []byte),
		arrived: make(chan arrival),
		in:      make(chan []byte),
	}
	p.measure()
	if err := e.hold(p, t); err != nil {
		return nil, err
	}
	p.serve(conn, 1)
	p.run(p.order)
	p.run(p.discover)
	return p, nil
}

// takesDatagrams returns an error when the peer has not said that it does.
func takesDatagrams(conn *quic.Conn) error {
	if !conn.ConnectionState().SupportsDatagrams.Remote {
		return fmt.Errorf("%w: the agent at %s takes no QUIC datagrams", ErrVersion, conn.RemoteAddr())
	}
	return nil
}

func (p *Packets) addCarrier(conn *quic.Conn) error {
	if err := takesDatagrams(conn); err != nil {
		return err
	}
	p.mu.Lock()
	number, err := p.join(conn)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	p.watch(conn, number)
	p.serve(conn, number)
	return nil
}

// serve moves packets from Send and to order, as fast as the carrier takes them
// and until it ends.
func (p *Packets) serve(conn *quic.Conn, number int) {
	p.run(func() {
		for {
			select {
			case b := <-p.out:
				// One that is too large by now, or that comes with the end, is lost.
				_ = conn.SendDatagram(b)
			case <-p.ctx.Done():
				return
			}
		}
	})
	p.run(func() {
		for {
			b, err := conn.ReceiveDatagram(p.ctx)
			if err != nil {
				return
			}
			select {
			case p.arrived <- arrival{number - 1, b}:
			case <-p.ctx.Done():
				return
			}
		}
	})
}

// order hands what the carriers bring to Receive, in the order in which it was
// sent.
func (p *Packets) order() {
	s := newSequencer(packetCarriers)
	timer := time.NewTimer(maxWait)
	defer timer.Stop()
	var ready [][]byte
	for {
		select {
		case a := <-p.arrived:
			ready = s.take(ready[:0], a.carrier, a.datagram, time.Now())
		case now := <-timer.C:
			ready = s.expire(ready[:0], now)
		case <-p.ctx.Done():
			return
		}
		for _, b := range ready {
			select {
			case p.in <- b:
			case <-p.ctx.Done():
				return
			}
		}
		if until := s.deadline(); !until.IsZero() {
			timer.Reset(time.Until(until))
		}
	}
}

// quic-go looks for the path's MTU when it sends anyway, with a probe each five
// round trips at most, each half as far from the goal as the one before.
const (
	fruitlessProbes = 20
	probeTrips      = 5
	probeInterval   = 50 * time.Millisecond // at least
)

// discover sends empty datagrams, until the path's MTU seems to be known, since a
// tunnel needs it before its first packet; later growth comes with its packets. It
// keeps MaxSize up to date.
func (p *Packets) discover() {
	for fruitless := 0; ; fruitless++ {
		probing := fruitless < fruitlessProbes
		wait := KeepAlive
		if probing {
			wait = max(probeInterval, (probeTrips+1)*p.first.ConnectionStats().SmoothedRTT)
		}
		select {
		case <-p.ctx.Done():
			return
		case <-time.After(wait):
		}
		if probing {
			for _, conn := range p.all() {
				_ = conn.SendDatagram(nil) // fails with the carrier only, which ends us
			}
		}
		if p.measure() {
			fruitless = 0
		}
	}
}

// beyond is larger than any packet.
var beyond = make([]byte, 1<<16)

// measure asks each carrier for the largest packet that it takes, and says whether
// MaxSize has grown.
func (p *Packets) measure() (grown bool) {
	size := int64(len(beyond))
	for _, conn := range p.all() {
		var large *quic.DatagramTooLargeError
		if errors.As(conn.SendDatagram(beyond), &large) {
			size = min(size, large.MaxDatagramPayloadSize)
		}
	}
	size = max(0, size-sequenceSize)
	return p.maxSize.Swap(size) < size
}

// MaxSize returns how many bytes a packet may have now. It is 1159 at first, and
// where the path lets it, it grows to 1395 within about 40 round trips.
func (p *Packets) MaxSize() int { return int(p.maxSize.Load()) }

// Tag returns what the dialer said that the packets are for.
func (p *Packets) Tag() []byte { return p.tag }

// Send sends one packet, which is not empty, and waits while congestion control
// holds all carriers back: what comes meanwhile is best dropped where it comes
// from. The error is an ErrTooLarge when b is larger than MaxSize.
func (p *Packets) Send(b []byte) error {
	if most := p.MaxSize(); len(b) > most {
		return fmt.Errorf("%w: %d bytes, at most %d fit", ErrTooLarge, len(b), most)
	}
	if err := p.Err(); err != nil {
		return fmt.Errorf("send packet: %w", err)
	}
	if len(b) == 0 {
		return nil
	}
	datagram := append(appendSequence(make([]byte, 0, sequenceSize+len(b)), p.sent.Add(1)-1), b...)
	select {
	case p.out <- datagram:
		return nil
	case <-p.ctx.Done():
		return fmt.Errorf("send packet: %w", p.Err())
	}
}

// Receive returns the next packet. Up to 1024 packets wait for it; more are
// dropped.
func (p *Packets) Receive(ctx context.Context) ([]byte, error) {
	select {
	case b := <-p.in:
		return b, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("receive packet: %w", context.Cause(ctx))
	case <-p.ctx.Done():
		return nil, fmt.Errorf("receive packet: %w", p.Err())
	}
}
