package tunnel

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"
)

// monologue is one direction of a channel: messages of 8 to most bytes, which their numbers
// decide, and a pause behind each.
type monologue struct {
	seed     uint64
	messages int
	most     int
	pause    time.Duration
}

// message returns one of the messages: its number and random bytes.
func (m monologue) message(number int) []byte {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], m.seed)
	binary.BigEndian.PutUint64(seed[8:], uint64(number))
	dice := rand.NewChaCha8(seed)
	b := make([]byte, 8+dice.Uint64()%uint64(m.most-7))
	dice.Read(b[8:])
	binary.BigEndian.PutUint64(b, uint64(number))
	return b
}

func (m monologue) size() (sum int) {
	for i := range m.messages {
		sum += len(m.message(i))
	}
	return sum
}

func (m monologue) send(ctx context.Context, c *Channel) error {
	for i := range m.messages {
		if err := c.Send(ctx, m.message(i)); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
		time.Sleep(m.pause)
	}
	return c.CloseSend()
}

// receive takes all messages exactly once, in their order unless the channel is
// unordered, and the end behind them.
func (m monologue) receive(ctx context.Context, c *Channel, got func(bytes int)) error {
	seen := make([]bool, m.messages)
	var b []byte
	for i := range m.messages {
		var err error
		if b, err = c.Recv(ctx, b); err != nil {
			return fmt.Errorf("instead of message %d: %w", i, err)
		}
		if len(b) < 8 {
			return fmt.Errorf("message %d has %d bytes", i, len(b))
		}
		number := binary.BigEndian.Uint64(b)
		switch {
		case number >= uint64(m.messages):
			return fmt.Errorf("message %d has number %d", i, number)
		case !c.in.unordered && number != uint64(i):
			return fmt.Errorf("message %d comes instead of %d", number, i)
		case seen[number]:
			return fmt.Errorf("message %d comes again", number)
		case !bytes.Equal(b, m.message(int(number))):
			return fmt.Errorf("message %d is wrong", number)
		}
		seen[number] = true
		got(len(b))
	}
	if _, err := c.Recv(ctx, b); err != io.EOF {
		return fmt.Errorf("after the last message: %w", err)
	}
	return nil
}

// dialogue is a channel with a monologue each way.
type dialogue struct {
	header      channelHeader
	there, back monologue
}

// dialogues are channels of all priorities, of which some are unordered.
func dialogues(opener uint64) []dialogue {
	var all []dialogue
	for p := Control; p <= Background; p++ {
		for _, unordered := range []bool{false, true} {
			m := monologue{messages: 30, most: 40_000}
			if unordered {
				m = monologue{messages: 75, most: MaxUnordered}
			}
			if p == Control {
				m = monologue{messages: 150, most: 1000, pause: 20 * time.Millisecond}
			}
			d := dialogue{
				header: channelHeader{name: fmt.Sprintf("%d/%d/%v", opener, p, unordered), priority: p, unordered: unordered},
				there:  m,
				back:   m,
			}
			d.there.seed = opener<<32 | uint64(len(all))<<1
			d.back.seed = d.there.seed | 1
			all = append(all, d)
		}
	}
	return all
}

