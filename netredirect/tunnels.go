package netredirect

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/wanmig/wanmig/netredirect/encap"
)

// Packets is a connection that carries IP packets whole, unordered and not
// reliably: QUIC datagrams.
type Packets interface {
	Send(packet []byte) error
	Receive(ctx context.Context) ([]byte, error)
	MaxSize() int
	Done() <-chan struct{}
	Close(reason string)
}

// ErrTooBig is what Packets.Send returns for a packet that the connection can't
// carry whole.
var ErrTooBig = encap.ErrTooBig

// carried is a tunnel that this program carries packets for. Redirects to the
// same site share it.
type carried struct {
	gate *encap.Gate
	user interface {
		Stats() encap.Stats
		SetMTU(int) error
		Close() error
	}
	dialing bool
	stop    context.CancelFunc // of the dialing
	work    sync.WaitGroup
	attach  func(Packets)
	mu      sync.Mutex
	packets Packets // the connection of a QUIC tunnel now, or nil
	closed  bool
}

// carry opens a tunnel of a kind that the kernel does not carry, unless it is
// open already.
func (m *Manager) carry(r *record) error {
	if r.Kind == IPIP || m.tunnels[r.Device] != nil {
		return nil
	}
	t := &carried{gate: encap.NewGate(), stop: func() {}}
	c := encap.Config{Name: r.Device, MTU: r.MTU, Local: r.Local, Remote: r.Remote, Gate: t.gate, Log: m.Log.With("device", r.Device)}
	switch r.Kind {
	case IPIPUser:
		user, err := encap.OpenIPIP(c)
		if err != nil {
			return err
		}
		t.user = user
	case QUIC:
		user, err := encap.OpenDatagrams(c)
		if err != nil {
			return err
		}
		t.user = user
		t.attach = func(p Packets) {
			if p == nil {
				user.Attach(nil)
				return
			}
			user.Attach(p)
		}
	default:
		return fmt.Errorf("tunnel kind %q is not carried by the agent", r.Kind)
	}
	m.tunnels[r.Device] = t
	return nil
}

// dial begins to keep the QUIC tunnel of a redirect connected, from its source.
// Called with the lock held.
func (m *Manager) dial(r *record) {
	t := m.tunnels[r.Device]
	if r.Kind != QUIC || r.Role != Source || t == nil || t.dialing {
		return
	}
	ctx, stop := context.WithCancel(m.ctx)
	t.dialing, t.stop = true, stop
	t.work.Go(func() { m.keepDialed(ctx, t, r.Site, r.Peer) })
}

// keepDialed keeps a QUIC tunnel connected, for as long as it stands.
func (m *Manager) keepDialed(ctx context.Context, t *carried, site, peer string) {
	const soonest, latest = 200 * time.Millisecond, 15 * time.Second
	pause := soonest
	for ctx.Err() == nil {
		if p := t.connection(); p != nil { // the other end has dialled
			select {
			case <-p.Done():
			case <-ctx.Done():
			}
			continue
		}
		begun := time.Now()
		p, err := m.Dial(ctx, site, peer)
		if err == nil {
			t.use(p)
			select {
			case <-p.Done():
			case <-ctx.Done():
			}
			t.lose(p)
			p.Close("the tunnel is removed")
		} else if ctx.Err() == nil {
			m.Log.Warn("QUIC tunnel not connected, trying again", "site", site, "error", err)
		}
		if time.Since(begun) > latest {
			pause = soonest
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause + rand.N(pause)): // both ends may dial
			pause = min(2*pause, latest)
		}
	}
}

func (t *carried) use(p Packets) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		p.Close("the tunnel is removed")
		return
	}
	if t.packets != nil {
		t.packets.Close("there is a newer connection")
	}
	t.packets = p
	t.attach(p)
}

func (t *carried) lose(p Packets) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.packets == p && !t.closed {
		t.packets = nil
		t.attach(nil)
	}
}

// connection is that of a QUIC tunnel now, or nil.
func (t *carried) connection() Packets {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.packets
}

// close removes the device. What dials ends by itself, later: work.
func (t *carried) close() error {
	t.stop()
	t.mu.Lock()
	p := t.packets
	t.closed, t.packets = true, nil
	t.mu.Unlock()
	if p != nil {
		t.attach(nil)
		p.Close("the tunnel is removed")
	}
	return t.user.Close()
}

// Attach gives the connection of a peer that has dialled to its QUIC tunnel
// here. It is refused where no redirect of that peer uses one.
func (m *Manager) Attach(peer string, p Packets) {
	m.mu.Lock()
	t := m.tunnels[deviceName(peer, QUIC)]
	m.mu.Unlock()
	if t == nil {
		p.Close("no redirect here uses a QUIC tunnel to you")
		return
	}
	t.use(p)
	go func() { // ends with the connection, which the tunnel's end closes
		<-p.Done()
		t.lose(p)
	}()
}

// openGates lets the packets of every redirect through the tunnels that this
// program carries. Called with the lock held.
func (m *Manager) openGates() {
	here, away := map[string][]netip.Addr{}, map[string][]netip.Addr{}
	for _, x := range m.redirects {
		if !x.tunnelled() {
			continue
		}
		if x.Role == Destination {
			here[x.Device] = append(here[x.Device], x.addresses()...)
		} else {
			away[x.Device] = append(away[x.Device], x.addresses()...)
		}
	}
	for device, t := range m.tunnels {
		t.gate.Set(append(here[device], probeAddresses...), append(away[device], probeAddresses...))
	}
}

// uncarry closes a tunnel that no redirect uses any more. Called with the lock held.
func (m *Manager) uncarry(device string) error {
	for _, x := range m.redirects {
		if x.Device == device && x.tunnelled() {
			return nil
		}
	}
	t := m.tunnels[device]
	if t == nil {
		return nil
	}
	delete(m.tunnels, device)
	m.work.Go(t.work.Wait)
	return t.close()
}

// errNoConnection is returned when a QUIC tunnel is not connected in time.
var errNoConnection = errors.New("the QUIC connection of the tunnel was not made in time: check that UDP passes to the site's port")

// awaitConnection waits until a QUIC tunnel is connected and knows its path's
// MTU, and tells the longest packet.
func (t *carried) awaitConnection(ctx context.Context, enough int) (int, error) {
	const discovery = 3 * time.Second // quic-go's path MTU discovery takes some 20 round trips
	var since time.Time
	for {
		if p := t.connection(); p != nil {
			if since.IsZero() {
				since = time.Now()
			}
			if n := p.MaxSize(); n >= enough || time.Since(since) > discovery {
				return n, nil
			}
		}
		select {
		case <-ctx.Done():
			return 0, errNoConnection
		case <-time.After(20 * time.Millisecond):
		}
	}
}
