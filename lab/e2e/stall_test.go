//go:build lab

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// TestStall moves a guest that dirties its memory faster than the link takes it, in
// each way that --on-stall names: one of them, and all in a soak.
func TestStall(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "20mbit", "20ms")
	v := w.vm(lab.VMOptions{Name: "stubborn", Memory: 128 << 20, Dirty: 24 << 20, WorkingSet: 24 << 20, Disks: []lab.DiskOptions{disk(t, "16MiB")}})
	load := func(site string, rate int64) {
		t.Helper()
		if _, err := v.Load(t.Context(), site, lab.LoadChange{Dirty: &rate}); err != nil {
			t.Fatal(err)
		}
	}

	// It ends, with the numbers.
	move := w.begin("stubborn", "--on-stall", "fail")
	s := w.await(lab.LocalDC, move, "its end", final)
	if s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, "does not converge") || !strings.Contains(s.Result.Error, "the link takes") {
		t.Errorf("the move ended %s: %q", s.Phase, s.Result.Error)
	}
	if state := w.state(lab.LocalDC, "stubborn"); state != "running" {
		t.Errorf("the guest is %s", state)
	}

	if !soaking {
		return
	}

	// QEMU takes its CPU time: what is predicted fits in the end.
	r := w.move(lab.LocalDC, "stubborn", lab.RemoteDC)
	t.Logf("with throttling: %d ms, %d rounds, throttled by %d %%, downtime %d ms %+v", r.TotalMS, r.MemoryRounds, r.Throttled, r.DowntimeMS, r.Downtime)
	if down := time.Duration(r.DowntimeMS) * time.Millisecond; r.Throttled < 21 || down > migrate.StallPatience*migrate.DefaultDowntime {
		t.Errorf("throttled by %d %%, and down for %v", r.Throttled, down)
	}
	w.healthy(lab.RemoteDC, v)

	// The longer downtime is accepted.
	r = w.move(lab.RemoteDC, "stubborn", lab.LocalDC, "--on-stall", "stop")
	t.Logf("with a stop: %d ms, %d rounds, downtime %d ms %+v", r.TotalMS, r.MemoryRounds, r.DowntimeMS, r.Downtime)
	if down := time.Duration(r.DowntimeMS) * time.Millisecond; r.Throttled != 0 || down < migrate.DefaultDowntime {
		t.Errorf("throttled by %d %%, and down for %v only: it did not stall", r.Throttled, down)
	}
	w.healthy(lab.LocalDC, v)

	// It is told of, and goes on until the guest does less.
	move = w.begin("stubborn", "--on-stall", "wait")
	s = w.await(lab.LocalDC, move, "a stall", func(s migrate.Status) bool { return s.Memory.Stalled })
	if m := s.Memory; m.LinkTakes == 0 || m.PredictedMS <= migrate.DefaultDowntime.Milliseconds() || m.Throttled != 0 {
		t.Errorf("in a stall the status of memory is %+v", m)
	}
	load(lab.LocalDC, 1<<20)
	s = w.await(lab.LocalDC, move, "its end", final)
	r = *s.Result
	t.Logf("without load: %d ms, %d rounds, downtime %d ms %+v", r.TotalMS, r.MemoryRounds, r.DowntimeMS, r.Downtime)
	if r.Result != "done" || r.DowntimeMS > 1000 {
		t.Errorf("a guest that does less has moved as %+v", r)
	}
	w.healthy(lab.RemoteDC, v)
}