// converse opens channels from both sides and has both speak on all of them, until
// everything was heard. When half was, it calls middle. It returns how many bytes
// either side has said at least.
func converse(t *testing.T, from, to *Session, middle func()) (said int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var speaking sync.WaitGroup
	var heard atomic.Int64
	half := make(chan struct{})
	topics := [][]dialogue{dialogues(0), dialogues(1)}
	var fromSaid, toSaid int
	for i := range topics[0] {
		fromSaid += topics[0][i].there.size() + topics[1][i].back.size()
		toSaid += topics[0][i].back.size() + topics[1][i].there.size()
	}
	total := fromSaid + toSaid
	got := func(n int) {
		if sum := heard.Add(int64(n)); sum >= int64(total/2) && sum-int64(n) < int64(total/2) {
			close(half)
		}
	}
	speak := func(c *Channel, out, in monologue) {
		speaking.Go(func() {
			if err := out.send(ctx, c); err != nil {
				t.Errorf("%s: %v", c.Name(), err)
				cancel()
			}
		})
		speaking.Go(func() {
			if err := in.receive(ctx, c, got); err != nil {
				t.Errorf("%s: %v", c.Name(), err)
				cancel()
			}
		})
	}
	for i, ends := range [][2]*Session{{from, to}, {to, from}} {
		byName := make(map[string]dialogue)
		for _, d := range topics[i] {
			byName[d.header.name] = d
			c, err := ends[0].open(ctx, d.header)
			if err != nil {
				t.Fatal(err)
			}
			speak(c, d.there, d.back)
		}
		speaking.Go(func() {
			for range topics[i] {
				c, err := ends[1].Accept(ctx)
				if err != nil {
					t.Error(err)
					cancel()
					return
				}
				d, ok := byName[c.Name()]
				if !ok || c.in.unordered != d.header.unordered || c.out.priority != d.header.priority {
					t.Errorf("a channel %q, unordered %v, priority %d", c.Name(), c.in.unordered, c.out.priority)
					cancel()
					return
				}
				delete(byName, c.Name())
				speak(c, d.back, d.there)
			}
		})
	}
	select {
	case <-half:
		middle()
	case <-ctx.Done():
	}
	speaking.Wait()
	return min(fromSaid, toSaid)
}

// fault is what happens to the packets of a session.
type fault struct {
	fate   func(packet simnet.Packet, pass func(simnet.Packet)) // from the handshake on
	middle func(t *testing.T, w *wan, from, to *Session)        // when half of the conversation was heard
	copied float64                                              // how much of what arrives is there a second time
	took   time.Duration                                        // the longest that the conversation may take
}

// mostResent is how much a side may send again: what a session has on its way over
// this link, flightTrips round trips at its rate.
const mostResent = flightTrips * 250_000

// uncounted is what carriers send when their session counts them no more: the words
// with which QUIC ends.
const uncounted = 8 << 10

// converseThrough has a session with several carriers meet a fault.
func converseThrough(t *testing.T, f fault) {
	t.Helper()
	w := slowWAN()
	w.queue, w.fate = 250_000, f.fate
	overWAN(t, w, func(t *testing.T, from, to *Session) {
		var dialling sync.WaitGroup
		for range 3 {
			dialling.Go(func() {
				if err := from.addCarrier(QUIC); err != nil {
					t.Logf("no further carrier: %v", err)
				}
			})
		}
		dialling.Wait()
		if n := len(from.Link().Carriers); n < 2 {
			t.Errorf("%d carriers", n)
		}
		began := time.Now()
		said := converse(t, from, to, func() {
			if f.middle != nil {
				f.middle(t, w, from, to)
			}
		})
		took := time.Since(began)
		if took > f.took {
			t.Errorf("the conversation took %v", took)
		}
		for _, way := range []struct{ from, to *Session }{{from, to}, {to, from}} {
			s := way.from
			if s.Err() != nil || !s.Link().LostSince.IsZero() {
				t.Errorf("the session afterwards: %v, %+v", s.Err(), s.Link())
			}
			st := s.Stats()
			if st.BytesSent < uint64(said) || float64(st.BytesSent) > 1.5*float64(said) {
				t.Errorf("%d bytes were sent to say %d", st.BytesSent, said)
			}
			most := (1+f.copied)*float64(st.BytesSent) + uncounted
			if received := way.to.Stats().BytesReceived; received < uint64(said) || float64(received) > most {
				t.Errorf("%d bytes were received of %d", received, st.BytesSent)
			}
			if st.BytesResent > mostResent {
				t.Errorf("%d bytes were sent again, to say %d", st.BytesResent, said)
			}
			if st.MinRTT < 2*w.delay || st.MinRTT > 3*w.delay || st.RTT < st.MinRTT {
				t.Errorf("round trips of %v, at least %v", st.RTT, st.MinRTT)
			}
			if n := len(s.Link().Carriers); n > Carriers+1 {
				t.Errorf("%d carriers", n)
			}
			t.Logf("%d bytes said in %v: %+v, %d carriers", said, took, st, len(s.Link().Carriers))
		}
		exchange(t, from, to)
		exchange(t, to, from)
	})
}

