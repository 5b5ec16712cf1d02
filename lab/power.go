package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A data centre that has been given a disk can lose its power. What it has in
// /etc and /var of its own then lies in an ext4 file system on a loop device
// over the file SITE.disk, mounted at SITE/disk and bound to where it was.
//
// PowerOff kills all of the data centre's processes at once and shuts the file
// system down as the test suites of file systems do, with the ioctl that lets
// nothing of what the kernel still holds out to the device, not even what the
// file system's journal has not committed (EXT4_IOC_SHUTDOWN with
// EXT4_GOING_FLAGS_NOLOGFLUSH, fs/ext4/ioctl.c). So what was not made durable
// by an fsync, or by the kernel in its own time, is gone. What a drive's own
// cache would lose, because it was sent without a flush, is not.

// diskFolders are a data centre's own folders that outlive a loss of power. What
// is in /run does not.
var diskFolders = []string{"/etc", "/var"}

func (s *Site) diskFile() string  { return s.Dir + ".disk" }
func (s *Site) diskMount() string { return filepath.Join(s.Dir, "disk") }

// GiveDisk puts what a data centre has on a disk of so many bytes, and restarts its
// daemons. No guest may run there.
func (l *Lab) GiveDisk(ctx context.Context, site string, size int64) error {
	s, err := l.dataCentre(site)
	if err != nil {
		return err
	}
	if err := l.killAll(ctx, s); err != nil {
		return err
	}
	if err := os.WriteFile(s.diskFile(), nil, 0o600); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	if err := os.Truncate(s.diskFile(), size); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	if err := os.Mkdir(s.diskMount(), 0o700); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	if _, err := output(exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", s.diskFile())); err != nil {
		return err
	}
	loop, err := s.attachDisk(ctx)
	if err != nil {
		return err
	}
	for _, dir := range diskFolders {
		if _, err := output(exec.CommandContext(ctx, "cp", "-a", "--sparse=always", s.Dir+dir, s.diskMount())); err != nil {
			return err
		}
	}
	unix.Sync() // the machine has stood there for long
	return l.boot(ctx, s, loop)
}

// PowerOff has a data centre lose its power. Its guests are gone, and what was not
// durable; its part of the WAN stays.
func (l *Lab) PowerOff(ctx context.Context, site string) error {
	s, err := l.dataCentre(site)
	if err != nil {
		return err
	}
	disk, err := os.Open(s.diskMount())
	if err != nil {
		return fmt.Errorf("power off %s: %w", site, err)
	}
	defer disk.Close()
	if err := l.killAll(ctx, s); err != nil {
		return err
	}
	const shutdown, noLogFlush = 0x8004587d, 2
	flags := uint32(noLogFlush)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), shutdown, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		return fmt.Errorf("power off %s: shut its file system down: %w", site, errno)
	}
	return nil
}

// Boot gives a data centre its power back and returns when libvirtd and the agent
// answer.
func (l *Lab) Boot(ctx context.Context, site string) error {
	s, err := l.dataCentre(site)
	if err != nil {
		return err
	}
	// A copy: the old file system may still be held by a mount namespace that
	// somebody on this machine has made meanwhile.
	old := s.diskFile() + ".old"
	if err := os.Rename(s.diskFile(), old); err != nil {
		return fmt.Errorf("boot %s: %w", site, err)
	}
	if err := copySparse(ctx, old, s.diskFile()); err != nil {
		return fmt.Errorf("boot %s: %w", site, err)
	}
	if err := s.detachDisk(); err != nil {
		return fmt.Errorf("boot %s: %w", site, err)
	}
	if err := os.Remove(old); err != nil {
		return fmt.Errorf("boot %s: %w", site, err)
	}
	loop, err := s.attachDisk(ctx)
	if err != nil {
		return fmt.Errorf("boot %s: %w", site, err)
	}
	return l.boot(ctx, s, loop)
}

func (l *Lab) dataCentre(site string) (*Site, error) {
	s, err := l.Site(site)
	if err == nil && s.Name == Users {
		err = errors.New("the users have no power of their own")
	}
	return s, err
}

// attachDisk mounts the disk where the host sees it, and returns its device. The
// device goes with the last mount of it.
func (s *Site) attachDisk(ctx context.Context) (loop string, err error) {
	out, err := output(exec.CommandContext(ctx, "losetup", "--find", "--show", s.diskFile()))
	if err != nil {
		return "", err
	}
	loop = string(bytes.TrimSpace(out))
	if err := unix.Mount(loop, s.diskMount(), "ext4", 0, ""); err != nil {
		return "", errors.Join(fmt.Errorf("mount %s: %w", loop, err), exec.Command("losetup", "--detach", loop).Run())
	}
	return loop, nil
}

// detachDisk undoes attachDisk and boot, as far as the host sees it.
func (s *Site) detachDisk() error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, point := range points {
		if !within(point, s.diskMount()) && !within(point, s.Dir+diskFolders[0]) && !within(point, s.Dir+diskFolders[1]) {
			continue
		}
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("detach %s: %w", point, err)
		}
	}
	return nil
}

// boot starts a data centre from its disk: its mounts, then its daemons.
func (l *Lab) boot(ctx context.Context, s *Site, loop string) error {
	// With the device in use by the mount it goes when that does.
	if _, err := output(exec.CommandContext(ctx, "losetup", "--detach", loop)); err != nil {
		return err
	}
	for _, dir := range diskFolders {
		if err := unix.Mount(s.diskMount()+dir, s.Dir+dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s of %s: %w", dir, s.Name, err)
		}
	}
	script := []string{"set -e", fmt.Sprintf("umount -l '%[1]s' 2>/dev/null || true; mount -t ext4 %[2]s '%[1]s'", s.diskMount(), loop)}
	dirs, files := l.private(s)
	for _, path := range append(dirs, files...) {
		if path != "/run" {
			script = append(script, fmt.Sprintf("umount -l %[1]s; mount --bind '%[2]s%[1]s' %[1]s", path, s.diskMount()))
		}
	}
	script = append(script, "find /run -mindepth 1 -delete", "mkdir /run/lock")
	if _, err := l.output(ctx, s.Name, "sh", "-c", strings.Join(script, "\n")); err != nil {
		return fmt.Errorf("boot %s: %w", s.Name, err)
	}
	if err := s.StartLibvirtd(ctx); err != nil {
		return err
	}
	if l.Wanmig == "" {
		return nil
	}
	return s.StartAgent(ctx)
}

// killAll kills every process of a data centre but its init, in one system call,
// and returns when none is left.
func (l *Lab) killAll(ctx context.Context, s *Site) error {
	ctx, cancel := context.WithTimeout(ctx, downTimeout)
	defer cancel()
	if _, err := l.output(ctx, s.Name, "sh", "-c", "kill -9 -1"); err != nil {
		return err
	}
	for {
		left, err := s.processes()
		if err != nil {
			return err
		}
		if left == 0 {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("kill the %d processes of %s: %w", left, s.Name, err)
		}
	}
}

// processes counts the processes of a data centre but its init.
func (s *Site) processes() (int, error) {
	ours, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", s.Pid))
	if err != nil {
		return 0, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	n := -1 // init
	for _, dir := range dirs {
		if ns, err := os.Readlink(dir + "/ns/pid"); err == nil && ns == ours {
			n++
		}
	}
	return n, err
}
