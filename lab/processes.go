package lab

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// supervisors finds the supervisor of the lab in dir: at most one, after its
// lock.
func supervisors(dir string) []int {
	return findProcesses(func(pid int) bool {
		argv := commandLine(pid)
		return len(argv) == 2 && argv[0] == supervisorName && argv[1] == dir
	})
}

// isSiteInit tells an init from a process that got its number later.
func isSiteInit(pid int, site string) bool {
	argv := commandLine(pid)
	return len(argv) == 3 && argv[0] == siteInitName && argv[2] == site
}

// processes finds everything that runs for the lab or within its sites.
func (l *Lab) processes() []int {
	var namespaces []fs.FileInfo
	for _, s := range l.Sites {
		if info, err := os.Stat(s.namespacePath()); err == nil {
			namespaces = append(namespaces, info)
		}
	}
	return findProcesses(func(pid int) bool {
		argv := commandLine(pid)
		if len(argv) >= 2 && (argv[0] == supervisorName || argv[0] == siteInitName) && argv[1] == l.Dir {
			return true
		}
		info, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), "ns/net"))
		return err == nil && slices.ContainsFunc(namespaces, func(n fs.FileInfo) bool { return os.SameFile(n, info) })
	})
}

// findProcesses lists the processes that match, but never this one.
func findProcesses(match func(pid int) bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && pid != os.Getpid() && match(pid) {
			found = append(found, pid)
		}
	}
	return found
}

// commandLine is empty for a process that has ended.
func commandLine(pid int) []string {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil || len(text) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
}

// lookPath finds a program also where a plain user's PATH does not lead.
func lookPath(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("find %s: %w", program, err)
}

// requirement is a program and the Debian package that has it.
type requirement struct{ program, apt string }

var requirements = []requirement{
	{"libvirtd", "libvirt-daemon"},
	{"virsh", "libvirt-clients"},
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"qemu-img", "qemu-utils"},
	{"nsenter", "util-linux"},
	{"setpriv", "util-linux"},
}

var servicesRequirements = []requirement{
	{"bird", "bird2"},
	{"birdc", "bird2"},
	{"named", "bind9"},
	{"dig", "bind9-dnsutils"},
	{"nsupdate", "bind9-dnsutils"},
}

// checkHost finds what Up would miss.
func checkHost(services bool) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("wanlab needs root, for network namespaces and libvirtd: use sudo")
	}
	wanted := requirements
	if services {
		wanted = slices.Concat(requirements, servicesRequirements)
	}
	var missing, packages []string
	for _, r := range wanted {
		if _, err := lookPath(r.program); err != nil {
			missing = append(missing, r.program)
			if !slices.Contains(packages, r.apt) {
				packages = append(packages, r.apt)
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%s missing: apt-get install %s", strings.Join(missing, ", "), strings.Join(packages, " "))
	}
	if err := unix.Access(tunDevice, unix.R_OK|unix.W_OK); err != nil {
		return fmt.Errorf("%s: %w: load the kernel module tun, or pass the device into this container", tunDevice, err)
	}
	return nil
}
