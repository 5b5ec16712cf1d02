//go:build lab

package e2e

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// TestDoubt brings moves into doubt, by a destination that is cut off, or killed,
// between the offer and its answer; and has an operator decide them, in each way. In
// between a host starts anew.
func TestDoubt(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "100mbit", "20ms")
	const name = "asked after"
	v := w.vm(lab.VMOptions{Name: name, Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "32MiB,format=qcow2")}})
	w.virsh(lab.LocalDC, "autostart", name)

	// A host that starts anew has the guest again that it would have started.
	move := w.rebootIn(name)
	w.ends(lab.LocalDC, move, "rolled-back")
	w.boots(lab.LocalDC, v)
	w.healthy(lab.LocalDC, v)
	w.autostarts(lab.LocalDC, name)

	// The source is not to start what it has offered, nor to be told to by mistake.
	move = w.cutInHandoff(name)
	if out, _, _ := w.run(lab.LocalDC, "virsh", "-q", "list", "--all", "--persistent", "--name"); strings.Contains(out, name) {
		t.Errorf("the guest is defined at a source that has offered it: %s", out)
	}
	status := w.wanmig(lab.LocalDC, "status", move)
	for _, word := range []string{"in doubt", "--run-here", "--abandon-here"} {
		if !strings.Contains(status, word) {
			t.Errorf("no %q in the status:\n%s", word, status)
		}
	}
	w.refusesWord(lab.LocalDC, move, "nobody is there", "--run-here")
	// The destination is cut off, and has decided: whoever says so answers for it.
	w.wanmig(lab.LocalDC, "recover", move, "--abandon-here", "--yes")
	w.ends(lab.LocalDC, move, "abandoned")
	w.refusesWord(lab.LocalDC, move, "over", "--run-here", "--yes")
	w.decidedThere(move, true)
	w.cut(false)
	w.healthy(lab.RemoteDC, v)
	w.virsh(lab.LocalDC, "undefine", name)
	for _, image := range v.Disks {
		w.run(lab.LocalDC, "rm", image)
	}
	w.move(lab.RemoteDC, name, lab.LocalDC)
	w.autostarts(lab.LocalDC, name)

	// The destination's libvirtd and its agent die in the moment of the resume: the
	// operator at the source has the guest run on, and the destination yields.
	move = w.killInHandoff(name)
	w.await(lab.LocalDC, move, "doubt", inDoubt)
	w.wanmig(lab.LocalDC, "recover", move, "--run-here", "--yes")
	if state := w.state(lab.LocalDC, name); state != "running" {
		t.Errorf("run here, it is %s", state)
	}
	w.healthy(lab.LocalDC, v)
	w.ends(lab.LocalDC, move, "rolled-back")
	w.refusesWord(lab.LocalDC, move, "runs here already", "--run-here", "--yes")
	w.revive(lab.RemoteDC)
	w.ends(lab.RemoteDC, move, "rolled-back")
	w.unharmed(v)

	if !soaking {
		return // TestFaults has an operator decide at the destination
	}

	// The same, decided at the destination: it gives the guest back.
	move = w.killInHandoff(name)
	w.await(lab.LocalDC, move, "doubt", inDoubt)
	w.revive(lab.RemoteDC)
	w.await(lab.RemoteDC, move, "doubt", inDoubt)
	if state := w.state(lab.LocalDC, name); state != "paused" {
		t.Errorf("while the destination is in doubt it is %s at the source", state)
	}
	w.wanmig(lab.RemoteDC, "recover", move, "--abandon-here", "--yes")
	w.ends(lab.RemoteDC, move, "rolled-back")
	w.ends(lab.LocalDC, move, "rolled-back")
	w.unharmed(v)

	// Or has it run there, from its disks: what was in its memory is lost.
	move = w.killInHandoff(name)
	w.await(lab.LocalDC, move, "doubt", inDoubt)
	w.revive(lab.RemoteDC)
	w.await(lab.RemoteDC, move, "doubt", inDoubt)
	w.wanmig(lab.RemoteDC, "recover", move, "--run-here", "--yes")
	w.ends(lab.RemoteDC, move, "done")
	w.ends(lab.LocalDC, move, "done")
	if here, there := w.state(lab.LocalDC, name), w.state(lab.RemoteDC, name); here != "absent" || there != "running" {
		t.Errorf("the guest is %s at the source and %s at the destination", here, there)
	}
}

func inDoubt(s migrate.Status) bool { return s.Phase == migrate.PhaseInDoubt && s.Result != nil }

// boots waits until a guest that has booted anew answers.
func (w *world) boots(site string, v *lab.VM) {
	w.t.Helper()
	var err error
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(200 * time.Millisecond) {
		if _, err = v.Report(w.t.Context(), site); err == nil {
			return
		}
	}
	w.t.Fatalf("the guest at %s does not answer: %v", site, err)
}

func (w *world) autostarts(site, vm string) {
	w.t.Helper()
	if out, _, _ := w.run(site, "virsh", "dominfo", vm); !strings.Contains(strings.Join(strings.Fields(out), " "), "Autostart: enable") {
		w.t.Errorf("autostart is lost:\n%s", out)
	}
}

