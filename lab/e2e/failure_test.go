//go:build lab

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// phases to which a move is let come before something fails. The slow link
// gives each of them seconds.
func inPrepare(s migrate.Status) bool { return s.Phase == migrate.PhasePrepare }
func inDisks(s migrate.Status) bool {
	return s.Phase == migrate.PhaseSync && len(s.Disks) > 0 && s.Disks[0].Sent > 0 && s.Disks[0].Pending > 0
}
func inMemory(s migrate.Status) bool {
	return s.Phase == migrate.PhaseSync && s.Memory.Stream > 1<<20
}

// TestFailuresLeaveTheGuest cancels a move in each of its parts, and lets the
// destination's disk be full. Each time the guest must run on at the source,
// unharmed, with nothing left at the destination; at last it moves. TestFaults has
// the other ways to fail.
func TestFailuresLeaveTheGuest(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "40mbit", "20ms")
	const name = "survivor"
	v := w.vm(lab.VMOptions{Name: name, Memory: 128 << 20, Disks: []lab.DiskOptions{disk(t, "128MiB,format=qcow2")},
		Dirty: 2 << 20, Write: 512 << 10, WorkingSet: 16 << 20})

	cancel := func(w *world, move string) { w.wanmig(lab.LocalDC, "cancel", move) }
	cases := []struct {
		name string
		at   func(migrate.Status) bool
		do   func(*world, string)
		says string // in the error that the operator reads
	}{
		{"cancel while preparing", inPrepare, cancel, "cancelled"},
		{"cancel while disks are copied", inDisks, cancel, "cancelled"},
		{"cancel while memory is copied", inMemory, cancel, "cancelled"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := &world{w.Lab, t}
			move := w.begin(name)
			w.await(lab.LocalDC, move, "the moment to fail", c.at)
			c.do(w, move)
			s := w.await(lab.LocalDC, move, "its end", final)
			if s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, c.says) {
				t.Errorf("the move ended %s with %q: want an error with %q", s.Phase, s.Result.Error, c.says)
			}
			w.unharmed(v)
		})
	}
	t.Run("destination disk full", func(t *testing.T) { w := &world{w.Lab, t}; w.fullDisk(v) })

	w.move(lab.LocalDC, name, lab.RemoteDC)
	w.healthy(lab.RemoteDC, v)
}

// unharmed checks that the guest runs at the source, and that the destination
// has nothing of it left but copies that it lists for the next attempt.
func (w *world) unharmed(v *lab.VM) {
	w.t.Helper()
	if state := w.state(lab.LocalDC, v.Name); state != "running" {
		w.t.Fatalf("the guest is %s at the source", state)
	}
	w.healthy(lab.LocalDC, v)
	// The destination may learn of the failure by silence.
	var left string
	for until := time.Now().Add(50 * time.Second); time.Now().Before(until); time.Sleep(200 * time.Millisecond) {
		left = ""
		if state := w.state(lab.RemoteDC, v.Name); state != "absent" {
			left = "the domain, " + state
		}
		if images := w.leftImages(lab.RemoteDC); len(images) > 0 {
			left += fmt.Sprint(" images ", images)
		}
		if sockets, err := os.ReadDir(w.path(lab.RemoteDC, "/run/libvirt/wanmig")); err == nil && len(sockets) > 0 {
			left += fmt.Sprint(" sockets ", sockets)
		}
		if left == "" {
			return
		}
	}
	w.t.Fatalf("left at the destination: %s", left)
}

// leftImages are a site's images without the copies that it keeps knowingly.
func (w *world) leftImages(site string) []string {
	w.t.Helper()
	kept := w.copies(site)
	return slices.DeleteFunc(w.images(site), func(name string) bool {
		_, known := kept["/var/lib/libvirt/images/"+name]
		return known
	})
}

