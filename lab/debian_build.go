package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// debianBuilderName is the name of a process that installs Debian into the directory that is its argument. It is process 1
// of a PID namespace and has a mount namespace of its own: however it ends, the kernel ends all that it started with it, and
// unmounts all that it mounted. What it installs from is its standard input, as in sources.list(5).
const debianBuilderName = "wanlab-debian"

const (
	debianDiskName = "disk.raw"
	debianFiles    = 128 << 20 // bytes of files that a guest verifies
)

// installDebian makes a disk and fills it.
func installDebian(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	disk, root := filepath.Join(dir, debianDiskName), filepath.Join(dir, "root")
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(disk, debianDisk); err != nil {
		return err
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	// A file system that is mounted while files are written has them where a machine's own would have them; mke2fs -d lays
	// them out side by side, and twice in the same way.
	for _, c := range [][]string{
		{"mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", disk},
		{"mount", "-t", "ext4", "-o", "loop,barrier=0", disk, root},
	} {
		if _, err := output(exec.Command(c[0], c[1:]...)); err != nil {
			return err
		}
	}
	install := exec.Command(debianInstall[0], append(debianInstall[1:], debianRelease, root, "-")...)
	// What it leaves in TMPDIR when it is killed goes with the directory.
	install.Env = append(os.Environ(), "WANLAB_SETUP="+debianSetup, "LC_ALL=C.UTF-8", "TMPDIR="+dir)
	install.Stdin, install.Stdout, install.Stderr = os.Stdin, os.Stdout, os.Stdout
	if err := install.Run(); err != nil {
		return fmt.Errorf("%s: %w", debianInstall[0], err)
	}
	var id [16]byte
	rand.Read(id[:])
	if err := os.WriteFile(filepath.Join(root, "etc/machine-id"), []byte(hex.EncodeToString(id[:])+"\n"), 0o444); err != nil {
		return err
	}
	if err := writeManifest(root); err != nil {
		return fmt.Errorf("list files: %w", err)
	}
	if err := copyKernel(root, dir); err != nil {
		return fmt.Errorf("copy kernel: %w", err)
	}
	fmt.Println("I: trimming...")
	// What was deleted can be trimmed when the journal has it.
	for _, c := range [][]string{{"sync", "--file-system", root}, {"fstrim", root}} {
		if _, err := output(exec.Command(c[0], c[1:]...)); err != nil {
			return err
		}
	}
	if err := unix.Unmount(root, 0); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	if err := os.Remove(root); err != nil {
		return err
	}
	_, err := output(exec.Command("e2fsck", "-f", "-n", disk))
	return err
}

// writeManifest lists files for the guest to verify that nobody changes while it runs.
func writeManifest(root string) error {
	manifest, err := os.Create(filepath.Join(root, api.Manifest))
	if err != nil {
		return err
	}
	defer manifest.Close()
	if err := listFiles(context.Background(), manifest, debianFiles, []string{filepath.Join(root, "usr")}, func(path, _ string) (int64, uint32, error) {
		return checksumFile(path)
	}); err != nil {
		return err
	}
	return manifest.Close()
}

// copyKernel copies what a guest's initrd is made of out of the disk, to where a kernel's package has it.
func copyKernel(root, dir string) error {
	kernels, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if len(kernels) != 1 {
		return fmt.Errorf("found %d kernels", len(kernels))
	}
	release := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	modules := filepath.Join(dir, "lib/modules")
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "boot"), 0o755), os.MkdirAll(modules, 0o755)); err != nil {
		return err
	}
	_, err := output(exec.Command("cp", "-a", "--", kernels[0], filepath.Join(dir, "boot")))
	if err == nil {
		_, err = output(exec.Command("cp", "-a", "--", filepath.Join(root, "usr/lib/modules", release), modules))
	}
	return err
}
