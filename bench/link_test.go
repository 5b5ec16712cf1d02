//go:build bench

package bench

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
)

const (
	linkRate = 200e6
	linkRTT  = 100 * time.Millisecond
)

// condition is what the link does, and what a session is to make of it.
type condition struct {
	name  string
	loss  float64
	burst float64
	block []string
	use   float64 // share of the link that a session uses at least; 0: 95 % of the better TCP's
}

var conditions = []condition{
	{"loss=0%", 0, 0, nil, 0.9},
	{"loss=0.1%", 0.001, 0, nil, 0.9},
	{"loss=1%", 0.01, 0, nil, 0.8},
	{"bursts=20,loss=1%", 0.01, 20, nil, 0.75},
	{"no-udp,loss=0%", 0, 0, []string{"udp"}, 0},
	{"no-udp,loss=0.1%", 0.001, 0, []string{"udp"}, 0},
}

// row is one thing on a link.
type row struct {
	what    string
	payload float64   // bits per second
	wire    float64   // bits per second of the sender's IP packets
	dropped float64   // share of its packets that the link's queue had no room for, from the start on
	control quantiles // round trips of the control frames beside the load
	path    quantiles // and of echo requests, as another user would see the link
	idle    time.Duration

	carriers string
}

func (r row) use() float64 { return r.wire / linkRate }

const rowHead = "%-18s %-12s %8s %8s %7s %8s %20s %8s %20s %8s  %s\n"

func printHead(idle time.Duration) {
	fmt.Printf("\n200 Mbit/s, %v round trip when idle\n", idle.Round(100*time.Microsecond))
	fmt.Printf(rowHead, "link", "", "Mbit/s", "of link", "sent", "dropped", "control median/95th", "of idle", "path median/95th", "of idle", "carriers")
}

func (r row) print(condition string) {
	times := func(d time.Duration) string {
		if d == 0 {
			return "-"
		}
		return fmt.Sprintf("x%.2f", float64(d)/float64(r.idle))
	}
	fmt.Printf(rowHead, condition, r.what, fmt.Sprintf("%.1f", r.payload/1e6), fmt.Sprintf("%.1f%%", 100*r.use()),
		fmt.Sprintf("x%.3f", r.wire/r.payload), fmt.Sprintf("%.1f%%", 100*r.dropped), r.control, times(r.control.p95), r.path, times(r.path.p95), r.carriers)
}

// TestLink measures on the lab's link what one TCP connection, one plain
// connection of quic-go and a session make of it, one after the other.
func TestLink(t *testing.T) {
	b := newBench(t, lab.LinkSettings{Rate: linkRate, RTT: linkRTT, Seed: 1})
	for _, c := range conditions {
		t.Run(c.name, func(t *testing.T) {
			b := &bench{b.Lab, t}
			b.change(lab.LinkChange{Loss: new(float64), Burst: new(float64), Block: &[]string{}})
			idle := b.pings(b.remote(), 2*time.Second).median
			b.change(lab.LinkChange{Loss: &c.loss, Burst: &c.burst, Block: &c.block})
			printHead(idle)
			goal, betterTCP := c.use, 0.0
			for _, control := range []string{"bbr", "cubic"} {
				if !strings.Contains("tcp-"+control, *only) {
					continue
				}
				r := b.measureTCP(control)
				r.idle = idle
				r.print(c.name)
				betterTCP = max(betterTCP, r.use())
			}
			if goal == 0 {
				goal = 0.95 * betterTCP
			}
			for _, kind := range kindsOn(c) {
				if !strings.Contains(kind, *only) {
					continue
				}
				r := b.measure(kind)
				r.idle = idle
				r.print(c.name)
				if kind != session {
					continue
				}
				if r.use() < goal {
					t.Errorf("the session uses %.1f %% of the link, want %.1f %%", 100*r.use(), 100*goal)
				}
				if r.control.p95 > idle*3/2 {
					t.Errorf("control frames take %v, want at most 1.5 times %v", r.control, idle)
				}
			}
		})
	}
}

// kindsOn are the kinds that can work on a link.
func kindsOn(c condition) []string {
	if len(c.block) > 0 {
		return []string{session}
	}
	return []string{plainQUIC, session, sessionQUIC, sessionTCP}
}

func (b *bench) remote() string { return b.Sites[lab.RemoteDC].WANAddr.Addr().String() }

// measureTCP measures one flow of iperf3, with a congestion control of the kernel's.
func (b *bench) measureTCP(control string) row {
	b.t.Helper()
	b.resetCounters()
	f := b.iperf(control, lab.RemoteDC, b.remote(), *startup, *window+time.Second)
	time.Sleep(*startup)
	r := b.underLoad("tcp-" + control)
	r.payload = f.end()
	return r
}

// measure measures what carries probes too.
func (b *bench) measure(kind string) row {
	b.t.Helper()
	b.resetCounters()
	s := b.ends(kind, lab.RemoteDC, b.Sites[lab.RemoteDC].AgentAddr.String())
	s.bulk()
	time.Sleep(*startup)
	before, began := s.sample(), time.Now()
	r := b.underLoad(kind)
	after, took := s.sample(), time.Since(began)
	s.stop()
	r.payload = float64(after.Received-before.Received) * 8 / took.Seconds()
	r.control = newQuantiles(after.Probes)
	r.carriers = after.Carriers
	return r
}

// underLoad measures the link for a window.
func (b *bench) underLoad(what string) row {
	b.t.Helper()
	before, began := b.wire(), time.Now()
	path := b.pings(b.remote(), *window)
	after, took := b.wire(), time.Since(began)
	return row{what: what, wire: float64(after.Bytes-before.Bytes) * 8 / took.Seconds(), path: path,
		dropped: float64(after.Dropped) / float64(after.Packets+after.Dropped)}
}