// fullDisk gives the destination's images a file system that is too small for
// what the guest's disk will take.
func (w *world) fullDisk(v *lab.VM) {
	const size = "size=24m"
	images := "/var/lib/libvirt/images"
	// A file system mounted above them would hide the copies of the moves before.
	if len(w.copies(lab.RemoteDC)) > 0 {
		w.wanmig(lab.RemoteDC, "copies", "remove", v.Name)
	}
	if _, complaint, status := w.run(lab.RemoteDC, "mount", "-t", "tmpfs", "-o", size, "tmpfs", images); status != 0 {
		w.t.Fatal(complaint)
	}
	defer func() {
		if _, complaint, status := w.run(lab.RemoteDC, "umount", images); status != 0 {
			w.t.Error(complaint)
		}
	}()
	out, complaint, status := w.run(lab.LocalDC, "wanmig", "move", v.Name, "--to", lab.RemoteDC)
	if status == 0 || !strings.Contains(out+complaint, "space") {
		w.t.Errorf("a disk without room there: status %d, %s%s", status, out, complaint)
	}
	w.unharmed(v)

	// Room enough at the check, and none when it is needed.
	if _, complaint, status := w.run(lab.RemoteDC, "mount", "-o", "remount,size=2g", images); status != 0 {
		w.t.Fatal(complaint)
	}
	move := w.begin(v.Name)
	w.await(lab.LocalDC, move, "disks", inDisks)
	if _, complaint, status := w.run(lab.RemoteDC, "mount", "-o", "remount,size=8m", images); status != 0 {
		// A tmpfs can't shrink below what it holds: fill it instead.
		w.t.Logf("remount: %s", complaint)
		w.run(lab.RemoteDC, "sh", "-c", "head -c 3g /dev/zero > "+images+"/.filler")
	}
	s := w.await(lab.LocalDC, move, "its end", final)
	w.run(lab.RemoteDC, "rm", "-f", images+"/.filler")
	if s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, "space") {
		w.t.Errorf("the move ended %s with %q: want an error that names the space", s.Phase, s.Result.Error)
	}
	if state := w.state(lab.LocalDC, v.Name); state != "running" {
		w.t.Fatalf("the guest is %s at the source", state)
	}
	w.healthy(lab.LocalDC, v)
	out, _, _ = w.run(lab.RemoteDC, "ls", images)
	if strings.TrimSpace(out) != "" {
		w.t.Errorf("left at the destination: %s", out)
	}
}

