//go:build lab

package e2e

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// TestRollback takes a move back: live, to the names that disks and networks had, with
// little more than what has changed; and, when the other site is dead, by starting
// what the guest has left, once it is said how old that is.
func TestRollback(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "100mbit", "20ms")
	const name = "home sick"
	v := w.vm(lab.VMOptions{Name: name, Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "64MiB,format=qcow2")}, Write: 256 << 10})
	if err := os.Mkdir(w.path(lab.RemoteDC, "/var/lib/libvirt/moved"), 0o755); err != nil {
		t.Fatal(err)
	}
	there := []string{"--keep-source", "--storage", "/var/lib/libvirt/images=/var/lib/libvirt/moved", "--network", "br0=br1"}
	r := w.move(lab.LocalDC, name, lab.RemoteDC, there...)
	if out, complaint, status := w.run(lab.RemoteDC, "wanmig", "rollback", r.Move); status == 0 || !strings.Contains(complaint, "has not gone from here") {
		t.Errorf("a rollback at the destination: status %d, %s%s", status, out, complaint)
	}
	out := w.wanmig(lab.LocalDC, "rollback", r.Move, "--json")
	var back migrate.Result
	if err := json.Unmarshal([]byte(out), &back); err != nil || back.Result != "done" {
		t.Fatalf("%v: %s", err, out)
	}
	w.healthy(lab.LocalDC, v)
	xml, _, _ := w.run(lab.LocalDC, "virsh", "dumpxml", name)
	for _, want := range []string{"'" + v.Disks[0] + "'", "bridge='br0'"} {
		if !strings.Contains(xml, want) {
			t.Errorf("back, it has no %s:\n%s", want, xml)
		}
	}
	if got := w.images(lab.LocalDC); len(got) != 1 {
		t.Errorf("images here: %v", got)
	}
	for _, s := range w.moves(lab.RemoteDC) {
		if s.Move == back.Move && (len(s.Disks) != 1 || s.Disks[0].Held < s.Disks[0].Sent/2) {
			t.Errorf("the move back does not start from what was left: %+v", s.Disks)
		}
	}
	if out, complaint, status := w.run(lab.LocalDC, "wanmig", "rollback", r.Move); status == 0 || !strings.Contains(complaint, "moved again") {
		t.Errorf("a second rollback: status %d, %s%s", status, out, complaint)
	}

	r = w.move(lab.LocalDC, name, lab.RemoteDC, there...)
	w.powerOff(name)
	_, complaint, status := w.run(lab.LocalDC, "wanmig", "rollback", r.Move)
	if status == 0 || !strings.Contains(complaint, "--from-copy") {
		t.Errorf("a rollback from a dead site: status %d, %s", status, complaint)
	}
	if _, complaint, status := w.run(lab.LocalDC, "wanmig", "rollback", r.Move, "--from-copy"); status == 0 || !strings.Contains(complaint, "ago") || !strings.Contains(complaint, "--yes") {
		t.Errorf("without being sure: status %d, %s", status, complaint)
	}
	w.wanmig(lab.LocalDC, "rollback", r.Move, "--from-copy", "--yes")
	if state := w.state(lab.LocalDC, name); state != "running" {
		t.Errorf("started from its copy it is %s", state)
	}
	if len(w.copies(lab.LocalDC)) != 0 {
		t.Errorf("what the guest runs from counts as a copy: %v", w.copies(lab.LocalDC))
	}
	if status := w.wanmig(lab.LocalDC, "status", r.Move); !strings.Contains(status, "started here from the copy") {
		t.Errorf("the status does not tell it:\n%s", status)
	}
}

// powerOff ends a guest at remote-dc, its libvirtd and its agent.
func (w *world) powerOff(vm string) {
	w.t.Helper()
	w.virsh(lab.RemoteDC, "destroy", vm)
	for _, kill := range []func() error{
		func() error { return w.Sites[lab.RemoteDC].KillAgent(w.t.Context()) },
		func() error { return w.Sites[lab.RemoteDC].KillLibvirtd(w.t.Context()) },
	} {
		if err := kill(); err != nil {
			w.t.Fatal(err)
		}
	}
}

// moves lists what the agent of a site knows.
func (w *world) moves(site string) []migrate.Status {
	w.t.Helper()
	var all []migrate.Status
	for line := range slices.Values(strings.Split(strings.TrimSpace(w.wanmig(site, "list", "--json")), "\n")) {
		var s migrate.Status
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			w.t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}
