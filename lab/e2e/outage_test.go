//go:build lab || bench

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// pending is what waits in the outboxes of a move.
func pending(s migrate.Status) (n int64) {
	for _, d := range s.Disks {
		n += d.Pending
	}
	return n
}

// TestOutage cuts the link in parts of a move (each of them in a soak and in benchmarks), once for longer than QUIC keeps a
// connection. The move holds and says so, the guest runs on, and when the link is
// back the move goes on where it was.
func TestOutage(t *testing.T) {
	t.Parallel()
	for i, c := range []struct {
		name string
		cut  time.Duration
		at   func(migrate.Status) bool
	}{
		{"disks in bulk", cutFor, func(s migrate.Status) bool {
			return s.Phase == migrate.PhaseSync && s.Memory.Round <= 1 && len(s.Disks) > 0 && s.Disks[0].Sent > 256<<10 && s.Disks[0].Done < s.Disks[0].Size/2
		}},
		{"disks and memory", briefCut, func(s migrate.Status) bool {
			return s.Phase == migrate.PhaseSync && s.Memory.Stream > 1<<20 && pending(s) > 0
		}},
		{"first pass of memory", briefCut, func(s migrate.Status) bool {
			return s.Phase == migrate.PhaseSync && s.Memory.Round == 1 && s.Memory.Stream > 8<<20
		}},
		{"later passes of memory", briefCut, func(s migrate.Status) bool {
			return s.Phase == migrate.PhaseSync && s.Memory.Round > 1
		}},
	} {
		if !everyPart && i > 0 {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "40mbit", "20ms")
			v := w.vm(lab.VMOptions{Name: "holder", Memory: 192 << 20, Disks: []lab.DiskOptions{disk(t, "96MiB,format=qcow2")},
				Dirty: 2 << 20, Write: 512 << 10, WorkingSet: 24 << 20})
			move := w.begin(v.Name)
			began := w.await(lab.LocalDC, move, c.name, c.at)
			w.cut(true)
			t.Logf("cut in round %d, %d MiB of the stream sent, %d KiB pending", began.Memory.Round, began.Memory.Stream>>20, pending(began)>>10)
			w.holds(v, move, c.cut)
			w.cut(false)
			s := w.await(lab.LocalDC, move, "its end", final)
			if s.Phase != migrate.PhaseDone {
				t.Fatalf("the move ended %s with %q", s.Phase, s.Result.Error)
			}
			w.healthy(lab.RemoteDC, v)
			r := s.Result
			t.Logf("%d of %d bytes were sent again, the link was gone for %d ms, downtime %d ms", r.Resent, r.WireBytesSent, r.LinkLostMS, r.DowntimeMS)
			if r.Resent*100 > r.WireBytesSent {
				t.Errorf("%d of %d bytes were sent again: more than 1 %%", r.Resent, r.WireBytesSent)
			}
			if lost := time.Duration(r.LinkLostMS) * time.Millisecond; lost < c.cut/2 || lost > 2*c.cut {
				t.Errorf("the move says that the link was gone for %v of %v", lost, c.cut)
			}
		})
	}
}

// cut cuts both directions of the link, or restores them.
func (w *world) cut(cut bool) {
	w.t.Helper()
	from := []string{}
	if cut {
		from = lab.DataCentres
	}
	w.change(lab.LinkChange{Cut: &from})
}

func (w *world) change(c lab.LinkChange) {
	w.t.Helper()
	if err := w.ChangeLink(w.t.Context(), c); err != nil {
		w.t.Fatal(err)
	}
}

// holds waits while the link is cut, and checks that the guest runs and answers
// all the time, and that the operator is told.
func (w *world) holds(v *lab.VM, move string, during time.Duration) {
	w.t.Helper()
	// What QEMU's TCG does at the beginning of a pass takes up to seconds.
	const longest = 5 * time.Second
	until := time.Now().Add(during)
	flow, err := v.StartUDP(w.t.Context(), lab.Users, v.Address, 20*time.Millisecond)
	if err != nil {
		w.t.Fatal(err)
	}
	told := false
	for time.Now().Before(until) {
		if state := w.state(lab.LocalDC, v.Name); state != "running" {
			w.t.Errorf("without a link the guest is %s", state)
		}
		told = told || w.status(lab.LocalDC, move).Link.LostSince != nil && strings.Contains(w.wanmig(lab.LocalDC, "status", move), "link lost")
		time.Sleep(500 * time.Millisecond)
	}
	r := flow.Stop()
	if err := r.Err(); err != nil || r.LongestGap.Length > longest {
		w.t.Errorf("the guest without a link: %v, %v", r, err)
	}
	if !told {
		w.t.Error("nobody was told that the link was lost")
	}
	if s := w.status(lab.LocalDC, move); s.Phase != migrate.PhaseSync {
		w.t.Errorf("without a link the move went on to %s: %+v", s.Phase, s.Result)
	}
}
