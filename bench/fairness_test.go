//go:build bench

package bench

import (
	"fmt"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
)

// TestFairness has a TCP flow of another user begin on a link that a session fills.
func TestFairness(t *testing.T) {
	b := newBench(t, lab.LinkSettings{Rate: linkRate, RTT: linkRTT, Seed: 1})
	fmt.Printf("\n200 Mbit/s, %v, no loss: a TCP flow of another user begins on a link that is full, Mbit/s\n", linkRTT)
	fmt.Printf("%-10s %-20s %10s %10s %12s\n", "fairness", "", "its own", "other's", "other's share")
	for _, kind := range []string{session, sessionPolite} {
		for _, control := range []string{"cubic", "bbr"} {
			t.Run(kind+"/"+control, func(t *testing.T) {
				b := &bench{b.Lab, t}
				share := b.besideTCP(kind, control)
				if kind == sessionPolite && share < 1.0/3 {
					t.Errorf("a flow of %s gets %.1f %% beside a session, want at least a third", control, 100*share)
				}
			})
		}
	}
}

// besideTCP returns the share that a TCP flow gets on a link that a session had
// for itself. The flow has as long as the session to find its rate.
func (b *bench) besideTCP(kind, control string) float64 {
	b.t.Helper()
	s := b.ends(kind, lab.RemoteDC, b.Sites[lab.RemoteDC].AgentAddr.String())
	s.bulk()
	time.Sleep(*startup)
	f := b.iperf(control, lab.RemoteDC, b.remote(), *startup, *window)
	time.Sleep(*startup)
	before, began := s.sample(), time.Now()
	other := f.end()
	after, took := s.sample(), time.Since(began)
	s.stop()
	own := float64(after.Received-before.Received) * 8 / took.Seconds()
	share := other / (own + other)
	fmt.Printf("%-10s %-20s %10.1f %10.1f %11.1f%%\n", "fairness", kind+" "+control, own/1e6, other/1e6, 100*share)
	return share
}
