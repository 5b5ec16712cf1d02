package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestDebianSources(t *testing.T) {
	targets := `Debian bookworm http://deb.debian.org/debian/ bookworm main
Debian bookworm http://deb.debian.org/debian/ bookworm main
Debian bookworm http://deb.debian.org/debian/ bookworm contrib
Debian bookworm-security http://deb.debian.org/debian-security/ bookworm-security main
Debian trixie http://deb.debian.org/debian/ trixie main
Debian bookwormish http://deb.debian.org/debian/ bookwormish main
. nodistro https://deb.nodesource.com/node_20.x/ nodistro main
Debian bookworm http://deb.debian.org/debian/

Google Inc bookworm http://example.org/ bookworm main
`
	want := []string{
		"deb http://deb.debian.org/debian/ bookworm main\n",
		"deb http://deb.debian.org/debian/ bookworm contrib\n",
		"deb http://deb.debian.org/debian-security/ bookworm-security main\n",
	}
	if got := debianSources([]byte(targets)); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestLinesAreToldWhole(t *testing.T) {
	var told []string
	w := &lineWriter{line: func(s string) { told = append(told, s) }}
	for _, part := range []string{"I: one", "\ntwo\n", "\n \n", strings.Repeat("x", 3*maxLine), "\n"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	if len(told) < 3 || told[0] != "one" || told[1] != "two" {
		t.Errorf("told %.40q", told)
	}
	for _, line := range told {
		if len(line) > maxLine {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
	for n := range 100 {
		fmt.Fprintf(w, "%d\n", n)
	}
	if want := []string{"92", "93", "94", "95", "96", "97", "98", "99"}; !slices.Equal(w.last, want) {
		t.Errorf("kept %q, want %q", w.last, want)
	}
}

func TestDebianOptions(t *testing.T) {
	o := VMOptions{Name: "db", Image: DebianSecond}
	if err := o.complete(DataCentres); err != nil {
		t.Fatal(err)
	}
	if o.Memory != 1<<30 || o.WorkingSet != 8<<20 || !slices.Equal(o.Disks, []DiskOptions{{Size: 3 << 30, Format: "raw", Bus: "virtio"}}) {
		t.Errorf("completed to %+v", o)
	}
	data := DiskOptions{Size: 1 << 30, Format: "qcow2", Bus: "scsi"}
	o = VMOptions{Name: "db", Image: Debian, Disks: []DiskOptions{{Size: 3 << 30, Format: "qcow2", Bus: "virtio", Backing: true}, data}}
	if err := o.complete(DataCentres); err != nil {
		t.Errorf("a qcow2 disk with a backing file, and a second disk: %v", err)
	}
	for what, bad := range map[string]VMOptions{
		"another system":      {Image: "ubuntu"},
		"ssh":                 {Image: Debian, SSH: true},
		"guest agent":         {Image: Debian, GuestAgent: true},
		"UEFI":                {Image: Debian, UEFI: true},
		"CD-ROM":              {Image: Debian, CDROM: true},
		"a small first disk":  {Image: Debian, Disks: []DiskOptions{data}},
		"a SCSI first disk":   {Image: Debian, Disks: []DiskOptions{{Size: 3 << 30, Format: "raw", Bus: "scsi"}}},
		"a SATA second disk":  {Image: Debian, Disks: []DiskOptions{{Size: 3 << 30, Format: "raw", Bus: "virtio"}, {Size: 1 << 30, Format: "raw", Bus: "sata"}}},
		"a large first disk":  {Image: Debian, Disks: []DiskOptions{{Size: 4 << 30, Format: "raw", Bus: "virtio"}}},
		"a path of an image":  {Image: "/etc/passwd"},
		"an image of a child": {Image: "debian/../debian"},
	} {
		bad.Name = "db"
		if bad.complete(DataCentres) == nil {
			t.Errorf("%s was accepted", what)
		}
	}
}

func TestCommandLineNamesTheRootOfASystem(t *testing.T) {
	l := newLab(t.TempDir())
	v, err := l.register("db", LocalDC)
	if err != nil {
		t.Fatal(err)
	}
	if got := v.cmdline(l.Sites[LocalDC], VMOptions{}); strings.Contains(got, "wanlab.root") {
		t.Errorf("without a system: %s", got)
	}
	if got := v.cmdline(l.Sites[LocalDC], VMOptions{Image: Debian}); !strings.Contains(got+" ", " wanlab.root=vda ") {
		t.Errorf("with Debian: %s", got)
	}
}

func TestCopyKernel(t *testing.T) {
	root, dir := t.TempDir(), t.TempDir()
	for path, content := range map[string]string{"boot/vmlinuz-6.1.0-1-cloud-amd64": "kernel", "usr/lib/modules/6.1.0-1-cloud-amd64/modules.builtin": "kernel/a.ko\n"} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := copyKernel(root, dir); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"boot/vmlinuz-6.1.0-1-cloud-amd64": "kernel", "lib/modules/6.1.0-1-cloud-amd64/modules.builtin": "kernel/a.ko\n"} {
		if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "boot/vmlinuz-6.1.0-2-cloud-amd64"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := copyKernel(root, t.TempDir()); err == nil {
		t.Error("one of two kernels was taken")
	}
}
