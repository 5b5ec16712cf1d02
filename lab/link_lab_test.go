//go:build lab

package lab

import (
	"encoding/binary"
	"io"
	"math"
	"net"
	"slices"
	"testing"
	"time"
)

// probe sends numbered datagrams from local-dc to remote-dc.
type probe struct {
	from, to *net.UDPConn
}

func newProbe(t *testing.T, l *Lab) *probe {
	t.Helper()
	p := &probe{}
	addr := net.UDPAddrFromAddrPort(l.Sites[RemoteDC].AgentAddr)
	err := l.Sites[RemoteDC].inNamespace(func() (err error) {
		p.to, err = net.ListenUDP("udp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	err = l.Sites[LocalDC].inNamespace(func() (err error) {
		p.from, err = net.DialUDP("udp", nil, addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.from.Close(); p.to.Close() })
	return p
}

// burst sends n datagrams, few at a time so that no socket buffer overflows, and
// returns the numbers of those that arrive.
func (p *probe) burst(t *testing.T, n int) []uint32 {
	t.Helper()
	var got []uint32
	buf := make([]byte, linkMTU)
	for i := 0; i < n; {
		for range min(50, n-i) {
			if _, err := p.from.Write(binary.BigEndian.AppendUint32(nil, uint32(i))); err != nil {
				t.Fatal(err)
			}
			i++
		}
		for {
			if err := p.to.SetReadDeadline(time.Now().Add(30 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			size, err := p.to.Read(buf)
			if err != nil {
				break
			}
			if size != 4 {
				t.Fatalf("a datagram of %d bytes arrived", size)
			}
			got = append(got, binary.BigEndian.Uint32(buf))
			if got[len(got)-1] == uint32(i-1) {
				break
			}
		}
	}
	return got
}

func counters(t *testing.T, l *Lab, from string) LinkCounters {
	t.Helper()
	state, err := l.LinkState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return state.Counters[from]
}

func change(t *testing.T, l *Lab, c LinkChange) {
	t.Helper()
	if err := l.ChangeLink(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := l.ResetCounters(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestLinkDelay(t *testing.T) {
	l := makeLab(t, DefaultLink())
	p := newProbe(t, l)
	for _, rtt := range []time.Duration{50 * time.Millisecond, 0, 200 * time.Millisecond} {
		change(t, l, LinkChange{RTT: &rtt})
		var trips []time.Duration
		buf := make([]byte, linkMTU)
		for range 10 {
			start := time.Now()
			if _, err := p.from.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			n, back, err := p.to.ReadFromUDP(buf)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.to.WriteToUDP(buf[:n], back); err != nil {
				t.Fatal(err)
			}
			if _, err := p.from.Read(buf); err != nil {
				t.Fatal(err)
			}
			trips = append(trips, time.Since(start))
		}
		// The quickest, since a busy machine runs this test late.
		if best := slices.Min(trips); best < rtt || best > rtt+rtt/50+time.Millisecond {
			t.Errorf("round trip of %v takes %v", rtt, best)
		}
	}
}

func TestLinkRate(t *testing.T) {
	const rate = 50e6
	l := makeLab(t, LinkSettings{Rate: rate, RTT: 20 * time.Millisecond})

	// UDP, half as much again as the link takes: the wire is full.
	p := newProbe(t, l)
	var c LinkCounters // of the last try
	fills(t, "UDP", rate, func() float64 {
		if err := l.ResetCounters(t.Context()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		datagram := make([]byte, 1400)
		for sent := 0; time.Since(start) < 2*time.Second; {
			for ; float64(sent)*8 < 1.5*rate*time.Since(start).Seconds(); sent += len(datagram) + 28 {
				if _, err := p.from.Write(datagram); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Millisecond)
		}
		elapsed := time.Since(start)
		c = counters(t, l, LocalDC)
		return float64(c.Bytes) * 8 / elapsed.Seconds()
	})
	if share := float64(c.Dropped) / float64(c.Packets+c.Dropped); c.Lost != 0 || share < 0.2 || share > 0.4 {
		t.Errorf("counters %+v: want a third dropped and none lost", c)
	}

	// TCP, by what its receiver gets once it is up to speed.
	var server net.Listener
	err := l.Sites[RemoteDC].inNamespace(func() (err error) {
		server, err = net.Listen("tcp", l.Sites[RemoteDC].AgentAddr.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	var client net.Conn
	err = l.Sites[LocalDC].inNamespace(func() (err error) {
		client, err = net.Dial("tcp", server.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() { // ends when the test closes the connection
		for data := make([]byte, 1<<16); err == nil; _, err = client.Write(data) {
		}
	}()
	if _, err := io.CopyN(io.Discard, conn, rate/8); err != nil {
		t.Fatal(err)
	}
	fills(t, "TCP", rate, func() float64 {
		start := time.Now()
		const amount = 3 * rate / 8
		if _, err := io.CopyN(io.Discard, conn, amount); err != nil {
			t.Fatal(err)
		}
		// 1448 bytes of each packet of 1500 are TCP's load.
		return amount * 8 / time.Since(start).Seconds() * 1500 / 1448
	})
}

// fills measures what a link carries until it is within a tenth of its rate. A
// busy machine makes it less, never more.
func fills(t *testing.T, what string, rate float64, measure func() float64) {
	t.Helper()
	const tries = 5
	var seen []float64
	for range tries {
		got := measure()
		seen = append(seen, got)
		if math.Abs(got-rate) <= rate/10 {
			return
		}
		if got > rate {
			break
		}
	}
	t.Errorf("%s fills a link of %g bit/s with %g", what, rate, seen)
}

func TestLinkLoss(t *testing.T) {
	const n = 20000
	l := makeLab(t, LinkSettings{Seed: 5})
	p := newProbe(t, l)
	for _, c := range []struct{ loss, burst float64 }{{0, 0}, {0.02, 0}, {0.05, 5}} {
		change(t, l, LinkChange{Loss: &c.loss, Burst: &c.burst})
		got := p.burst(t, n)
		if !slices.IsSorted(got) {
			t.Error("packets were reordered")
		}
		count := counters(t, l, LocalDC)
		if missing := n - len(got); count.Lost < uint64(missing) || count.Lost > uint64(missing)+10 {
			// The kernel's own few packets may be lost too.
			t.Errorf("loss %+v: %d of %d packets are missing, the link lost %d", c, missing, n, count.Lost)
		}
		tolerance := 5 * math.Sqrt(c.loss*n*max(1, 2*c.burst))
		if math.Abs(float64(count.Lost)-c.loss*n) > tolerance {
			t.Errorf("loss %+v: %d of %d packets were lost", c, count.Lost, n)
		}
		if c.burst == 0 {
			continue
		}
		gaps, next := 0, uint32(0)
		for _, number := range append(got, n) {
			if number != next {
				gaps++
			}
			next = number + 1
		}
		if mean := float64(n-len(got)) / float64(gaps); math.Abs(mean-c.burst) > c.burst/3 {
			t.Errorf("bursts of %g packets are %g long", c.burst, mean)
		}
	}
}

func TestLinkCut(t *testing.T) {
	l := makeLab(t, LinkSettings{})
	p := newProbe(t, l)
	for _, c := range []struct {
		cut     []string
		arrives int
	}{
		{[]string{LocalDC}, 0},
		{[]string{RemoteDC}, 100},
		{[]string{LocalDC, RemoteDC}, 0},
		{nil, 100},
	} {
		change(t, l, LinkChange{Cut: &c.cut})
		if got := len(p.burst(t, 100)); got != c.arrives {
			t.Errorf("cut from %v: %d of 100 packets arrive, want %d", c.cut, got, c.arrives)
		}
		if count := counters(t, l, LocalDC); count.Cut < uint64(100-c.arrives) || count.Lost+count.Dropped > 0 {
			t.Errorf("cut from %v: counters %+v", c.cut, count)
		}
	}
}
