//go:build lab

package e2e

import (
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/lab/guest/api"
)

// TestPageCache moves a guest that has a file of its disk in memory. The disk
// carries it, and memory's pages of it are found there.
func TestPageCache(t *testing.T) {
	t.Parallel() // beside the redirects, which mostly wait
	w := newWorld(t, "400mbit", "20ms")
	const write, file = 32 << 20, 64 << 20
	v := w.vm(lab.VMOptions{Name: "cache", Memory: 512 << 20, WorkingSet: 16 << 20, Write: write, Disks: []lab.DiskOptions{disk(t, "512MiB")}})
	for until := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		r, err := v.Report(t.Context(), lab.LocalDC)
		if err != nil {
			t.Fatal(err)
		}
		if r.Disks[0].Acknowledged*api.BlockSize > file {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("the guest has written %d blocks in a minute", r.Disks[0].WrittenBlocks)
		}
	}
	var none int64
	if _, err := v.Load(t.Context(), lab.LocalDC, lab.LoadChange{Write: &none}); err != nil {
		t.Fatal(err)
	}
	r := w.move(lab.LocalDC, v.Name, lab.RemoteDC, "--paused", "--keep-source")
	m := r.Reduction.Memory
	t.Logf("%d ms, %d KiB sent; memory: %+v", r.TotalMS, r.WireBytesSent>>10, m)
	if m.Disk.Bytes < file/2 || m.Disk.Wire > m.Disk.Bytes/50 {
		t.Errorf("%d KiB were found on the disk, for %d KiB sent, of a file of %d KiB in memory", m.Disk.Bytes>>10, m.Disk.Wire>>10, file>>10)
	}
	w.same("raw", w.path(lab.LocalDC, v.Disks[0]), w.path(lab.RemoteDC, v.Disks[0]))
	if _, complaint, status := w.run(lab.RemoteDC, "virsh", "resume", v.Name); status != 0 {
		t.Fatal(complaint)
	}
	w.healthy(lab.RemoteDC, v)
}
