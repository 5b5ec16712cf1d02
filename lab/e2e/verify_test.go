//go:build lab

package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// TestVerify has the disks of both sites compared before the guest runs at the
// destination: of each kind, under load, and of one whose copy is spoiled there.
func TestVerify(t *testing.T) {
	t.Parallel() // beside the redirects, which mostly wait
	w := newWorld(t, "200mbit", "20ms")
	const size = 96 << 20
	v := w.vm(lab.VMOptions{Name: "compared", Memory: 192 << 20, Dirty: 1 << 20, Write: 512 << 10, WorkingSet: 16 << 20,
		Disks: []lab.DiskOptions{disk(t, "96MiB"), disk(t, "96MiB,format=qcow2")}})

	// A bit turns at the destination, where the guest writes nothing.
	move := w.begin("compared", "--verify")
	w.await(lab.LocalDC, move, "disks on their way", func(s migrate.Status) bool { return len(s.Disks) > 0 && s.Disks[0].Done > 0 })
	f, err := os.OpenFile(w.path(lab.RemoteDC, v.Disks[0]), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	const at = size - 128<<10
	if _, err := f.WriteAt([]byte{4}, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s := w.await(lab.LocalDC, move, "its end", final)
	if s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, "differs from the source's") || !strings.Contains(s.Result.Error, "disk vda") {
		t.Errorf("with a bit that turned the move ended %s: %q", s.Phase, s.Result.Error)
	}
	w.unharmed(v)
	if state := w.state(lab.LocalDC, "compared"); state != "running" {
		t.Errorf("the guest is %s", state)
	}

	// From the spoiled copy a second attempt makes a good one.
	for _, to := range [][2]string{{lab.LocalDC, lab.RemoteDC}, {lab.RemoteDC, lab.LocalDC}} {
		r := w.move(to[0], "compared", to[1], "--verify")
		if r.Verified == nil || r.Verified.Same != 2*size || r.Verified.Last > 2*size/4 {
			t.Errorf("verified %+v of %d bytes", r.Verified, 2*size)
		}
		t.Logf("to %s: verified %+v, downtime %d ms %+v", to[1], r.Verified, r.DowntimeMS, r.Downtime)
		w.healthy(to[1], v)
	}
}
