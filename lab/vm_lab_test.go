//go:build lab

package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// buildGuest builds the guest's program as make build does.
func buildGuest(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wanlab-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func createVM(t *testing.T, l *Lab, o VMOptions) *VM {
	t.Helper()
	o.Guest = buildGuest(t)
	v, err := l.CreateVM(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s answered after %.1f s (%s)", v.Name, v.BootTime.Seconds(), v.Accel)
	return v
}

// work waits until the guest has done some of its load, and measures its stops.
func work(t *testing.T, v *VM, site string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		r, err := v.Report(ctx, site)
		if err != nil {
			t.Fatal(err)
		}
		done := r.Pause.StopsSinceMS > 0 && r.Memory.DirtiedPages > 2000 && r.Memory.VerifiedPages > 2000
		for _, d := range r.Disks {
			done = done && d.Acknowledged > 20 && d.VerifiedBlocks > 5
		}
		if done {
			return
		}
		if err := pause(ctx); err != nil {
			t.Fatalf("the guest does not work: %+v", r)
		}
	}
}

func verify(t *testing.T, v *VM, site string) *api.Verification {
	t.Helper()
	result, err := v.Verify(t.Context(), site)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func wantNoErrors(t *testing.T, result *api.Verification) {
	t.Helper()
	if result.Bad() != 0 || result.Report.Errors() != 0 {
		t.Errorf("the guest has errors: %+v", result)
	}
	if result.Pages == 0 || result.Files == 0 {
		t.Errorf("the guest verified too little: %+v", result)
	}
}

const testDirty, testWrite = 4 << 20, 1 << 20

// awaitAnswer waits until a probe has heard of its guest.
func awaitAnswer(t *testing.T, p *Probe) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		p.mu.Lock()
		answers := p.meter.result.Answers
		p.mu.Unlock()
		if answers > 0 {
			return
		}
	}
	t.Fatal("no echo is answered")
}

func TestGuestVerifiesItselfUnderLoad(t *testing.T) {
	l := makeLab(t, DefaultLink())
	v := createVM(t, l, VMOptions{Name: "web", Dirty: testDirty, Write: testWrite, Disks: []DiskOptions{
		{Size: 256 << 20, Format: "raw", Bus: "virtio"}, {Size: 64 << 20, Format: "qcow2", Bus: "virtio"},
	}})
	work(t, v, LocalDC)

	probe, err := v.StartProbe(t.Context(), 5*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	site := l.Sites[LocalDC]
	awaitAnswer(t, probe) // or there is nothing before the stop
	if _, err := site.virsh(t.Context(), nil, "suspend", v.UUID); err != nil {
		t.Fatal(err)
	}
	const stop = time.Second
	time.Sleep(stop)
	if _, err := site.virsh(t.Context(), nil, "resume", v.UUID); err != nil {
		t.Fatal(err)
	}
	r := awaitStop(t, v, LocalDC)
	// The real-time clock is read to a few milliseconds.
	if got := time.Duration(r.Pause.LongestStopMS * float64(time.Millisecond)); got < stop-50*time.Millisecond {
		t.Errorf("the guest stopped for %v and more, and says %v", stop, got)
	}
	seen, err := probe.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if seen.Longest.Length < stop || len(seen.Switches) != 0 {
		t.Errorf("the guest stopped for %v and more, and the probe saw %+v", stop, seen)
	}

	none := int64(0)
	if r, err := v.Load(t.Context(), LocalDC, LoadChange{Dirty: &none, Write: &none}); err != nil || r.Load.Dirty != 0 || r.Load.Write != 0 || r.Load.WorkingSet == 0 {
		t.Errorf("load %+v, %v", r, err)
	}
	result := verify(t, v, LocalDC)
	wantNoErrors(t, result)
	if result.Blocks == 0 || len(result.Report.Disks) != 2 {
		t.Errorf("verified %+v", result)
	}
	for _, site := range []string{RemoteDC, Users} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if _, err := v.Report(ctx, site); err == nil {
			t.Errorf("a guest at %s answers at %s", LocalDC, site)
		}
		cancel()
	}
	if got := run(t, l, Users, "busybox", "wget", "-q", "-O", "-", "http://"+v.Address.String()+"/report"); !strings.Contains(got, v.Name) {
		t.Errorf("the users are answered %q", got)
	}

	// From outside, under the running guest: a block that it wrote and a file that it came with.
	image := site.Dir + v.Disks[0]
	damage(t, image, binary.LittleEndian.AppendUint64(nil, api.BlockCell), 1000)
	damage(t, image, []byte("\x7fELF\x02\x01\x01"), 100)
	result = verify(t, v, LocalDC)
	if result.BadBlocks != 1 || result.BadFiles != 1 || result.BadPages != 0 || result.Report.Disks[0].Errors != 2 || result.Report.Disks[1].Errors != 0 {
		t.Errorf("a byte of a block and a byte of a file are wrong, and the guest found %+v", result)
	}
	if first := strings.Join(result.Report.Disks[0].FirstErrors, "\n"); !strings.Contains(first, "damaged in 1 of 65536 bytes, first at offset 1000") {
		t.Errorf("described as %s", first)
	}
}

