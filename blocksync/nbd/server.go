package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	maxInFlight      = 16       // requests of one connection being served; QEMU sends no more
	maxInFlightBytes = 64 << 20 // data that they may hold
	handshakeTime    = 30 * time.Second
	acceptPause      = 100 * time.Millisecond
)

// Server serves exports to NBD clients. Its fields are set before Serve and left alone after.
type Server struct {
	// Exports by name. A client that names none gets the one named "", if there is one.
	Exports map[string]Export
	// Log receives failed connections and errors of devices; nil means slog.Default().
	Log *slog.Logger

	mu        sync.Mutex
	closed    bool
	listeners map[net.Listener]struct{}
	sessions  map[*session]struct{}
	serving   sync.WaitGroup // calls of Serve; added to under mu, before closed
}

// Export is a device as clients see it.
type Export struct {
	Device   Device
	ReadOnly bool
}

// Serve answers connections of l until ctx ends or Close is called, and waits for them. It
// closes l. It returns nil after Close, the cause of ctx's end after that, which cuts every
// connection, and else what kept it from accepting.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer l.Close()
	if err := s.checkExports(); err != nil {
		return err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	if s.listeners == nil {
		s.listeners = make(map[net.Listener]struct{})
	}
	s.listeners[l] = struct{}{}
	s.serving.Add(1)
	s.mu.Unlock()
	defer s.serving.Done()

	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var connections sync.WaitGroup
	err := s.accept(ctx, l, &connections)
	connections.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case s.closed:
		return nil
	}
	return fmt.Errorf("accept nbd connection on %s: %w", l.Addr(), err)
}

// Close stops accepting, lets every connection finish the requests it has in progress, closes
// it, and returns when Serve has nothing left to do. A device that blocks or a client that does
// not read makes it wait; ending Serve's context cuts that short.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	for c := range s.sessions {
		c.drain()
	}
	s.mu.Unlock()
	s.serving.Wait()
}

func (s *Server) accept(ctx context.Context, l net.Listener, connections *sync.WaitGroup) error {
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			connections.Go(func() { s.serveConn(ctx, conn) })
		case isPassing(err) && ctx.Err() == nil:
			// Losing a mirror that runs because a new connection found no descriptor
			// would be worse than a late answer.
			s.log().Warn("nbd accept failed, trying again", "address", l.Addr().String(), "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
		default:
			return err
		}
	}
}

func isPassing(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

func (s *Server) serveConn(ctx context.Context, conn net.Conn) {
	c := newSession(ctx, s, conn)
	defer c.end(nil)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	if s.sessions == nil {
		s.sessions = make(map[*session]struct{})
	}
	s.sessions[c] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.sessions, c)
		s.mu.Unlock()
	}()

	err := c.run()
	switch {
	case err == nil || errors.Is(err, errClientLeft) || ctx.Err() != nil:
		s.log().Debug("nbd connection ended", "export", c.name, "err", err)
	default:
		s.log().Warn("nbd connection failed", "export", c.name, "err", err)
	}
}

func (s *Server) log() *slog.Logger {
	if s.Log != nil {
		return s.Log
	}
	return slog.Default()
}

func (s *Server) checkExports() error {
	for name, e := range s.Exports {
		if err := checkName(name); err != nil {
			return fmt.Errorf("nbd export: %w", err)
		}
		sizes, size := e.blockSizes(), e.Device.Size()
		if err := sizes.check(); err != nil {
			return fmt.Errorf("nbd export %q: %w", name, err)
		}
		if sizes.max > maxData {
			return fmt.Errorf("nbd export %q: maximum block size %d is above %d", name, sizes.max, maxData)
		}
		if size < 0 || size%int64(sizes.min) != 0 {
			return fmt.Errorf("nbd export %q: size %d is not a multiple of the minimum block size %d", name, size, sizes.min)
		}
	}
	return nil
}

func (e Export) blockSizes() blockSizes {
	d, ok := e.Device.(blockSizer)
	if !ok {
		return defaultBlockSizes
	}
	var s blockSizes
	s.min, s.preferred, s.max = d.BlockSizes()
	return s
}

func (e Export) flags(structured bool) uint16 {
	flags := uint16(flagHasFlags | flagFlush | flagFUA | flagCache)
	if e.ReadOnly {
		flags |= flagReadOnly
	} else {
		flags |= flagTrim | flagWriteZeroes
	}
	if structured {
		flags |= flagDF
	}
	if d, ok := e.Device.(multiConner); ok && d.MultiConn() {
		flags |= flagMultiConn
	}
	return flags
}

// errClientLeft is returned when a client closes its connection without a goodbye, between
// two messages.
var errClientLeft = errors.New("the client closed the connection")

// session is one connection of a server.
type session struct {
	server *Server
	conn   net.Conn
	in     *bufio.Reader
	ctx    context.Context // ends when the connection is of no further use
	cancel context.CancelCauseFunc

	name       string // of the export being served
	export     Export
	sizes      blockSizes
	structured bool
	allocation bool // base:allocation is selected
	noZeroes   bool

	sending sync.Mutex // held while a message is written

	mu       sync.Mutex
	draining bool
}

func newSession(ctx context.Context, s *Server, conn net.Conn) *session {
	c := &session{server: s, conn: conn, in: bufio.NewReaderSize(conn, 64<<10)}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	context.AfterFunc(c.ctx, func() { conn.Close() })
	return c
}

// end cuts the connection: requests in progress are cancelled.
func (c *session) end(cause error) {
	c.cancel(cause)
	c.conn.Close()
}

// drain makes the session read no further request.
func (c *session) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	c.conn.SetReadDeadline(time.Unix(1, 0))
}

func (c *session) isDraining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining
}

func (c *session) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.draining {
		c.conn.SetReadDeadline(t)
	}
}

func (c *session) run() error {
	c.setReadDeadline(time.Now().Add(handshakeTime))
	chosen, err := c.negotiate()
	if err == nil && chosen {
		c.setReadDeadline(time.Time{})
		err = c.transmit()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && c.isDraining() {
		return nil
	}
	return err
}

// read fills b with the beginning of a message.
func (c *session) read(b []byte) error {
	_, err := io.ReadFull(c.in, b)
	if err == io.EOF {
		return errClientLeft
	}
	return err
}

// send writes one message, whose parts it may change. An error ends the session.
func (c *session) send(parts ...[]byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	message := net.Buffers(parts)
	if _, err := message.WriteTo(c.conn); err != nil {
		err = fmt.Errorf("write to client: %w", err)
		c.end(err)
		return err
	}
	return nil
}
