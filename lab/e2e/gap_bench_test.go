//go:build bench

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
)

// TestLongestGap moves an idle guest away, back and away while a client keeps a
// TCP stream and a UDP flow to it: the stream pauses for no longer than the
// downtime, a round trip and 50 ms. QEMU's TCG, unlike KVM, stands still when a
// migration first asks which pages are dirty: the flows begin after that.
func TestLongestGap(t *testing.T) {
	const rtt, allowed = 50 * time.Millisecond, 50 * time.Millisecond
	w := newWorldWith(t, lab.Options{Services: true}, "100mbit", "50ms")
	v := w.vm(lab.VMOptions{Name: "web", Memory: 192 << 20, Disks: []lab.DiskOptions{disk(t, "256MiB")}})
	fmt.Printf("\nidle guest of 192 MiB, 100 Mbit/s, 50 ms, from users a record each 10 ms by TCP and by UDP:\n")
	fmt.Printf("  %-10s %10s %12s %10s %16s\n", "to", "downtime", "longest gap", "beyond", "UDP lost")
	var beyond []time.Duration
	from, to := lab.LocalDC, lab.RemoteDC
	for range 3 {
		move := strings.TrimSpace(w.wanmig(from, "move", v.Name, "--to", to, "--address", v.MAC+"="+v.Address.String(), "--detach"))
		w.await(from, move, "sending memory", func(s migrate.Status) bool { return s.Memory.Stream > 0 })
		stream, err := v.StartStream(t.Context(), lab.Users, v.Address, 10*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		udp, err := v.StartUDP(t.Context(), lab.Users, v.Address, 10*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		r := w.await(from, move, "its end", final).Result
		w.settled()
		u, s := udp.Stop(), stream.Stop()
		if err := errors.Join(u.Err(), s.Err()); err != nil || r.Result != "done" {
			t.Fatalf("to %s: %s: %v", to, r.Result, err)
		}
		over := s.LongestGap.Length - time.Duration(r.DowntimeMS)*time.Millisecond
		beyond = append(beyond, over)
		fmt.Printf("  %-10s %7d ms %9d ms %7d ms %7d of %5d\n", to, r.DowntimeMS, s.LongestGap.Length.Milliseconds(),
			over.Milliseconds(), u.Lost, u.Sent)
		from, to = to, from
	}
	slices.Sort(beyond)
	if median := beyond[1]; median > rtt+allowed {
		t.Errorf("the stream's longest gap is %v longer than the downtime, in the median", median)
	}
}

// settled waits until no tunnel stands in either data centre.
func (w *world) settled() {
	w.t.Helper()
	for until := time.Now().Add(time.Minute); ; time.Sleep(250 * time.Millisecond) {
		tunnels := ""
		for _, site := range lab.DataCentres {
			for line := range strings.Lines(w.wanmig(site, "redirect", "list", "--json")) {
				var s netredirect.Status
				if err := json.Unmarshal([]byte(line), &s); err != nil {
					w.t.Fatal(err)
				}
				if s.State != netredirect.Resident {
					tunnels += fmt.Sprintf("\nat %s, %s: %q %q", site, s.State, s.Waits, s.Problems)
				}
			}
		}
		if tunnels == "" {
			return
		}
		if time.Now().After(until) {
			w.t.Fatalf("tunnels stand for a minute:%s", tunnels)
		}
	}
}
