package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// The images of Debian 12 that a VM can boot, besides the lab's own. They hold the same packages, but each is installed by
// itself: names of the same files are in other inodes and blocks, with other times, identifiers, keys and database files.
// That is how disks of the same release differ from each other.
const (
	Debian       = "debian"
	DebianSecond = "debian-second"
)

const debianRelease = "bookworm"

// debianDisk is the size of a disk with Debian. A bit more than a quarter of it is in use.
const debianDisk = 3 << 30

// debianInstall installs what Debian calls required and important, and what makes it a server. Nothing is synced to stable
// storage as it goes: what is not completed is thrown away.
var debianInstall = []string{"mmdebstrap", "--mode=root", "--variant=important", "--skip=output/dev", "--dpkgopt=force-unsafe-io",
	"--include=dbus,linux-image-cloud-amd64,nginx-light,openssh-server,postgresql,systemd-sysv,udev",
	`--customize-hook=chroot "$1" /bin/sh -euc "$WANLAB_SETUP"`}

// debianSetup runs as root in the new system, before it has ever been booted.
//
//go:embed debian.sh
var debianSetup string

// DebianImage is where an installed Debian lies in the cache.
type DebianImage struct {
	Disk string // raw image, sparse, of an ext4 file system without a partition table
	tree string // kernel and modules
}

const (
	debianMemory     = 1 << 30
	debianWorkingSet = 8 << 20

	// debianCmdline names the root, and the network device as the guest's program does, and gives services time under TCG.
	debianCmdline = " wanlab.root=vda net.ifnames=0 systemd.default_timeout_start_sec=300"
)

// checkDebian refuses what a VM with Debian cannot have.
func (o *VMOptions) checkDebian() error {
	switch {
	case o.Image != Debian && o.Image != DebianSecond:
		return fmt.Errorf("image %q: want %s or %s, or none for the lab's own", o.Image, Debian, DebianSecond)
	case o.SSH || o.GuestAgent || o.UEFI || o.CDROM:
		return fmt.Errorf("%s: an ssh server with the lab's keys, a guest agent, UEFI and CD-ROMs are for guests without a system of their own", o.Name)
	case o.Disks[0].Bus != "virtio" || o.Disks[0].Device == "" && o.Disks[0].Size != debianDisk:
		return fmt.Errorf("first disk of %s: %s is on a virtio disk of 3GiB", o.Name, o.Image)
	}
	if slices.ContainsFunc(o.Disks, func(d DiskOptions) bool { return d.Bus == "sata" }) {
		return fmt.Errorf("disks of %s: the kernel of %s has no driver for SATA", o.Name, o.Image)
	}
	return nil
}

// bootDebian returns what a VM with Debian boots.
func (im *Images) bootDebian(ctx context.Context, name string, progress func(line string)) (image, error) {
	installed, err := im.Debian(ctx, name, progress)
	if err != nil {
		return image{}, err
	}
	unlock, err := im.lock(ctx)
	if err != nil {
		return image{}, err
	}
	defer unlock()
	boot, err := im.bootTree(ctx, installed.tree, guestModules, nil)
	boot.system = installed.Disk
	return boot, err
}

// Debian returns the image of a name, Debian or DebianSecond. It is installed first if it is not in the cache, in one to five
// minutes, and progress is told about that, a line at a time. The process must have called RunChild at its start.
func (im *Images) Debian(ctx context.Context, name string, progress func(line string)) (*DebianImage, error) {
	if name != Debian && name != DebianSecond {
		return nil, fmt.Errorf("image %q: want %s or %s", name, Debian, DebianSecond)
	}
	// Guests of other kinds need not wait for the lock that is held meanwhile.
	dir := filepath.Join(im.dir, "debian")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("image cache: %w", err)
	}
	own := &Images{dir: dir, guest: im.guest}
	unlock, err := own.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	recipe := sha256.Sum256(fmt.Append(nil, debianInstall, debianSetup, debianDisk))
	path, err := own.make(fmt.Sprintf("%s-%x", name, recipe[:8]), func(path string) error {
		started := time.Now()
		if err := buildDebian(ctx, path, progress); err != nil {
			return fmt.Errorf("install Debian: %w", err)
		}
		progress(fmt.Sprintf("%s image made in %d s", name, int(time.Since(started).Seconds())))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &DebianImage{Disk: filepath.Join(path, debianDiskName), tree: path}, nil
}

// buildDebian has a child make the image in a new directory.
func buildDebian(ctx context.Context, path string, progress func(line string)) error {
	if !canRunChildren {
		return errors.New("lab.RunChild must be called at the start of the program")
	}
	if _, err := lookPath(debianInstall[0]); err != nil {
		return fmt.Errorf("%w: apt-get install %s", err, debianInstall[0])
	}
	targets, err := output(exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"))
	if err != nil {
		return err
	}
	sources := debianSources(targets)
	if len(sources) == 0 {
		return fmt.Errorf("apt has no source of Debian %s: see sources.list(5), and try apt-get update", debianRelease)
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	// The kernel kills the child with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	child := exec.CommandContext(ctx, "/proc/self/exe")
	child.Args = []string{debianBuilderName, path}
	child.Stdin = strings.NewReader(strings.Join(sources, ""))
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	child.WaitDelay = 10 * time.Second
	said := &lineWriter{line: progress}
	child.Stdout, child.Stderr = said, said
	progress("installing Debian " + debianRelease + ", once: this takes some minutes")
	if err := child.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w: %s", err, strings.Join(said.last, "\n"))
	}
	return nil
}

// debianSources makes lines of sources.list(5) from apt's own sources of Debian's release, which are given as
// `ORIGIN CODENAME URI RELEASE COMPONENT`, one in a line.
func debianSources(targets []byte) []string {
	var lines []string
	for s := bufio.NewScanner(bytes.NewReader(targets)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) != 5 || f[0] != "Debian" || f[1] != debianRelease && !strings.HasPrefix(f[1], debianRelease+"-") {
			continue
		}
		line := fmt.Sprintf("deb %s %s %s\n", f[2], f[3], f[4])
		if !slices.Contains(lines, line) {
			lines = append(lines, line)
		}
	}
	return lines
}

// lineWriter passes lines on, without the "I: " that mmdebstrap begins most with, and keeps the last few.
type lineWriter struct {
	line func(string)
	part []byte
	last []string
}

const maxLine = 4096

func (w *lineWriter) Write(p []byte) (int, error) {
	for _, b := range p {
		if b != '\n' && len(w.part) < maxLine {
			w.part = append(w.part, b)
			continue
		}
		line := strings.TrimSpace(strings.TrimPrefix(string(w.part), "I: "))
		w.part = w.part[:0]
		if line == "" {
			continue
		}
		if w.last = append(w.last, line); len(w.last) > 8 {
			w.last = w.last[1:]
		}
		w.line(line)
	}
	return len(p), nil
}
