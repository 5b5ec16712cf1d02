//go:build lab

// Package kerneltest boots Debian's kernel in a small guest, for tests of what
// the kernel of the machine that they run on may not have. The guest's root is
// the initrd alone: busybox, kernel modules, and programs of this machine.
package kerneltest

import (
	"cmp"
	"debug/elf"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/lab"
)

// A Guest says what boots.
type Guest struct {
	// Modules are loaded before Script runs, each after those that it needs.
	Modules []string
	// Programs of this machine are in the guest at their own paths, with the
	// libraries that they need. Those without a slash are looked for in PATH.
	Programs []string
	// Script is run by sh -ex. All applets of busybox come last in its PATH. The
	// guest stops when it ends.
	Script string
	// Tap is the interface that the guest's eth0 is at the other end of, "" if it
	// has none.
	Tap string
	// Memory of the guest, in MiB.
	Memory int
}

//go:embed init.sh
var initScript string

// QEMU returns the command line that runs the guest, and the path of the file
// that gets what its console says. Both are good until the test ends.
func (g Guest) QEMU(t testing.TB) (command []string, console string) {
	t.Helper()
	cache := cmp.Or(os.Getenv("WANLAB_CACHE"), lab.DefaultCache)
	kernels, _ := filepath.Glob(filepath.Join(cache, "package-linux-image-[0-9]*-cloud-amd64/boot/vmlinuz-*"))
	if len(kernels) == 0 {
		t.Fatalf("no kernel of Debian's in %s: make build, and then bin/wanlab image", cache)
	}
	kernel := kernels[len(kernels)-1]
	dir := t.TempDir()
	initrd, console := filepath.Join(dir, "initrd"), filepath.Join(dir, "console")
	if err := g.pack(kernel, filepath.Join(dir, "root"), initrd); err != nil {
		t.Fatal(err)
	}
	command = []string{"qemu-system-x86_64", "-accel", "tcg", "-m", fmt.Sprint(g.Memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1 mitigations=off", "-serial", "file:" + console}
	if g.Tap != "" {
		command = append(command, "-netdev", "tap,id=net,script=no,downscript=no,ifname="+g.Tap, "-device", "virtio-net-pci,netdev=net,romfile=")
	}
	return command, console
}

// pack makes the guest's root in a directory, and the initrd of it.
func (g Guest) pack(kernel, root, initrd string) error {
	release := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	modules, err := lab.ResolveModules(filepath.Join(filepath.Dir(kernel), "../lib/modules", release), g.Modules)
	if err != nil {
		return err
	}
	files := map[string]string{} // where they come from
	for i, m := range modules {
		files[fmt.Sprintf("/modules/%02d-%s", i, filepath.Base(m))] = m
	}
	if files["/bin/busybox"], err = exec.LookPath("busybox"); err != nil {
		return err
	}
	// Busybox's own shell would take its applets for ip(8) and others.
	for _, name := range append([]string{"/bin/sh"}, g.Programs...) {
		program, err := exec.LookPath(name)
		if err != nil {
			return err
		}
		needs, err := libraries(program)
		if err != nil {
			return err
		}
		for _, file := range append(needs, program) {
			files[file] = file
		}
	}
	for to, from := range files {
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := write(root+to, b); err != nil {
			return err
		}
	}
	for path, text := range map[string]string{"/init": initScript, "/script": g.Script} {
		if err := write(root+path, []byte(text)); err != nil {
			return err
		}
	}
	for _, d := range []string{"proc", "sys", "dev", "tmp", "applets"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	archive := exec.Command("sh", "-c", "find . | busybox cpio -o -H newc >"+initrd)
	archive.Dir = root
	if out, err := archive.CombinedOutput(); err != nil {
		return fmt.Errorf("pack initrd: %w: %s", err, out)
	}
	return nil
}

func write(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o755)
}

// libraries lists the shared ones that a program needs, its loader included.
func libraries(program string) (paths []string, err error) {
	f, err := elf.Open(program)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	defer f.Close()
	if f.Section(".interp") == nil {
		return nil, nil // linked statically
	}
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: %w", program, err)
	}
	for field := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(field, "/") {
			paths = append(paths, field)
		}
	}
	return paths, nil
}
