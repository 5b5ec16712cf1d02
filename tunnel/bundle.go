package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// bundle is the set of connections, to one agent whose identity was verified, that
// carry Packets together.
type bundle struct {
	peer    ID
	first   *quic.Conn
	most    int             // carriers
	running *sync.WaitGroup // the endpoint's, which waits for it

	ctx    context.Context // ends with the bundle, and has the reason
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	ended    bool
	carriers []*quic.Conn
}

func newBundle(first *quic.Conn, peer ID, most int, running *sync.WaitGroup) *bundle {
	b := &bundle{peer: peer, first: first, most: most, running: running, carriers: []*quic.Conn{first}}
	b.ctx, b.cancel = context.WithCancelCause(context.Background())
	return b
}

// run runs f, for which the endpoint waits, unless the bundle has ended.
func (b *bundle) run(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ended {
		b.running.Go(f)
	}
}

// join adds a carrier and returns its number. b.mu must be held.
func (b *bundle) join(conn *quic.Conn) (number int, err error) {
	if b.ended {
		return 0, b.Err()
	}
	if len(b.carriers) == b.most {
		return 0, errTooMany
	}
	b.carriers = append(b.carriers, conn)
	return len(b.carriers), nil
}

// farewell is how long after a reset of one carrier the peer's reason may still
// come by another: a peer that has closed a connection and forgotten it answers
// like one that was restarted.
const farewell = 250 * time.Millisecond

// watch ends the bundle with a connection of it.
func (b *bundle) watch(conn *quic.Conn, number int) {
	b.run(func() {
		<-conn.Context().Done()
		var reset *quic.StatelessResetError
		if errors.As(context.Cause(conn.Context()), &reset) {
			select {
			case <-b.ctx.Done():
			case <-time.After(farewell):
			}
		}
		err := b.explain(context.Cause(conn.Context()))
		code := closeLost
		if errors.Is(err, ErrClosedByPeer) {
			code = closeReason
		} else if number > 1 {
			err = fmt.Errorf("%w (carrier %d)", err, number)
		}
		b.end(err, code, printable(err.Error()))
	})
}

// Peer returns the peer's verified ID.
func (b *bundle) Peer() ID { return b.peer }

// LocalAddr returns the address from which this host sends to the peer: of a
// socket that is bound to all of them, the one that the kernel's routes choose.
func (b *bundle) LocalAddr() net.Addr { return localAddr(b.first) }

// RemoteAddr returns the peer's address.
func (b *bundle) RemoteAddr() net.Addr { return b.first.RemoteAddr() }

// Stats returns the counters.
func (b *bundle) Stats() Stats {
	var sum Stats
	for _, conn := range b.all() {
		st := conn.ConnectionStats()
		sum.BytesSent += st.BytesSent
		sum.BytesReceived += st.BytesReceived
		sum.PacketsLost += st.PacketsLost
		if conn == b.first {
			sum.RTT, sum.MinRTT = st.SmoothedRTT, st.MinRTT
		}
	}
	return sum
}

func (b *bundle) all() []*quic.Conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.carriers)
}

// Close ends the connection for packets, and tells the peer the reason, of which
// it gets at most 256 bytes.
func (b *bundle) Close(reason string) {
	reason = printable(reason)
	b.end(fmt.Errorf("%w here: %s", ErrClosed, reason), closeReason, reason)
}

// end closes every connection, the first time that it is called.
func (b *bundle) end(cause error, code quic.ApplicationErrorCode, reason string) {
	b.mu.Lock()
	if b.ended {
		b.mu.Unlock()
		return
	}
	b.ended = true
	b.cancel(cause)
	b.mu.Unlock()
	for _, conn := range b.carriers { // none is added any more
		conn.CloseWithError(code, reason)
	}
}

// Done is closed at the end.
func (b *bundle) Done() <-chan struct{} { return b.ctx.Done() }

// Err returns nil before the end, and then its reason: ErrClosed, ErrClosedByPeer
// or ErrLost, with the details.
func (b *bundle) Err() error { return context.Cause(b.ctx) }

// explain turns what a connection returns into this package's errors.
func (b *bundle) explain(err error) error {
	if cause := b.Err(); cause != nil {
		return cause
	}
	var closed *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.As(err, &closed) && closed.Remote && closed.ErrorCode == closeLost:
		return fmt.Errorf("%w: the agent at %s reports: %s", ErrLost, b.RemoteAddr(), printable(closed.ErrorMessage))
	case errors.As(err, &closed) && closed.Remote:
		return fmt.Errorf("%w: %s", ErrClosedByPeer, printable(closed.ErrorMessage))
	case errors.As(err, &closed):
		return fmt.Errorf("%w here: %s", ErrClosed, closed.ErrorMessage)
	case errors.As(err, &idle):
		return fmt.Errorf("%w: no answer from %s for %v: link down or agent gone", ErrLost, b.RemoteAddr(), IdleTimeout)
	case errors.As(err, new(*quic.StatelessResetError)):
		return fmt.Errorf("%w: the agent at %s was restarted", ErrLost, b.RemoteAddr())
	case errors.Is(err, quic.ErrTransportClosed):
		return fmt.Errorf("%w here with its endpoint", ErrClosed)
	case errors.Is(err, net.ErrClosed): // every other end of a QUIC connection
		return fmt.Errorf("%w: connection to %s failed: %w", ErrLost, b.RemoteAddr(), err)
	}
	return err
}
