package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// serviceArgument makes this program, started by a system's init, serve as it does where it is the init itself.
const serviceArgument = "service"

// The service comes from /run, a file system in memory, so that the system on the disk needs to know nothing of it. That it
// answers says that the guest's own services run.
const (
	serviceProgram = "/run/wanlab/guest"
	serviceUnit    = "/run/systemd/system/wanlab-guest.service"
	serviceWanted  = "/run/systemd/system/multi-user.target.wants/wanlab-guest.service"
	serviceText    = `[Unit]
Description=Load, verification and answers for the lab
Requires=nginx.service postgresql@15-main.service
After=nginx.service postgresql@15-main.service ssh.service

[Service]
ExecStart=` + serviceProgram + ` ` + serviceArgument + `
`
)

// startSystem makes the file system of the disk with the system the root and runs its init in the place of this process. It
// returns only if that does not succeed.
func startSystem(s settings) error {
	if found := findDisks(s.disks); !slices.Contains(found, s.root) {
		return fmt.Errorf("no disk %s among %q", s.root, found)
	}
	const root = "/root"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/dev/"+s.root, root, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", s.root, err)
	}
	if err := unix.Mount("tmpfs", root+"/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := installService(root, "/init"); err != nil {
		return fmt.Errorf("install service: %w", err)
	}
	for _, at := range []string{"/dev", "/proc", "/sys"} {
		if err := unix.Mount(at, root+at, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", at, err)
		}
	}
	// What is left in the first root file system stays in memory for ever.
	for _, path := range []string{"/bin", "/init", "/modules"} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	if err := changeRoot(root); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	return fmt.Errorf("start /sbin/init: %w", unix.Exec("/sbin/init", []string{"/sbin/init"}, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=linux"}))
}

func installService(root, program string) error {
	content, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	for _, path := range []string{serviceProgram, serviceUnit, serviceWanted} {
		if err := os.MkdirAll(root+filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(root+serviceProgram, content, 0o755),
		os.WriteFile(root+serviceUnit, []byte(serviceText), 0o644),
		os.Symlink(serviceUnit, root+serviceWanted),
	)
}

// changeRoot does what switch_root(8) does: a root that is an initial file system cannot be pivoted.
func changeRoot(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// runService serves in a system that was started by startSystem, until one of the services fails.
func runService() error {
	s, err := readSettings()
	if err != nil {
		return err
	}
	g, err := newGuest(s)
	if err != nil {
		return err
	}
	g.off = func() {
		// systemd ends this process, too.
		_ = exec.Command("/usr/bin/systemctl", "poweroff").Run()
		select {}
	}
	return g.run()
}

// openRoot opens the disk with the system for blocks.
func openRoot(name string, seed uint64) (*disk, error) { return openMounted(name, "/", seed) }
