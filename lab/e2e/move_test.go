//go:build lab

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/lab"
)

// TestMoves moves guests of every kind, live and under load. They land paused,
// so that the images of both sites can be compared, and go on afterwards.
func TestMoves(t *testing.T) {
	t.Parallel() // beside the redirects, which mostly wait
	w := newWorld(t, "400mbit", "20ms")
	const size = "256MiB"
	cases := []struct {
		name  string
		vm    lab.VMOptions
		disks []string
		move  []string
	}{
		{"raw, transient", lab.VMOptions{Name: "raw", Transient: true}, []string{size}, nil},
		{"qcow2 with a backing file, persistent, a name with a space", lab.VMOptions{Name: "web server"}, []string{size + ",format=qcow2,backing=yes"}, nil},
		{"SATA, UEFI with its variables, a CD-ROM carried", lab.VMOptions{Name: "uefi", UEFI: true, CDROM: true}, []string{size + ",format=qcow2,bus=sata"}, []string{"--copy-cdrom"}},
		{"two disks, memory and disks written", lab.VMOptions{Name: "busy", Dirty: 8 << 20, Write: 2 << 20, WorkingSet: 32 << 20},
			[]string{size, "128MiB,format=qcow2,bus=scsi"}, nil},
		{"a CD-ROM ejected, disks in another folder", lab.VMOptions{Name: "cd", CDROM: true}, []string{size}, []string{"--storage", "/var/lib/libvirt/images=/var/lib/libvirt/moved"}},
	}
	if err := os.Mkdir(w.path(lab.RemoteDC, "/var/lib/libvirt/moved"), 0o755); err != nil {
		t.Fatal(err)
	}
	if !soaking {
		cases = cases[:3]
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := &world{w.Lab, t}
			c.vm.Memory = 192 << 20
			for _, d := range c.disks {
				c.vm.Disks = append(c.vm.Disks, disk(t, d))
			}
			v := w.vm(c.vm)
			defer func() {
				if err := v.Remove(t.Context()); err != nil {
					t.Error(err)
				}
			}()
			r := w.move(lab.LocalDC, c.vm.Name, lab.RemoteDC, append([]string{"--paused", "--keep-source"}, c.move...)...)
			t.Logf("%d ms, %d MiB sent for %d MiB of disks and %d MiB of memory", r.TotalMS, r.WireBytesSent>>20, r.DiskBytes>>20, r.MemoryBytes>>20)
			if m := r.Reduction; m == nil || m.Memory.Zero.Pages == 0 || m.Memory.Reference.Pages == 0 || m.Memory.Data.Pages == 0 {
				t.Errorf("memory was not reduced: %+v", m)
			}
			if here, there := w.state(lab.LocalDC, c.vm.Name), w.state(lab.RemoteDC, c.vm.Name); here != "absent" || there != "paused" {
				t.Fatalf("the guest is %s at the source and %s at the destination", here, there)
			}
			for i, path := range v.Disks {
				to := path
				if strings.Contains(strings.Join(c.move, " "), "moved") {
					to = filepath.Join("/var/lib/libvirt/moved", filepath.Base(path))
				}
				w.same(c.vm.Disks[i].Format, w.path(lab.LocalDC, path), w.path(lab.RemoteDC, to))
				w.thin(w.path(lab.LocalDC, path), w.path(lab.RemoteDC, to))
			}
			if _, complaint, status := w.run(lab.RemoteDC, "virsh", "resume", c.vm.Name); status != 0 {
				t.Fatal(complaint)
			}
			w.healthy(lab.RemoteDC, v)
			w.checkDefinition(c.vm)
		})
	}
}

// checkDefinition checks that a guest is at the destination what it was at the source.
func (w *world) checkDefinition(o lab.VMOptions) {
	w.t.Helper()
	xml, complaint, status := w.run(lab.RemoteDC, "virsh", "dumpxml", o.Name)
	if status != 0 {
		w.t.Fatal(complaint)
	}
	if strings.Contains(xml, "<backingStore type=") {
		w.t.Errorf("the disk arrived with a backing file:\n%s", xml)
	}
	_, _, inactive := w.run(lab.RemoteDC, "virsh", "-q", "dumpxml", "--inactive", o.Name)
	list, _, _ := w.run(lab.RemoteDC, "virsh", "-q", "list", "--all", "--persistent", "--name")
	if persistent := strings.Contains(list, o.Name); persistent == o.Transient || inactive != 0 {
		w.t.Errorf("transient at the source: %v; persistent at the destination: %v", o.Transient, persistent)
	}
	if o.UEFI && !strings.Contains(xml, "<nvram") {
		w.t.Errorf("no UEFI variables at the destination:\n%s", xml)
	}
}

// TestMoveOfABlockDevice moves a guest from one loop device to another.
func TestMoveOfABlockDevice(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "400mbit", "20ms")
	const size = 128 << 20
	from, to := loop(t, size), loop(t, size)
	v := w.vm(lab.VMOptions{Name: "block", Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, from)}, Dirty: 4 << 20, Write: 1 << 20})
	w.move(lab.LocalDC, "block", lab.RemoteDC, "--paused", "--storage", from+"="+to)
	w.same("raw", from, to)
	if _, complaint, status := w.run(lab.RemoteDC, "virsh", "resume", "block"); status != 0 {
		t.Fatal(complaint)
	}
	w.healthy(lab.RemoteDC, v)
	if err := v.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// loop makes a loop device of its own file.
func loop(t *testing.T, size int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	})
	return dev
}

// TestRoundTrip moves one guest under load back and forth: some times, and twenty in a soak.
func TestRoundTrip(t *testing.T) {
	t.Parallel() // beside the redirects, which mostly wait
	w := newWorld(t, "400mbit", "20ms")
	v := w.vm(lab.VMOptions{Name: "traveller", Memory: 128 << 20, Disks: []lab.DiskOptions{disk(t, "128MiB")},
		Dirty: 4 << 20, Write: 1 << 20, WorkingSet: 32 << 20})
	sites := [2]string{lab.LocalDC, lab.RemoteDC}
	var downtimes []int64
	moves := 2
	if soaking {
		moves = 20
	}
	for i := range moves {
		from, to := sites[i%2], sites[(i+1)%2]
		r := w.move(from, "traveller", to)
		downtimes = append(downtimes, r.DowntimeMS)
		if left := w.images(from); len(left) != 0 {
			t.Fatalf("move %d left %v at %s", i+1, left, from)
		}
		report, err := v.Report(t.Context(), to)
		if err != nil {
			t.Fatalf("after move %d the guest does not answer at %s: %v", i+1, to, err)
		}
		if report.Errors() != 0 {
			t.Fatalf("after move %d the guest reports errors: %+v", i+1, report)
		}
	}
	w.healthy(sites[moves%2], v)
	t.Log(fmt.Sprintf("%d moves, downtimes in ms: %v", moves, downtimes))
}