// chance is dice that several goroutines may roll, and counts how often they hit.
type chance struct {
	mu   sync.Mutex
	dice *rand.Rand
	hits int
}

func newChance(seed uint64) *chance { return &chance{dice: rand.New(rand.NewPCG(seed, 0))} }

func (c *chance) hit(share float64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dice.Float64() >= share {
		return false
	}
	c.hits++
	return true
}

func (c *chance) below(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dice.IntN(n)
}

// jitter is up to the time in which the link takes 50 packets.
func (c *chance) jitter() time.Duration { return time.Duration(c.below(int(30 * time.Millisecond))) }

func TestSessionWhosePacketsAreLost(t *testing.T) {
	for _, share := range []float64{0.01, 0.05} {
		t.Run(fmt.Sprintf("%.0f%%", 100*share), func(t *testing.T) {
			c := newChance(1)
			converseThrough(t, fault{
				fate: func(packet simnet.Packet, pass func(simnet.Packet)) {
					if !c.hit(share) {
						pass(packet)
					}
				},
				middle: func(t *testing.T, _ *wan, from, to *Session) {
					for _, s := range []*Session{from, to} {
						if s.Stats().PacketsLost == 0 {
							t.Error("no packet counts as lost")
						}
					}
				},
				took: time.Minute,
			})
			if c.hits < 100 {
				t.Errorf("only %d packets were lost", c.hits)
			}
		})
	}
}

func TestSessionWhosePacketsChangeTheirOrder(t *testing.T) {
	c := newChance(2)
	converseThrough(t, fault{
		fate: func(packet simnet.Packet, pass func(simnet.Packet)) {
			if c.hit(0.05) {
				time.AfterFunc(c.jitter(), func() { pass(packet) })
			} else {
				pass(packet)
			}
		},
		took: time.Minute,
	})
	if c.hits < 500 {
		t.Errorf("only %d packets were late", c.hits)
	}
}

func TestSessionWhosePacketsComeTwice(t *testing.T) {
	c := newChance(3)
	converseThrough(t, fault{
		fate: func(packet simnet.Packet, pass func(simnet.Packet)) {
			pass(packet)
			if c.hit(0.1) {
				time.AfterFunc(c.jitter(), func() { pass(packet) })
			}
		},
		copied: 0.12,
		took:   time.Minute,
	})
	if c.hits < 1000 {
		t.Errorf("only %d packets came twice", c.hits)
	}
}

func TestSessionWhosePacketsAreDamaged(t *testing.T) {
	c := newChance(4)
	converseThrough(t, fault{
		fate: func(packet simnet.Packet, pass func(simnet.Packet)) {
			if c.hit(0.02) {
				packet.Data[c.below(len(packet.Data))] ^= 1 << c.below(8)
			}
			pass(packet)
		},
		took: time.Minute,
	})
	if c.hits < 200 {
		t.Errorf("only %d packets were damaged", c.hits)
	}
}

