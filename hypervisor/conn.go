package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"

	"github.com/digitalocean/go-libvirt"
)

// ErrNoAnswer is returned when a call's context ended, or the connection broke,
// before libvirtd answered. Whether the call took effect is unknown.
var ErrNoAnswer = errors.New("libvirtd did not answer")

// conn is one connection to libvirtd.
type conn struct {
	socket string
	rpc    *libvirt.Libvirt
	raw    *rawConn
}

// rawConn tells when its peer is gone: go-libvirt's own signal can be missed
// when the connection breaks while it is being set up.
type rawConn struct {
	net.Conn
	once sync.Once
	gone chan struct{}
}

func (r *rawConn) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	if err != nil {
		r.once.Do(func() { close(r.gone) })
	}
	return n, err
}

func (r *rawConn) Close() error {
	r.once.Do(func() { close(r.gone) })
	return r.Conn.Close()
}

// Dial makes rawConn the socket.Dialer of its one connection.
func (r *rawConn) Dial() (net.Conn, error) { return r, nil }

func dial(ctx context.Context, socket string) (*conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to libvirtd (is it running, and may this process use its socket?): %w", err)
	}
	raw := &rawConn{Conn: nc, gone: make(chan struct{})}
	c := &conn{socket: socket, rpc: libvirt.NewWithDialer(raw), raw: raw}
	err = c.call(ctx, "open", func(l *libvirt.Libvirt) error { return l.ConnectToURI(libvirt.QEMUSystem) })
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *conn) close() { _ = c.raw.Close() }

func (c *conn) dead() bool {
	select {
	case <-c.raw.gone:
		return true
	default:
		return false
	}
}

// call runs one RPC and waits for its end. When ctx ends first it closes the
// connection, which is the only way to end a blocked RPC.
func (c *conn) call(ctx context.Context, what string, rpc func(*libvirt.Libvirt) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("libvirt %s: %w", what, err)
	}
	done := make(chan error, 1)
	go func() { done <- rpc(c.rpc) }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		c.close()
		// The answer may have come in at the same moment.
		if err = <-done; lost(err) {
			return fmt.Errorf("libvirt %s on %s: %w: %w", what, c.socket, ErrNoAnswer, context.Cause(ctx))
		}
	}
	switch {
	case err == nil:
		return nil
	case lost(err):
		return fmt.Errorf("libvirt %s on %s: %w, the connection broke (see libvirtd's log): %w", what, c.socket, ErrNoAnswer, err)
	}
	return fmt.Errorf("libvirt %s: %w", what, err)
}

// lost tells a broken connection from an error that libvirtd reported.
func lost(err error) bool {
	return errors.Is(err, libvirt.ErrInterrupted) || unsent(err)
}

// unsent tells that the request never reached libvirtd whole.
func unsent(err error) bool {
	var op *net.OpError
	return errors.Is(err, syscall.EINVAL) || errors.As(err, &op)
}

// hasCode tells whether libvirtd reported the error with this number.
func hasCode(err error, code libvirt.ErrorNumber) bool {
	var e libvirt.Error
	return errors.As(err, &e) && e.Code == uint32(code)
}
