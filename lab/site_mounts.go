package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// privateDirs are the directories that each data centre has for itself, and
// namedDirs those which it also has in a lab with services.
var (
	privateDirs = []string{
		"/run",
		"/etc/libvirt",
		"/etc/wanmig",
		"/var/lib/libvirt",
		"/var/lib/wanmig",
		"/var/log/libvirt",
		"/var/cache/libvirt",
	}
	namedDirs = []string{"/etc/bind", "/var/lib/bind", "/var/cache/bind"}
)

// The files that each data centre has for itself, or the users.
const (
	hostsFile  = "/etc/hosts"
	passwdFile = "/etc/passwd"
	groupFile  = "/etc/group"
	resolvFile = "/etc/resolv.conf"
)

// private lists the directories and files that a site has for itself.
func (l *Lab) private(s *Site) (dirs, files []string) {
	switch {
	case s.Name != Users && l.Services:
		return slices.Concat(privateDirs, namedDirs), []string{hostsFile, passwdFile, groupFile}
	case s.Name != Users:
		return privateDirs, []string{hostsFile, passwdFile, groupFile}
	case l.Services:
		return nil, []string{resolvFile}
	}
	return nil, nil
}

// makePrivateDirs makes what mountSite mounts, and the directories of daemons,
// below the site's directory.
func (l *Lab) makePrivateDirs(s *Site) error {
	dirs, _ := l.private(s)
	dirs = append(dirs, "/log", "/etc/bird", "/run/bird")
	if s.Name != Users {
		dirs = append(dirs, "/run/lock", "/var/lib/libvirt/images")
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(s.Dir+dir, 0o755); err != nil {
			return fmt.Errorf("make directory of site: %w", err)
		}
	}
	return nil
}

// mountSite turns the calling process's mount namespace, new and still a copy
// of the host's, into the site's.
func (l *Lab) mountSite(s *Site) error {
	// First, or all that follows would reach the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("separate mounts from the host: %w", err)
	}
	dirs, files := l.private(s)
	// What lies below a mount of ours would be hidden, yet kept in use. Network
	// namespaces would be by any copy of their mounts.
	hidden := append([]string{namespaceDir}, dirs...)
	if s.Name != Users {
		hidden = append(hidden, "/proc", "/sys")
	}
	if err := unmountBelow(hidden); err != nil {
		return err
	}
	if s.Name != Users {
		if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("mount /proc: %w", err)
		}
		if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("mount /sys: %w", err)
		}
	}
	for _, path := range append(files, dirs...) {
		if err := bindPrivate(s.Dir+path, path); err != nil {
			return err
		}
	}
	return nil
}

// bindPrivate mounts from over path, which the host may lack.
func bindPrivate(from, path string) error {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		if err := makeMountPoint(from, path); err != nil {
			return fmt.Errorf("make mount point %s: %w", path, err)
		}
	}
	if err := unix.Mount(from, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

// makeMountPoint makes path, alike to from, in this mount namespace alone: its
// parent becomes a tmpfs with everything that was there mounted into it.
func makeMountPoint(from, path string) error {
	parent := filepath.Dir(path)
	original, err := unix.Open(parent, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", parent, err)
	}
	defer unix.Close(original)
	originalPath := fmt.Sprintf("/proc/self/fd/%d", original)
	entries, err := os.ReadDir(originalPath)
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", parent, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", parent, err)
	}
	for _, e := range entries {
		if e.Name() == filepath.Base(path) {
			continue // a link to nothing
		}
		if err := mirrorEntry(filepath.Join(originalPath, e.Name()), filepath.Join(parent, e.Name())); err != nil {
			return err
		}
	}
	return makeAlike(from, path)
}

func mirrorEntry(from, to string) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeSymlink != 0 {
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	}
	if err := makeAlike(from, to); err != nil {
		return err
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", to, err)
	}
	return nil
}

// makeAlike makes an empty directory or file.
func makeAlike(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.Mkdir(to, 0o755)
	}
	return os.WriteFile(to, nil, 0o644)
}

// unmountBelow detaches every mount on or below the paths.
func unmountBelow(paths []string) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, point := range points {
		for _, path := range paths {
			if !within(point, path) {
				continue
			}
			// EINVAL: it went with a mount above it.
			if err := unix.Unmount(point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("detach %s: %w", point, err)
			}
			break
		}
	}
	return nil
}

// mountPoints lists the mount points of this process's mount namespace, those
// mounted last first.
func mountPoints() ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return parseMountPoints(string(text)), nil
}

func parseMountPoints(mountinfo string) []string {
	// The kernel writes these as octal numbers (show_mountinfo).
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	for line := range strings.Lines(mountinfo) {
		if fields := strings.Fields(line); len(fields) > 4 {
			points = append(points, unescape.Replace(fields[4]))
		}
	}
	slices.Reverse(points)
	return points
}

// within reports whether path is dir or lies below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}