// awaitStop waits until the guest has measured a stop for good, which takes it some seconds.
func awaitStop(t *testing.T, v *VM, site string) *api.Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		r, err := v.Report(ctx, site)
		if err != nil {
			t.Fatal(err)
		}
		if r.Pause.Stops > 0 && r.UptimeMS > r.Pause.LongestStopAtMS+4000 {
			return r
		}
		if err := pause(ctx); err != nil {
			t.Fatalf("the guest did not notice that it was stopped: %+v", r.Pause)
		}
	}
}

// damage changes the byte at an offset into the first block of the image, counting blocks of 4096, that starts with magic.
func damage(t *testing.T, image string, magic []byte, offset int64) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 4096)
	for at := int64(0); ; at += int64(len(block)) {
		if _, err := io.ReadFull(f, block); err != nil {
			t.Fatalf("%s has no block that starts with %q: %v", image, magic, err)
		}
		if bytes.HasPrefix(block, magic) {
			if _, err := f.WriteAt([]byte{block[offset] ^ 1}, at+offset); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

func TestGuestAnswersByTheNICThatWasAsked(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeLab(t, LinkSettings{})
	v := createVM(t, l, VMOptions{Name: "web", SecondNIC: true, Memory: 256 << 20, Disks: []DiskOptions{{Size: 16 << 20, Format: "raw", Bus: "virtio"}}})
	again, err := l.VM("web")
	if err != nil || again.Second == nil || *again.Second != *v.Second {
		t.Fatalf("the VM's second NIC is %+v, %v; want %+v", again.Second, err, v.Second)
	}
	addresses := []netip.Addr{v.Address, v.Address6, v.Second.Address, v.Second.Address6}
	for i, mac := range []string{v.MAC, v.Second.MAC} {
		for _, address := range addresses {
			run(t, l, Users, "ping", "-c", "1", "-W", "5", address.String())
		}
		// Unplugged, a NIC and its own addresses are silent, and the other one does not need it.
		run(t, l, LocalDC, "virsh", "domif-setlink", v.UUID, mac, "down")
		for n, address := range addresses {
			_, err := l.output(t.Context(), Users, "ping", "-c", "2", "-i", "0.2", "-W", "1", address.String())
			if silent := n/2 == i; silent != (err != nil) {
				t.Errorf("ping to %s with %s unplugged: %v", address, mac, err)
			}
		}
		run(t, l, LocalDC, "virsh", "domif-setlink", v.UUID, mac, "up")
	}
}

func TestGuestMovesByVirsh(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeLab(t, LinkSettings{Rate: 1e9, RTT: 10 * time.Millisecond})
	v := createVM(t, l, VMOptions{Name: "web", Dirty: testDirty, Write: testWrite, Disks: []DiskOptions{{Size: 64 << 20, Format: "raw", Bus: "virtio"}}})
	work(t, v, LocalDC)
	if out, err := exec.Command("truncate", "-s", "64M", l.Sites[RemoteDC].Dir+v.Disks[0]).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	probe, err := v.StartProbe(t.Context(), 5*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	run(t, l, LocalDC, "virsh", "migrate", "--live", "--copy-storage-all", "--persistent", "--undefinesource", v.UUID, l.Sites[RemoteDC].LibvirtURI)
	if site, err := v.Site(t.Context()); err != nil || site != RemoteDC {
		t.Fatalf("the guest is at %q, %v", site, err)
	}
	r := awaitStop(t, v, RemoteDC)
	seen, err := probe.Stop()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("down for %v as seen from outside, stopped for %.0f ms by the guest's own measure, longest wait for a disk %d ms",
		seen.Longest.Length, r.Pause.LongestStopMS, r.Disks[0].LongestWaitMS)
	if len(seen.Switches) != 1 || seen.Switches[0].From != LocalDC || seen.Switches[0].To != RemoteDC {
		t.Errorf("one move made the switches %+v", seen.Switches)
	}
	wantNoErrors(t, verify(t, v, RemoteDC))
}

func TestGuestOfEveryKindOfDisk(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeLab(t, DefaultLink())
	backing := filepath.Join(t.TempDir(), "loop.img")
	if out, err := exec.Command("truncate", "-s", "64M", backing).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := exec.Command("losetup", "--show", "-f", backing).Output()
	if err != nil {
		t.Fatal(err)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", loop).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	v := createVM(t, l, VMOptions{Name: "web server", Site: RemoteDC, Transient: true, CDROM: true, Memory: 256 << 20, Write: testWrite, Disks: []DiskOptions{
		{Size: 128 << 20, Format: "qcow2", Bus: "virtio", Backing: true},
		{Size: 64 << 20, Format: "raw", Bus: "scsi"},
		{Device: loop, Format: "raw", Bus: "virtio"},
	}})
	result := verify(t, v, RemoteDC)
	wantNoErrors(t, result)
	if n := len(result.Report.Disks); n != 3 {
		t.Errorf("the guest has %d disks, want 3", n)
	}
	for _, d := range result.Report.Disks {
		if d.Files == 0 {
			t.Errorf("%s has no files", d.Device)
		}
	}
	site := l.Sites[RemoteDC]
	info := run(t, l, RemoteDC, "qemu-img", "info", "--force-share", v.Disks[0])
	if !strings.Contains(info, "backing file: web server.disk0.base.qcow2") {
		t.Errorf("no backing file in\n%s", info)
	}
	if thin := allocated(t, site.Dir+v.Disks[1]); thin > 48<<20 {
		t.Errorf("an image of 64 MiB with 16 MiB of files takes %d bytes", thin)
	}
	// What is on the device now must not be overwritten.
	if _, _, err := site.makeDisk(t.Context(), nil, image{}, "other", 0, DiskOptions{Device: loop, Format: "raw", Bus: "virtio"}); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("a device in use: %v", err)
	}

	if err := v.PowerOff(t.Context(), RemoteDC); err != nil {
		t.Fatal(err)
	}
	for state := ""; state != "absent"; {
		if state, err = v.state(t.Context(), site); err != nil {
			t.Fatal(err)
		}
		if err := pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("e2fsck", "-fn", loop).CombinedOutput(); err != nil {
		t.Errorf("file system after power-off: %v: %s", err, out)
	}
	if err := v.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNothingLeft(t, l, v.Name)
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func wantNothingLeft(t *testing.T, l *Lab, name string) {
	t.Helper()
	if _, err := l.VM(name); !errors.Is(err, ErrNoVM) {
		t.Errorf("VM %q: %v, want ErrNoVM", name, err)
	}
	for _, dc := range DataCentres {
		if out, err := l.Sites[dc].virsh(t.Context(), nil, "list", "--all", "--name"); err != nil || strings.TrimSpace(string(out)) != "" {
			t.Errorf("%s has domains %q, %v", dc, out, err)
		}
		for _, dir := range []string{imageDir, "/var/lib/libvirt/qemu/nvram"} {
			files, err := os.ReadDir(l.Sites[dc].Dir + dir)
			if err != nil && !errors.Is(err, os.ErrNotExist) || len(files) != 0 {
				t.Errorf("%s has %v in %s, %v", dc, files, dir, err)
			}
		}
	}
}

func TestGuestWithUEFIAndSATA(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeLab(t, DefaultLink())
	v := createVM(t, l, VMOptions{Name: "efi", UEFI: true, Disks: []DiskOptions{{Size: 64 << 20, Format: "qcow2", Bus: "sata"}}})
	result := verify(t, v, LocalDC)
	wantNoErrors(t, result)
	if got := result.Report.Disks[0].Device; got != "sda" {
		t.Errorf("the disk is %s, want sda", got)
	}
	if nvram := fmt.Sprintf("%s/var/lib/libvirt/qemu/nvram/%s_VARS.fd", l.Sites[LocalDC].Dir, v.Name); allocated(t, nvram) == 0 {
		t.Errorf("%s is empty", nvram)
	}
	if _, err := l.CreateVM(t.Context(), VMOptions{Name: "efi", Guest: buildGuest(t)}); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second VM of the same name: %v", err)
	}
	if err := v.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNothingLeft(t, l, v.Name)
}

func TestGuestThatDoesNotComeUp(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeLab(t, DefaultLink())
	broken := filepath.Join(t.TempDir(), "guest")
	if err := os.WriteFile(broken, []byte("#!/bin/busybox sh\necho out of order\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := l.CreateVM(t.Context(), VMOptions{Name: "broken", Guest: broken, Disks: []DiskOptions{{Size: 16 << 20, Format: "raw", Bus: "virtio"}}})
	if err == nil {
		t.Fatal("a guest without a program came up")
	}
	for _, want := range []string{"did not stay up", "out of order", "Kernel panic"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not have %q: %v", want, err)
		}
	}
	wantNothingLeft(t, l, "broken")
}
