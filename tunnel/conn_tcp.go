package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// lingerTime is how long a closed TCP connection may take for its last bytes.
const lingerTime = time.Second

// tcpConn is a TLS 1.3 connection over TCP.
type tcpConn struct {
	tls *tls.Conn
	raw *net.TCPConn

	reading sync.Mutex // held while tls reads
	over    atomic.Bool
	closing chan struct{}

	mu   sync.Mutex
	last connStats // as of the last call of stats
}

// newTCPConn takes over a connection whose handshake is complete.
func (e *Endpoint) newTCPConn(secure *tls.Conn, raw *net.TCPConn) (*tcpConn, error) {
	c := &tcpConn{tls: secure, raw: raw, closing: make(chan struct{})}
	if err := e.run(func() { c.end(e.ctx) }); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// dialTCP returns a connection to peer that is not greeted yet. A narrow one
// sends and receives packets of 1280 bytes at most.
func (e *Endpoint) dialTCP(ctx context.Context, addr netip.AddrPort, peer ID, narrow bool) (*tcpConn, error) {
	dialer := net.Dialer{
		KeepAliveConfig: tcpKeepAlive,
		Control: func(_, _ string, raw syscall.RawConn) error {
			return tuneTCP(raw, narrow, e.log)
		},
	}
	if local := e.Addr().(*net.UDPAddr); !local.IP.IsUnspecified() {
		dialer.LocalAddr = &net.TCPAddr{IP: local.IP, Zone: local.Zone}
	}
	dialled, err := dialer.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	raw := dialled.(*net.TCPConn)
	secure := tls.Client(raw, e.tlsConfig(func(id ID) bool { return id == peer }, sessionProtocol))
	err = secure.HandshakeContext(ctx)
	if err == nil && secure.ConnectionState().NegotiatedProtocol != sessionProtocol {
		err = errProtocol
	}
	if err != nil {
		raw.Close()
		return nil, err
	}
	return e.newTCPConn(secure, raw)
}

func (c *tcpConn) transport() Transport { return TCP }

func (c *tcpConn) LocalAddr() net.Addr { return c.raw.LocalAddr() }

func (c *tcpConn) RemoteAddr() net.Addr { return c.raw.RemoteAddr() }

func (c *tcpConn) Read(b []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.over.Load() {
		return 0, net.ErrClosed
	}
	return c.tls.Read(b)
}

func (c *tcpConn) Write(b []byte) (int, error) {
	if c.over.Load() {
		return 0, net.ErrClosed
	}
	return c.tls.Write(b)
}

func (c *tcpConn) close(closeCode, string) {
	if c.over.Swap(true) {
		return
	}
	c.raw.SetDeadline(longAgo) // Read and Write return
	close(c.closing)
}

// end waits until the connection is closed here, or with its endpoint, whose
// context is ctx, and ends it then. A socket that is closed with unread bytes
// forgets what it has to send, so these are read.
func (c *tcpConn) end(ctx context.Context) {
	defer context.AfterFunc(ctx, func() { c.close(closeReason, "") })()
	<-c.closing
	stop := time.AfterFunc(lingerTime, func() { c.raw.Close() })
	defer stop.Stop()
	c.tls.CloseWrite() // sets its own deadline; fails where a Write was cut, or with the peer
	c.reading.Lock()
	defer c.reading.Unlock()
	linger(c.raw)
	c.stats()
	c.raw.Close()
}

// linger gives the peer time to receive what was sent before raw is closed.
func linger(raw *net.TCPConn) {
	raw.CloseWrite()
	raw.SetReadDeadline(time.Now().Add(lingerTime))
	io.Copy(io.Discard, raw) // until the peer closes too
}

func (c *tcpConn) stats() connStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now, err := tcpStats(c.raw); err == nil {
		c.last = now
	}
	return c.last
}

func (c *tcpConn) explain(err error) error {
	addr := c.RemoteAddr()
	switch {
	case err == nil, errors.Is(err, ErrFormat):
		return err
	case c.over.Load(), errors.Is(err, net.ErrClosed):
		return fmt.Errorf("%w here", ErrClosed)
	case errors.Is(err, syscall.ETIMEDOUT):
		return fmt.Errorf("%w: no answer from %s for %v: link down or agent gone", ErrLost, addr, IdleTimeout)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: the agent at %s has ended the connection", ErrLost, addr)
	}
	return fmt.Errorf("%w: connection to %s failed: %w", ErrLost, addr, err)
}
