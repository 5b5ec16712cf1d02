package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// maxStatusLength bounds the range of one BLOCK_STATUS, whose length has 32 bits.
	maxStatusLength = 1 << 30
	goodbyeTime     = time.Second
)

// ErrUnknownExport is returned when the server has no export of the name asked for.
var ErrUnknownExport = errors.New("the nbd server does not have this export")

// ErrClosed is returned when a Client is used after Close.
var ErrClosed = errors.New("nbd client is closed")

// zeros is what a server without WRITE_ZEROES is given instead.
var zeros [256 << 10]byte

// Client uses one export of an NBD server through one connection. It implements Device and
// BlockStatus. Its methods may be called concurrently: each request goes out at once, and
// replies are taken in any order. Ranges are split by the server's maximum block size.
//
// Errors name the export. They wrap the syscall.Errno that the server answered, the context's
// cause, ErrClosed, or, from the moment the connection is lost and for every call, its cause.
//
// NBD cannot withdraw a request. When a context ends, the call returns and its reply is passed
// over; only if its request is half sent or its data half received is the connection lost.
type Client struct {
	conn       net.Conn
	in         *bufio.Reader // used by the handshake, then by the reader
	export     string
	size       int64
	flags      uint16
	sizes      blockSizes
	structured bool
	allocation bool // base:allocation is selected, as allocationID
	contextID  uint32

	sending chan struct{} // holds a token while a request is written
	reader  sync.WaitGroup

	mu      sync.Mutex
	pending map[uint64]*call
	cookie  uint64 // of the latest request
	err     error  // why the connection is of no further use
}

var _ interface {
	Device
	blockStatuser
	blockSizer
	multiConner
} = (*Client)(nil)

// NewClient agrees with the server at the other end of conn to use export. ctx bounds this
// handshake only. conn is the Client's from here on, and closed if NewClient returns an error.
func NewClient(ctx context.Context, conn net.Conn, export string) (*Client, error) {
	c := newClient(conn, export)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := c.negotiate()
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("open nbd export %q: %w", export, err)
	}
	c.reader.Go(c.readReplies)
	return c, nil
}

func newClient(conn net.Conn, export string) *Client {
	return &Client{
		conn:    conn,
		in:      bufio.NewReaderSize(conn, 64<<10),
		export:  export,
		sizes:   defaultBlockSizes,
		sending: make(chan struct{}, 1),
		pending: make(map[uint64]*call),
	}
}

// Size gives the export's size in bytes.
func (c *Client) Size() int64 { return c.size }

// ReadOnly tells whether the server refuses to change the export.
func (c *Client) ReadOnly() bool { return c.flags&flagReadOnly != 0 }

// MultiConn tells whether a flush on one connection also covers writes on others.
func (c *Client) MultiConn() bool { return c.flags&flagMultiConn != 0 }

// HasBlockStatus tells whether BlockStatus asks the server; else it knows nothing of holes.
func (c *Client) HasBlockStatus() bool { return c.allocation }

// BlockSizes gives the server's bounds of requests in bytes. Offsets and lengths must be
// multiples of min; the Client itself keeps to max.
func (c *Client) BlockSizes() (min, preferred, max uint32) {
	return c.sizes.min, c.sizes.preferred, c.sizes.max
}

// ReadAt fills p from offset off.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.split(off, int64(len(p)), int64(c.sizes.max), cmdRead, func(from, n int64) error {
		_, err := c.do(ctx, &call{cmd: cmdRead, offset: from, length: n, into: p[from-off:][:n]})
		return err
	})
}

// WriteAt writes p at offset off; with fua, durably before it returns.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	flags, flush := c.durably(fua)
	err := c.split(off, int64(len(p)), int64(c.sizes.max), cmdWrite, func(from, n int64) error {
		_, err := c.do(ctx, &call{cmd: cmdWrite, flags: flags, offset: from, length: n, data: p[from-off:][:n]})
		return err
	})
	if err != nil || !flush {
		return err
	}
	return c.Flush(ctx)
}

// Zero makes n bytes at offset off read as zeros. Without f.NoHole the server may, and a
// server that can will, leave a hole. A server that does not know the request is sent zeros.
func (c *Client) Zero(ctx context.Context, off, n int64, f ZeroFlags) error {
	flags, flush := c.durably(f.FUA)
	kind := call{cmd: cmdWriteZeroes, flags: flags}
	piece := int64(c.sizes.max)
	if c.flags&flagWriteZeroes == 0 {
		kind.cmd = cmdWrite
		piece = min(piece, int64(len(zeros)))
	} else if f.NoHole {
		kind.flags |= cmdFlagNoHole
	}
	err := c.split(off, n, piece, cmdWriteZeroes, func(from, n int64) error {
		request := kind
		request.offset, request.length = from, n
		if request.cmd == cmdWrite {
			request.data = zeros[:n]
		}
		_, err := c.do(ctx, &request)
		return err
	})
	if err != nil || !flush {
		return err
	}
	return c.Flush(ctx)
}

// Trim says that the content of n bytes at offset off is no longer wanted. It is a hint: with
// a server that does not take it, nothing happens.
func (c *Client) Trim(ctx context.Context, off, n int64, fua bool) error {
	flags, flush := c.durably(fua)
	err := c.split(off, n, int64(c.sizes.max), cmdTrim, func(from, n int64) error {
		if c.flags&flagTrim == 0 {
			return nil
		}
		_, err := c.do(ctx, &call{cmd: cmdTrim, flags: flags, offset: from, length: n})
		return err
	})
	if err != nil || !flush || c.flags&flagTrim == 0 {
		return err
	}
	return c.Flush(ctx)
}