// rebootIn begins a move, and has the host at the source start anew meanwhile.
func (w *world) rebootIn(vm string) (move string) {
	w.t.Helper()
	move = w.begin(vm)
	w.await(lab.LocalDC, move, "memory", inMemory)
	ctx, qemu := w.t.Context(), w.qemu(lab.LocalDC, vm)
	for _, kill := range []func() error{
		func() error { return w.Sites[lab.LocalDC].KillAgent(ctx) },
		func() error { return w.Sites[lab.LocalDC].KillLibvirtd(ctx) },
		func() error { return syscall.Kill(qemu, syscall.SIGKILL) },
	} {
		if err := kill(); err != nil {
			w.t.Fatal(err)
		}
	}
	const boot = "echo another > /run/boot_id && mount --bind /run/boot_id /proc/sys/kernel/random/boot_id"
	if _, complaint, status := w.run(lab.LocalDC, "sh", "-c", boot); status != 0 {
		w.t.Fatal(complaint)
	}
	w.revive(lab.LocalDC)
	return move
}

// cutInHandoff begins a move and cuts the link when the destination has the offer
// and can't answer it. When it can, it will.
func (w *world) cutInHandoff(vm string) (move string) {
	w.t.Helper()
	move = w.begin(vm)
	w.await(lab.LocalDC, move, "memory", inMemory)
	w.signal(lab.RemoteDC, lab.Libvirtd, syscall.SIGSTOP)
	w.await(lab.RemoteDC, move, "the handoff", func(s migrate.Status) bool { return s.Phase == migrate.PhaseHandoff })
	w.cut(true)
	w.signal(lab.RemoteDC, lab.Libvirtd, syscall.SIGCONT)
	w.ends(lab.RemoteDC, move, "done")
	if err := w.Sites[lab.LocalDC].KillAgent(w.t.Context()); err != nil { // else it waits for the session
		w.t.Fatal(err)
	}
	w.start(lab.LocalDC, lab.Agent)
	w.await(lab.LocalDC, move, "doubt", inDoubt)
	return move
}

// killInHandoff begins a move and kills the destination's QEMU, libvirtd and agent
// when the guest is accepted, and has not been resumed.
func (w *world) killInHandoff(vm string) (move string) {
	w.t.Helper()
	move = w.begin(vm)
	w.await(lab.LocalDC, move, "memory", inMemory)
	qemu := w.qemu(lab.RemoteDC, vm)
	w.signal(lab.RemoteDC, lab.Libvirtd, syscall.SIGSTOP)
	w.await(lab.RemoteDC, move, "the handoff", func(s migrate.Status) bool { return s.Phase == migrate.PhaseHandoff })
	ctx := w.t.Context()
	for _, kill := range []func() error{
		func() error { return w.Sites[lab.RemoteDC].KillAgent(ctx) },
		func() error { return syscall.Kill(qemu, syscall.SIGKILL) },
		func() error { return w.Sites[lab.RemoteDC].KillLibvirtd(ctx) },
	} {
		if err := kill(); err != nil {
			w.t.Fatal(err)
		}
	}
	return move
}

// revive starts a site's daemons again.
func (w *world) revive(site string) {
	w.t.Helper()
	w.start(site, lab.Libvirtd)
	w.start(site, lab.Agent)
}

func (w *world) start(site, daemon string) {
	w.t.Helper()
	start := w.Sites[site].StartAgent
	if daemon == lab.Libvirtd {
		start = w.Sites[site].StartLibvirtd
	}
	if err := start(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// ends waits until a move has ended as said at a site.
func (w *world) ends(site, move, result string) {
	w.t.Helper()
	var s migrate.Status
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if s = w.status(site, move); final(s) && s.Result.Result == result {
			return
		}
	}
	w.t.Fatalf("move %s at %s is at %s and not %s: %+v", move, site, s.Phase, result, s.Result)
}

// decidedThere checks that the guest of a move runs at the destination, or not.
func (w *world) decidedThere(move string, runs bool) {
	w.t.Helper()
	s := w.status(lab.RemoteDC, move)
	if state := w.state(lab.RemoteDC, s.VM); runs != (state == "running") {
		w.t.Errorf("the guest is %s at the destination", state)
	}
}

// refusesWord checks that an operator's word is refused, and why.
func (w *world) refusesWord(site, move, why string, word ...string) {
	w.t.Helper()
	out, complaint, status := w.run(site, "wanmig", append([]string{"recover", move}, word...)...)
	if status == 0 || !strings.Contains(out+complaint, why) {
		w.t.Errorf("recover %v: status %d, %s%s, want %q", word, status, out, complaint, why)
	}
}

func (w *world) virsh(site string, args ...string) {
	w.t.Helper()
	if out, complaint, status := w.run(site, "virsh", args...); status != 0 {
		w.t.Fatalf("virsh %v at %s: %s%s", args, site, out, complaint)
	}
}
