package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// line is what carriers of a simulated session run over, in virtual time: it has
// a rate and a delay in each direction, and may be cut.
type line struct {
	rate  int // bytes per second of each carrier; 0: no limit
	delay time.Duration

	forgets bool // what is on its way when it is cut never arrives

	mu    sync.Mutex
	cut   bool
	ends  []*simConn
	alive sync.WaitGroup
}

// simConn is one end of a carrier: a reliable sequence of bytes each way.
type simConn struct {
	line  *line
	peer  *simConn
	kind  Transport
	stall bool // brings nothing more

	mu      sync.Mutex
	changed *sync.Cond
	in      []byte
	flying  []flight // to this end
	written int      // bytes on their way from here
	closed  bool
	sent    uint64
}

type flight struct {
	data []byte
	at   time.Time
}

var errSimClosed = errors.New("connection closed")

const simBuffer = 256 << 10

// pair makes a carrier.
func (l *line) pair(kind Transport) (a, b *simConn) {
	a, b = &simConn{line: l, kind: kind}, &simConn{line: l, kind: kind}
	a.peer, b.peer = b, a
	for _, c := range []*simConn{a, b} {
		c.changed = sync.NewCond(&c.mu)
		l.alive.Go(c.deliver)
	}
	l.mu.Lock()
	l.ends = append(l.ends, a, b)
	l.mu.Unlock()
	return a, b
}

func (l *line) isCut() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cut
}

func (l *line) setCut(cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = cut
	if cut && l.forgets {
		for _, c := range l.ends {
			c.mu.Lock()
			c.stall = true
			c.mu.Unlock()
		}
	}
}

// deliver brings to this end what is on its way.
func (c *simConn) deliver() {
	free := time.Now()
	for {
		c.mu.Lock()
		for len(c.flying) == 0 && !c.closed {
			c.changed.Wait()
		}
		if c.closed {
			c.mu.Unlock()
			return
		}
		f := c.flying[0]
		c.mu.Unlock()
		time.Sleep(time.Until(f.at))
		if c.line.rate > 0 {
			if now := time.Now(); free.Before(now) {
				free = now
			}
			free = free.Add(time.Duration(len(f.data)) * time.Second / time.Duration(c.line.rate))
			time.Sleep(time.Until(free))
		}
		for c.line.isCut() || c.isStalled() {
			time.Sleep(50 * time.Millisecond)
			if c.isClosed() {
				return
			}
		}
		c.mu.Lock()
		c.flying = c.flying[1:]
		c.in = append(c.in, f.data...)
		c.changed.Broadcast()
		c.mu.Unlock()
		c.peer.arrived(len(f.data))
	}
}

func (c *simConn) arrived(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.written -= n
	c.changed.Broadcast()
}

func (c *simConn) isStalled() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.stall }
func (c *simConn) isClosed() bool  { c.mu.Lock(); defer c.mu.Unlock(); return c.closed }

func (c *simConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.in) == 0 {
		if c.closed {
			return 0, errSimClosed
		}
		c.changed.Wait()
	}
	n := copy(p, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (c *simConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	for c.written+len(p) > simBuffer && !c.closed {
		c.changed.Wait()
	}
	if c.closed {
		c.mu.Unlock()
		return 0, errSimClosed
	}
	c.written += len(p)
	c.sent += uint64(len(p))
	c.mu.Unlock()
	c.peer.mu.Lock()
	defer c.peer.mu.Unlock()
	c.peer.flying = append(c.peer.flying, flight{append([]byte(nil), p...), time.Now().Add(c.line.delay)})
	c.peer.changed.Broadcast()
	return len(p), nil
}

// kill ends one end; the other hears of it unless the line is cut.
func (c *simConn) kill() {
	c.mu.Lock()
	already := c.closed
	c.closed = true
	c.changed.Broadcast()
	c.mu.Unlock()
	if !already {
		c.line.alive.Go(func() {
			time.Sleep(c.line.delay + time.Millisecond) // behind what it has sent
			if !c.line.isCut() {
				c.peer.mu.Lock()
				c.peer.closed = true
				c.peer.changed.Broadcast()
				c.peer.mu.Unlock()
			}
		})
	}
}

func (c *simConn) close(closeCode, string) { c.kill() }
func (c *simConn) explain(err error) error { return err }
func (c *simConn) transport() Transport    { return c.kind }
func (c *simConn) LocalAddr() net.Addr     { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)} }
func (c *simConn) RemoteAddr() net.Addr    { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2)} }
func (c *simConn) stats() connStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	rtt := 2 * c.line.delay
	return connStats{sent: c.sent, rtt: rtt, latestRTT: rtt, minRTT: rtt}
}