// Flush makes durable every write, zeroing and trim that returned before. It returns an error
// if the server does not offer that.
func (c *Client) Flush(ctx context.Context) error {
	if c.flags&flagFlush == 0 {
		return fmt.Errorf("nbd export %q: flush: the server does not offer it: %w", c.export, syscall.ENOTSUP)
	}
	if _, err := c.do(ctx, &call{cmd: cmdFlush}); err != nil {
		return fmt.Errorf("nbd export %q: flush: %w", c.export, err)
	}
	return nil
}

// BlockStatus tells what is allocated, in consecutive extents that begin at off: at least one,
// none beyond off+n. They may end earlier; ask again from there.
func (c *Client) BlockStatus(ctx context.Context, off, n int64) ([]Extent, error) {
	var extents []Extent
	length := min(n, maxStatusLength)
	err := c.split(off, length, maxStatusLength, cmdBlockStatus, func(from, n int64) (err error) {
		if !c.allocation {
			extents = []Extent{{Offset: from, Length: n}}
			return nil
		}
		extents, err = c.do(ctx, &call{cmd: cmdBlockStatus, offset: from, length: n})
		return err
	})
	return extents, err
}

// Close says goodbye, closes the connection and waits until it is no longer used. Calls in
// progress return ErrClosed.
func (c *Client) Close() error {
	c.lose(ErrClosed)
	select {
	case c.sending <- struct{}{}:
		c.conn.SetWriteDeadline(time.Now().Add(goodbyeTime))
		c.conn.Write(request{cmd: cmdDisc}.append(nil))
		<-c.sending
	default: // a request is half written: nothing can follow it
	}
	c.conn.Close()
	c.reader.Wait()
	return nil
}

// durably gives the flag for a request that must be durable, or that a flush must follow.
func (c *Client) durably(fua bool) (flag uint16, flush bool) {
	switch {
	case !fua:
		return 0, false
	case c.flags&flagFUA != 0:
		return cmdFlagFUA, false
	}
	return 0, true
}

// split checks a range and does it in pieces of at most piece bytes, in order. Its errors
// name the export, what was to be done and where.
func (c *Client) split(off, n, piece int64, cmd command, do func(off, n int64) error) error {
	err := c.checkRange(off, n, cmd)
	for at := off; err == nil && at < off+n; at += piece {
		err = do(at, min(piece, off+n-at))
	}
	if err != nil {
		return fmt.Errorf("nbd export %q: %s %d bytes at %d: %w", c.export, cmd, n, off, err)
	}
	return nil
}

func (c *Client) checkRange(off, n int64, cmd command) error {
	block := int64(c.sizes.min)
	switch {
	case off < 0 || n < 0 || off > c.size || n > c.size-off:
		return fmt.Errorf("beyond its %d bytes: %w", c.size, syscall.EINVAL)
	case off%block != 0 || n%block != 0:
		return fmt.Errorf("not whole blocks of %d bytes: %w", block, syscall.EINVAL)
	case c.ReadOnly() && cmd.writes():
		return fmt.Errorf("it is read-only: %w", syscall.EPERM)
	}
	return nil
}

// call is a request and what becomes of it.
type call struct {
	cmd    command
	flags  uint16
	offset int64
	length int64
	data   []byte        // to send after the request
	done   chan struct{} // closed when the rest holds the outcome

	// Of the reader, until done.
	extents []Extent
	err     error
	filled  coverage

	// Under the client's mu.
	into    []byte // where a read's data goes; nil once the caller has left
	filling bool   // the reader is writing to into
}

// do sends a request and waits for its reply.
func (c *Client) do(ctx context.Context, q *call) ([]Extent, error) {
	q.done = make(chan struct{})
	if err := c.send(ctx, q); err != nil {
		return nil, err
	}
	select {
	case <-q.done:
		return q.extents, q.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	q.into = nil
	filling := q.filling
	c.mu.Unlock()
	if filling {
		// The caller's buffer is being written: it is not its again before that ends.
		c.fail(fmt.Errorf("connection lost: a read was given up half received: %w", context.Cause(ctx)))
		<-q.done
	}
	return nil, context.Cause(ctx)
}

// send registers a request and writes it.
func (c *Client) send(ctx context.Context, q *call) error {
	select {
	case c.sending <- struct{}{}:
		defer func() { <-c.sending }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	c.cookie++
	r := request{flags: q.flags, cmd: q.cmd, cookie: c.cookie, offset: uint64(q.offset), length: uint32(q.length)}
	c.pending[r.cookie] = q
	c.mu.Unlock()

	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	message := net.Buffers{r.append(make([]byte, 0, requestSize))}
	if len(q.data) > 0 {
		message = append(message, q.data)
	}
	_, err := message.WriteTo(c.conn)
	if !stop() {
		<-interrupted
		c.conn.SetWriteDeadline(time.Time{})
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("a request was given up half sent: %w", context.Cause(ctx))
	}
	err = c.fail(fmt.Errorf("connection lost: send request: %w", err))
	<-q.done // as every call in flight
	return err
}

// fail makes the connection unusable and gives the first cause of that.
func (c *Client) fail(cause error) error {
	cause = c.lose(cause)
	c.conn.Close()
	return cause
}

// lose notes why calls fail from now on; the first cause stays, and is returned.
func (c *Client) lose(cause error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = cause
	}
	return c.err
}
