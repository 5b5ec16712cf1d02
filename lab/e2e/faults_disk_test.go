//go:build lab

package e2e

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// compare moves the guest once more, undisturbed, and compares what is at both sites
// before it goes on.
func (p *prover) compare(t *testing.T) {
	w := &world{p.lab, t}
	from, to := p.at, other(p.at)
	w.move(from, p.v.Name, to, "--redirect", "none", "--paused", "--keep-source")
	p.at = to
	for _, d := range p.v.Disks {
		w.same("raw", w.path(from, d), w.path(to, d))
	}
	w.resume(to, p.v.Name)
	w.healthy(to, p.v)
}

// unreadable moves a guest a part of whose disk can't be read: a block device over a file
// that has become too short. When it can be read again the guest moves.
func (p *prover) unreadable(t *testing.T) {
	w := &world{p.lab, t}
	const size, lost = 32 << 20, 4 << 20
	from, to := loop(t, size), loop(t, size)
	v := w.vm(lab.VMOptions{Name: "scratched", Memory: 128 << 20, WorkingSet: 8 << 20, Disks: []lab.DiskOptions{disk(t, from)}})
	t.Cleanup(func() {
		if err := v.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	out, err := exec.Command("losetup", "--noheadings", "--output", "BACK-FILE", from).Output()
	if err != nil {
		t.Fatal(err)
	}
	file := strings.TrimSpace(string(out))
	whole, err := os.ReadFile(file)
	if err == nil {
		err = os.Truncate(file, size-lost)
	}
	if err == nil {
		err = exec.Command("blockdev", "--flushbufs", from).Run()
	}
	if err != nil {
		t.Fatal(err)
	}
	mapping := from + "=" + to
	move := w.begin(v.Name, "--storage", mapping)
	s := w.await(lab.LocalDC, move, "its end", final)
	if s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, "vda") {
		t.Errorf("the move ended %s with %q: want an error that names the disk", s.Phase, s.Result.Error)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(whole[size-lost:], size-lost)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.healthy(lab.LocalDC, v)
	w.move(lab.LocalDC, v.Name, lab.RemoteDC, "--storage", mapping)
	w.healthy(lab.RemoteDC, v)
}