func TestSessionInABlackout(t *testing.T) {
	const blackout = 45 * time.Second
	var deaf atomic.Bool
	for _, test := range []struct {
		name string
		set  func(w *wan, dark bool)
	}{
		{"both ways", (*wan).setCut},
		{"towards the listener", func(_ *wan, dark bool) { deaf.Store(dark) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			converseThrough(t, fault{
				fate: func(packet simnet.Packet, pass func(simnet.Packet)) {
					if !deaf.Load() || packet.To.String() != "192.0.2.2:4000" {
						pass(packet)
					}
				},
				middle: func(t *testing.T, w *wan, from, to *Session) {
					test.set(w, true)
					time.Sleep(blackout)
					if to.Err() != nil || to.Link().LostSince.IsZero() {
						t.Errorf("the listener in the blackout: %v, %+v", to.Err(), to.Link())
					}
					test.set(w, false)
				},
				took: blackout + 30*time.Second,
			})
		})
	}
}

// From the middle on packets of more than the smallest MTU of IPv6 vanish, after
// QUIC has found that larger ones pass.
func TestSessionOverAPathThatTakesLessThanBefore(t *testing.T) {
	const least = 1280
	var mu sync.Mutex
	var narrow bool
	var largest, vanished int
	converseThrough(t, fault{
		fate: func(packet simnet.Packet, pass func(simnet.Packet)) {
			size := len(packet.Data) + headerIPv4 + headerUDP
			mu.Lock()
			fits := !narrow || size <= least
			if fits {
				largest = max(largest, size)
			} else {
				vanished++
			}
			mu.Unlock()
			if fits {
				pass(packet)
			}
		},
		middle: func(*testing.T, *wan, *Session, *Session) {
			mu.Lock()
			defer mu.Unlock()
			narrow = true
		},
		took: IdleTimeout - 5*time.Second, // without QUIC's own way out
	})
	if largest < 1400 || vanished == 0 {
		t.Errorf("packets of up to %d bytes passed, and %d vanished", largest, vanished)
	}
}

// moves gives a host another address: the one that others see it at. What comes
// for the one that it had before is lost.
type moves struct {
	host *net.UDPAddr // as it knows itself

	mu   sync.Mutex
	seen *net.UDPAddr
}

func (m *moves) now() *net.UDPAddr {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen
}

func (m *moves) to(ip net.IP, port int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = &net.UDPAddr{IP: ip.To4(), Port: port}
}

func (m *moves) fate(packet simnet.Packet, pass func(simnet.Packet)) {
	seen := m.now()
	switch {
	case packet.From.String() == m.host.String():
		packet.From = seen
	case packet.To.String() == seen.String():
		packet.To = m.host
	default:
		return
	}
	pass(packet)
}

// A NAT gives the dialer another port, later another address too: its carriers
// go on, and the listener knows where it is.
func TestSessionBehindANATThatForgets(t *testing.T) {
	nat := &moves{host: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1).To4(), Port: 4000}}
	nat.to(net.IPv4(198, 51, 100, 1), 5000)
	converseThrough(t, fault{
		fate: nat.fate,
		middle: func(t *testing.T, _ *wan, _, to *Session) {
			for _, ip := range []net.IP{net.IPv4(198, 51, 100, 1), net.IPv4(198, 51, 100, 2)} {
				nat.to(ip, nat.now().Port+1)
				time.Sleep(3 * time.Second) // more than pingAfter
				if at := to.RemoteAddr().String(); at != nat.now().String() {
					t.Errorf("the dialer is at %s for the listener, want %s", at, nat.now())
				}
			}
		},
		took: time.Minute,
	})
}

// The listener gets an address that the dialer cannot know: it dials back.
func TestSessionWhoseListenerMoves(t *testing.T) {
	listener := &moves{host: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 2).To4(), Port: 4000}}
	listener.to(net.IPv4(192, 0, 2, 2), 4000)
	var met string
	converseThrough(t, fault{
		fate: listener.fate,
		middle: func(t *testing.T, _ *wan, from, _ *Session) {
			listener.to(net.IPv4(192, 0, 2, 9), 4000)
			time.Sleep(silence + listenerWait + redialTimeout)
			met = from.RemoteAddr().String()
		},
		took: time.Minute,
	})
	if met != listener.now().String() {
		t.Errorf("the listener is at %s for the dialer, want %s", met, listener.now())
	}
}