// TestRefusals gives the command what can't work. Each is found before a byte
// moves, says what is wrong and what exists, and leaves the guest running.
func TestRefusals(t *testing.T) {
	w := newWorld(t, "400mbit", "20ms")
	v := w.vm(lab.VMOptions{Name: "web", Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "32MiB")}})
	if out, err := exec.Command("cp", w.path(lab.LocalDC, v.Disks[0]), w.path(lab.RemoteDC, "/var/lib/libvirt/images/taken")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cases := []struct {
		name string
		args []string
		want []string
	}{
		{"no such VM", []string{"wbe", "--to", "remote-dc"}, []string{`no VM "wbe"`, "web"}},
		{"no such site", []string{"web", "--to", "remote"}, []string{`"remote"`, "remote-dc"}},
		{"no such flag", []string{"web", "--two", "remote-dc"}, []string{"--two"}},
		{"no site", []string{"web"}, []string{"--to"}},
		{"no such disk", []string{"web", "--to", "remote-dc", "--storage", "vdx=/tmp"}, []string{"vdx", "vda"}},
		{"path taken", []string{"web", "--to", "remote-dc", "--storage", "vda=/var/lib/libvirt/images/taken"}, []string{"/var/lib/libvirt/images/taken", "exist"}},
		{"no such folder", []string{"web", "--to", "remote-dc", "--storage", "vda=/no/where/a"}, []string{"/no/where"}},
		{"no such network", []string{"web", "--to", "remote-dc", "--network", "br0=br7"}, []string{"br7"}},
		{"several at once", []string{"web", "--to", "remote-dc", "--dry-run", "--network", "br0=br7", "--storage", "vda=/no/where/a"}, []string{"br7", "/no/where"}},
	}
	for _, c := range cases {
		out, complaint, status := w.run(lab.LocalDC, "wanmig", append([]string{"move"}, c.args...)...)
		if status == 0 {
			t.Errorf("%s: the command succeeds: %s", c.name, out)
		}
		for _, want := range c.want {
			if !strings.Contains(out+complaint, want) {
				t.Errorf("%s: %q is not in: %s%s", c.name, want, out, complaint)
			}
		}
	}
	w.wanmig(lab.LocalDC, "move", "web", "--to", "remote-dc", "--dry-run")

	// What is taken there: the name by another guest, then the site's daemons.
	if _, complaint, status := w.run(lab.RemoteDC, "sh", "-c", `virsh -q define /dev/stdin <<'X'
<domain type='qemu'><name>web</name><memory unit='MiB'>64</memory><os><type arch='x86_64'>hvm</type></os></domain>
X`); status != 0 {
		t.Fatal(complaint)
	}
	w.refused("web", "name")
	if _, complaint, status := w.run(lab.RemoteDC, "virsh", "undefine", "web"); status != 0 {
		t.Fatal(complaint)
	}
	for _, dc := range lab.DataCentres {
		if _, complaint, status := w.run(dc, "sh", "-c", "mount -t tmpfs -o size=8m tmpfs /var/lib/wanmig && touch /var/lib/wanmig/journal.db"); status != 0 {
			t.Fatal(complaint)
		}
		w.refused("web", "8 MiB are free")
		if _, complaint, status := w.run(dc, "umount", "/var/lib/wanmig"); status != 0 {
			t.Fatal(complaint)
		}
	}
	if err := w.Sites[lab.RemoteDC].KillLibvirtd(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.refused("web", "libvirt")
	if err := w.Sites[lab.RemoteDC].KillAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.refused("web", "remote-dc")
	if out, complaint, status := w.run(lab.RemoteDC, "wanmig", "list"); status == 0 || !strings.Contains(complaint, "no agent") {
		t.Errorf("the command without an agent: status %d, %s%s", status, out, complaint)
	}
	if state := w.state(lab.LocalDC, "web"); state != "running" {
		t.Errorf("the guest is %s", state)
	}
	w.healthy(lab.LocalDC, v)
}

// refused checks that a move is refused for a reason.
func (w *world) refused(vm, why string) {
	w.t.Helper()
	out, complaint, status := w.run(lab.LocalDC, "wanmig", "move", vm, "--to", lab.RemoteDC)
	if status != 2 || !strings.Contains(out+complaint, why) {
		w.t.Errorf("want a refusal that names %q: status %d, %s%s", why, status, out, complaint)
	}
}

// TestRetries kills what a move needs at the destination. It is rolled back each
// time, and tried again by itself as soon as it is there again.
func TestRetries(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "40mbit", "20ms")
	const name = "stubborn"
	v := w.vm(lab.VMOptions{Name: name, Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "64MiB,format=qcow2")}, Write: 256 << 10})
	first := w.begin(name, "--retries", "3")
	w.await(lab.LocalDC, first, "memory", inMemory)
	if err := syscall.Kill(w.qemu(lab.RemoteDC, name), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second := w.next(first)
	if _, complaint, status := w.run(lab.LocalDC, "wanmig", "move", name, "--to", lab.RemoteDC); status == 0 || !strings.Contains(complaint, second) {
		t.Errorf("another move of it: status %d, %s", status, complaint)
	}
	if _, complaint, status := w.run(lab.LocalDC, "wanmig", "cancel", first); status == 0 || !strings.Contains(complaint, second) {
		t.Errorf("cancel of the first attempt: status %d, %s", status, complaint)
	}
	w.await(lab.LocalDC, second, "memory", inMemory)
	if err := w.Sites[lab.RemoteDC].KillAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.start(lab.RemoteDC, lab.Agent)
	third := w.next(second)
	s := w.await(lab.LocalDC, third, "its end", final)
	if s.Phase != migrate.PhaseDone || s.Result.Attempt != 3 {
		t.Fatalf("the third attempt ended %s: %+v", s.Phase, s.Result)
	}
	if held := s.Disks[0].Held; held == 0 {
		t.Error("the third attempt began from nothing")
	}
	w.healthy(lab.RemoteDC, v)

	// One that waits for a destination that stays away can be cancelled.
	move := w.beginAt(lab.RemoteDC, name, lab.LocalDC, "--retries", "1")
	w.await(lab.RemoteDC, move, "memory", inMemory)
	if err := w.Sites[lab.LocalDC].KillLibvirtd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.Sites[lab.LocalDC].KillAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.start(lab.LocalDC, lab.Agent)
	var last string
	for until := time.Now().Add(time.Minute); last == "" && time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if s := w.status(lab.RemoteDC, move); final(s) {
			last = s.Result.Next
		}
	}
	w.wanmig(lab.RemoteDC, "cancel", last)
	if s := w.await(lab.RemoteDC, last, "its end", final); s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, "cancelled") {
		t.Errorf("the cancelled attempt ended %s: %+v", s.Phase, s.Result)
	}
	w.healthy(lab.RemoteDC, v)
}

// next waits until a move was rolled back, and gives the one that follows it.
func (w *world) next(move string) string {
	w.t.Helper()
	s := w.await(lab.LocalDC, move, "its end", final)
	if s.Phase != migrate.PhaseRolledBack || s.Result.Next == "" {
		w.t.Fatalf("move %s ended %s and is not tried again: %+v", move, s.Phase, s.Result)
	}
	return s.Result.Next
}
