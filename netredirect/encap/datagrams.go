package encap

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
)

// ErrTooBig is returned by Datagrams.Send when the packet does not fit a datagram of the connection.
var ErrTooBig = errors.New("packet does not fit a datagram")

// Datagrams is an unreliable connection to the peer that keeps packets whole. Send does not keep the packet, and returns
// soon after the connection is closed; Receive gives away what it returns.
type Datagrams interface {
	Send(packet []byte) error
	Receive(ctx context.Context) ([]byte, error)
}

// DatagramTunnel is a tunnel whose packets are datagrams of a connection, which may be replaced.
type DatagramTunnel struct {
	*Tunnel
	link *datagrams
}

// OpenDatagrams makes a tunnel that has no connection yet. It needs root. c.Local and c.Remote are only those of probes.
func OpenDatagrams(c Config) (*DatagramTunnel, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	t, err := open(c)
	if err != nil {
		return nil, err
	}
	link := &datagrams{t: t}
	t.start(link)
	return &DatagramTunnel{Tunnel: t, link: link}, nil
}

// Attach makes d the connection, or none if it is nil: packets are then dropped and counted as unsent. It is the caller
// who closes the connection that was attached before, and the last one before the tunnel.
func (t *DatagramTunnel) Attach(d Datagrams) { t.link.attach(d) }

// datagrams is the carrier of a DatagramTunnel.
type datagrams struct {
	t       *Tunnel
	current atomic.Pointer[attachment]

	mu     sync.Mutex // held while current is replaced
	closed bool
}

type attachment struct {
	Datagrams
	cancel context.CancelFunc
}

func (l *datagrams) attach(d Datagrams) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.detach()
	if d == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := &attachment{d, cancel}
	l.current.Store(a)
	l.t.running.Go(func() { l.receive(ctx, a) })
}

// detach is called with the lock held.
func (l *datagrams) detach() {
	if old := l.current.Swap(nil); old != nil {
		old.cancel()
	}
}

func (l *datagrams) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.detach()
	return nil
}

func (l *datagrams) send(packets []packet) {
	a := l.current.Load()
	for _, p := range packets {
		if a == nil {
			l.t.counters.drop(unsent)
			continue
		}
		switch err := a.Send(p.data); {
		case err == nil:
			l.t.counters.sent.add(1, len(p.data))
		case errors.Is(err, ErrTooBig):
			l.t.counters.drop(tooBig)
		default:
			l.t.counters.drop(unsent)
		}
	}
}

// receive takes packets from a connection to the device.
func (l *datagrams) receive(ctx context.Context, a *attachment) {
	defer a.cancel()
	w := &writer{t: l.t}
	buf := buffers(1)[0]
	for {
		b, err := a.Receive(ctx)
		if err != nil {
			if l.current.CompareAndSwap(a, nil) {
				l.t.log.Info("the tunnel has lost its connection", "err", err)
			}
			return
		}
		if len(b) > maxPacket {
			l.t.counters.drop(malformed)
			continue
		}
		end := headroom + copy(buf[headroom:], b)
		w.take(buf, headroom, end, notECT)
		w.flush()
	}
}
