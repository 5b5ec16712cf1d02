//go:build lab

package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// copies are those that a site lists, by their path.
func (w *world) copies(site string) map[string]migrate.Copy {
	w.t.Helper()
	list := map[string]migrate.Copy{}
	for line := range strings.Lines(w.wanmig(site, "copies", "list", "--json")) {
		var c migrate.Copy
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			w.t.Fatalf("copies at %s: %v: %s", site, err, line)
		}
		list[c.Path] = c
	}
	return list
}

// TestOlderCopies moves a guest to where older copies of its disks are: of moves
// that did not end, and of its stay before. What is there is not sent again, the
// guest finds everything as it left it, and both images are the same.
func TestOlderCopies(t *testing.T) {
	t.Parallel() // beside the redirects, which mostly wait
	w := newWorld(t, "100mbit", "20ms")
	v := w.vm(lab.VMOptions{Name: "returner", Memory: 192 << 20, Dirty: 1 << 20, WorkingSet: 16 << 20,
		Disks: []lab.DiskOptions{disk(t, "128MiB"), disk(t, "96MiB,format=qcow2")}})
	// It writes between the moves alone, or the part that differs were one of time.
	write := func(site string) {
		t.Helper()
		for _, rate := range []int64{1, 0} {
			if _, err := v.Load(t.Context(), site, lab.LoadChange{Write: mib(rate)}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Second)
		}
	}
	write(lab.LocalDC)

	// An attempt that is cancelled when the disks have crossed.
	move := w.begin("returner")
	w.await(lab.LocalDC, move, "memory, with the disks across", func(s migrate.Status) bool {
		return inMemory(s) && s.Disks[0].Done+s.Disks[1].Done > s.Disks[0].Size+s.Disks[1].Size-1<<20 // written there
	})
	w.wanmig(lab.LocalDC, "cancel", move)
	s := w.await(lab.LocalDC, move, "its end", final)
	if s.Result.Kept == nil || s.Result.Kept.Bytes < 16<<20 {
		t.Errorf("the operator is not told what is kept: %+v", s.Result.Kept)
	}
	w.unharmed(v)
	if kept := w.copies(lab.RemoteDC); len(kept) != 2 {
		t.Fatalf("the destination keeps %+v of two disks", kept)
	}
	for path, c := range w.copies(lab.RemoteDC) {
		if left := time.Until(c.Until); c.Whole || left < 23*time.Hour || left > 25*time.Hour || c.VM != "returner" {
			t.Errorf("copy %s is %+v", path, c)
		}
	}

	// The next attempt.
	write(lab.LocalDC)
	again, _ := w.reduced(lab.LocalDC, lab.RemoteDC, v, "--paused", "--keep-source", "--keep-memory")
	for i, format := range []string{"raw", "qcow2"} {
		w.same(format, w.path(lab.LocalDC, v.Disks[i]), w.path(lab.RemoteDC, v.Disks[i]))
	}
	if again < 0.85 || again == 1 { // the guest has written since
		t.Errorf("the second attempt found %.3f of the content", again)
	}
	if left := w.copies(lab.RemoteDC); len(left) > 0 {
		t.Errorf("disks in use are listed as copies: %+v", left)
	}
	w.resume(lab.RemoteDC, "returner")
	w.healthy(lab.RemoteDC, v)
	write(lab.RemoteDC)

	// The way back, to disks that were kept, and with one that is something else by now.
	if kept := w.copies(lab.LocalDC); len(kept) != 3 || !kept[v.Disks[0]].Whole || !kept[v.Disks[0]].Until.IsZero() {
		t.Fatalf("--keep-source left %+v", kept)
	}
	old := w.path(lab.LocalDC, v.Disks[1])
	if err := os.Rename(old, old+".aside"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(old, []byte("something of the operator's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, complaint, status := w.run(lab.RemoteDC, "wanmig", "move", "returner", "--to", lab.LocalDC); status != 2 || !strings.Contains(complaint, "exists already") {
		t.Errorf("a file that is no copy: status %d, %q", status, complaint)
	}
	if err := os.Rename(old+".aside", old); err != nil {
		t.Fatal(err)
	}
	back, memory := w.reduced(lab.RemoteDC, lab.LocalDC, v, "--paused", "--keep-source")
	for i, format := range []string{"raw", "qcow2"} {
		w.same(format, w.path(lab.RemoteDC, v.Disks[i]), w.path(lab.LocalDC, v.Disks[i]))
	}
	if memory < 8<<20 {
		t.Errorf("the move back found %d bytes of memory that the guest had here", memory)
	}
	if left := w.copies(lab.LocalDC); len(left) > 0 {
		t.Errorf("what the guest has again is listed as copies: %+v", left)
	}
	if back < 0.85 || back == 1 {
		t.Errorf("the move back found %.3f of the content", back)
	}
	w.resume(lab.LocalDC, "returner")
	w.healthy(lab.LocalDC, v)

	// What is not wanted can be removed.
	if _, complaint, status := w.run(lab.RemoteDC, "wanmig", "copies", "remove", "nobody"); status == 0 || !strings.Contains(complaint, "nobody") {
		t.Errorf("copies of nobody: status %d, %q", status, complaint)
	}
	if kept := w.copies(lab.RemoteDC); len(kept) != 2 {
		t.Errorf("--keep-source left %+v", kept)
	}

	// --fresh takes none of it, and has the room of the copies.
	if fresh, _ := w.reduced(lab.LocalDC, lab.RemoteDC, v, "--fresh"); fresh != 0 {
		t.Errorf("--fresh found %.3f of the content in older copies", fresh)
	}
	w.healthy(lab.RemoteDC, v)

	if !soaking {
		return
	}

	// An attempt that is given up and forgotten.
	move = w.beginAt(lab.RemoteDC, "returner", lab.LocalDC)
	w.await(lab.RemoteDC, move, "disks on their way", func(s migrate.Status) bool { return len(s.Disks) > 0 && s.Disks[0].Sent > 4<<20 })
	w.wanmig(lab.RemoteDC, "cancel", move)
	w.await(lab.RemoteDC, move, "its end", final)
	if kept := w.copies(lab.LocalDC); len(kept) == 0 {
		t.Error("nothing is kept")
	}
	w.wanmig(lab.LocalDC, "copies", "remove", "returner")
	if left := w.images(lab.LocalDC); len(left) > 0 || len(w.copies(lab.LocalDC)) > 0 {
		t.Errorf("copies that were removed are there: %q", left)
	}
}

// reduced moves a guest and returns which part of its disks' content was in
// older copies, and how much of its memory.
func (w *world) reduced(from, to string, v *lab.VM, args ...string) (disks float64, memory int64) {
	w.t.Helper()
	r := w.move(from, v.Name, to, args...)
	d := r.Reduction.Disks
	content := d.Disk.Bytes + d.Seed.Bytes + d.Old.Bytes + d.Compressed.Bytes + d.Raw.Bytes
	w.t.Logf("%s to %s in %d ms, %+v", from, to, r.TotalMS, r.Reduction)
	return float64(d.Old.Bytes) / float64(max(content, 1)), r.Reduction.Memory.Old.Bytes
}

func (w *world) resume(site, vm string) {
	w.t.Helper()
	if _, complaint, status := w.run(site, "virsh", "resume", vm); status != 0 {
		w.t.Fatal(complaint)
	}
}
