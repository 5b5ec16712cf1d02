package tunnel

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// joinAll dials the other carriers of what the token t names. Those that fail
// are missing, and nothing else.
func (e *Endpoint) joinAll(to *Packets, addr netip.AddrPort, t token) {
	b := to.bundle
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

func (e *Endpoint) joinOne(to *Packets, addr netip.AddrPort, t token) error {
	b := to.bundle
	ctx, cancel := context.WithTimeout(b.ctx, handshakeTimeout)
	defer cancel()
	began := time.Now()
	conn, err := e.dialCarrier(ctx, addr, b.peer, t)
	if err != nil {
		return e.explainDial(attempt{addr: addr, transport: QUIC}, b.peer, time.Since(began), err)
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

// join takes a connection into the packets' connections that it asks for.
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
	if to == nil || to.peer != peer {
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
func (e *Endpoint) joinable(t token) *Packets {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.tokens[t]
}