// sessionsOver returns the two ends of a session over l with n carriers.
func sessionsOver(t *testing.T, l *line, n int) (from, to *Session) {
	t.Helper()
	var running sync.WaitGroup
	config := sessionConfig{running: &running, log: slog.New(slog.DiscardHandler), peer: "peer",
		network: func() (<-chan struct{}, func()) { return nil, func() {} }}
	dialler := config
	dialler.dialled = true
	dialler.redial = func(ctx context.Context, _ Transport, number uint32) (conn, error) {
		select {
		case <-time.After(2 * l.delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if l.isCut() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if to.Err() != nil {
			return nil, errNoSession
		}
		a, b := l.pair(TCP)
		if err := to.carry(b, number); err != nil {
			b.kill()
			return nil, err
		}
		return a, nil
	}
	from, to = newSession(dialler), newSession(config)
	from.mu.Lock()
	from.link.number = uint32(n)
	from.mu.Unlock()
	for i := range n {
		a, b := l.pair(TCP)
		if err := errors.Join(from.carry(a, uint32(2*i)), to.carry(b, uint32(2*i))); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		from.Close("test done")
		to.Close("test done")
		running.Wait()
		l.mu.Lock()
		ends := l.ends
		l.mu.Unlock()
		for _, c := range ends {
			c.kill()
		}
		l.alive.Wait()
	})
	return from, to
}

// Frames arrive exactly once and in order, whatever becomes of the carriers.
func TestFramesOutliveTheirCarriers(t *testing.T) {
	for seed := range uint64(simRuns) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { framesOutliveTheirCarriers(t, seed) })
	}
}

var simRuns = 5

func framesOutliveTheirCarriers(t *testing.T, seed uint64) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{rate: 1 << 20, delay: 20 * time.Millisecond}
		from, to := sessionsOver(t, l, 4)
		const frames = 1_000_000
		var wg sync.WaitGroup
		ctx := context.Background()
		out, err := from.Open(ctx, "memory", Memory)
		if err != nil {
			t.Fatal(err)
		}
		in, err := to.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		dice := rand.New(rand.NewPCG(seed, 2))
		sizes := make([]int, frames)
		for i := range sizes {
			sizes[i] = 8 + dice.IntN(300)
			if dice.IntN(1000) == 0 {
				sizes[i] += dice.IntN(100_000)
			}
		}
		total := 0
		for _, n := range sizes {
			total += n
		}
		fill := func(b []byte, i int) []byte {
			b = b[:sizes[i]]
			for k := range b {
				b[k] = byte(i + k)
			}
			b[0], b[1], b[2], b[3] = byte(i>>24), byte(i>>16), byte(i>>8), byte(i)
			return b
		}
		wg.Go(func() {
			buf := make([]byte, 200_000)
			for i := range frames {
				if err := out.Send(ctx, fill(buf, i)); err != nil {
					t.Errorf("frame %d: %v", i, err)
					return
				}
			}
			if err := out.CloseSend(); err != nil {
				t.Error(err)
			}
		})
		done := make(chan struct{})
		wg.Go(func() {
			defer close(done)
			want := make([]byte, 200_000)
			var buf []byte
			for i := range frames {
				var err error
				if buf, err = in.Recv(ctx, buf); err != nil {
					t.Errorf("frame %d: %v", i, err)
					return
				}
				if string(buf) != string(fill(want, i)) {
					t.Errorf("frame %d is wrong", i)
					return
				}
			}
			if _, err := in.Recv(ctx, buf); err != io.EOF {
				t.Errorf("after the last frame: %v", err)
			}
		})
		// Control frames go over two carriers, and are answered.
		question, answers := simChannel(t, from, to, Control)
		asked := make(chan int, 1)
		ctl, stopCtl := context.WithCancel(ctx)
		wg.Go(func() {
			var buf []byte
			for i := 0; ; i++ {
				if err := question.Send(ctl, fmt.Append(nil, i)); err != nil {
					asked <- i
					return
				}
				got, err := question.Recv(ctl, buf)
				if err != nil && ctl.Err() == nil || err == nil && string(got) != fmt.Sprint(i) {
					t.Errorf("answer %d is %q, %v", i, got, err)
				}
				select {
				case <-ctl.Done():
				case <-time.After(7 * time.Millisecond):
				}
			}
		})
		wg.Go(func() {
			for {
				got, err := answers.Recv(ctl, nil)
				if err != nil {
					return
				}
				if err := answers.Send(ctl, got); err != nil {
					return
				}
			}
		})
		kills := 0
		for over := false; !over; {
			select {
			case <-done:
				over = true
			case <-time.After(time.Duration(dice.IntN(1500)) * time.Millisecond):
				l.mu.Lock()
				var live []*simConn
				for _, c := range l.ends {
					if !c.isClosed() {
						live = append(live, c)
					}
				}
				l.mu.Unlock()
				if len(live) == 0 {
					continue
				}
				switch dice.IntN(6) {
				case 0:
					c := live[dice.IntN(len(live))]
					c.mu.Lock()
					c.stall = true
					c.mu.Unlock()
				case 1:
					l.setCut(true)
					time.Sleep(time.Duration(dice.IntN(60_000)) * time.Millisecond)
					l.setCut(false)
				default:
					live[dice.IntN(len(live))].kill()
				}
				kills++
			}
		}
		stopCtl()
		wg.Wait()
		st := from.Stats()
		t.Logf("%d bytes, %d of them again, %d questions, %d faults", total, st.BytesResent, <-asked, kills)
	})
}
