//go:build bench

package bench

import (
	"fmt"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
)

// TestThroughput measures a session between two network namespaces that a veth
// joins, local-dc and the users: nothing but the processors limits it. Beside it
// iperf3, which does not encrypt.
func TestThroughput(t *testing.T) {
	b := newBench(t, lab.LinkSettings{})
	addr := b.Sites[lab.Users].Addr.Addr().String()
	fmt.Printf("\nno emulation, two network namespaces:\n%-12s %-12s %10s %14s\n", "throughput", "", "Gbit/s", "CPU s per GB")
	f := b.iperf("cubic", lab.Users, addr, 2*time.Second, *window)
	fmt.Printf("%-12s %-12s %10.2f %14s\n", "throughput", "tcp-cubic", f.end()/1e9, "-")
	for _, kind := range []string{plainQUIC, session, sessionQUIC, sessionTCP} {
		s := b.ends(kind, lab.Users, addr+":7946")
		s.bulk()
		time.Sleep(2 * time.Second)
		before, began := s.sample(), time.Now()
		time.Sleep(*window)
		after, took := s.sample(), time.Since(began)
		s.stop()
		bytes := float64(after.Received - before.Received)
		rate := bytes * 8 / took.Seconds()
		fmt.Printf("%-12s %-12s %10.2f %14.2f\n", "throughput", kind, rate/1e9, (after.CPU-before.CPU).Seconds()/bytes*1e9)
		if kind == session && rate < 2e9 {
			t.Errorf("a session carries %.2f Gbit/s, want 2", rate/1e9)
		}
	}
}
