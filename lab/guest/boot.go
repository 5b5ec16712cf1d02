package main

import (
	"bytes"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// settings come from the kernel's command line, as wanlab.KEY=VALUE.
type settings struct {
	name   string // percent-encoded on the command line
	first  nic
	second nic // or empty
	seed   uint64
	disks  int    // to wait for
	root   string // disk with a system of its own, or empty
	load   api.Load
}

// nic is the guest's place in a network, besides its link-local address.
type nic struct{ ipv4, ipv6 family }

// family is the guest's place in one IP version, or empty.
type family struct {
	address string // with prefix length
	gateway string
}

func parseSettings(cmdline string) (settings, error) {
	s := settings{name: "guest", seed: 1, load: api.Load{WorkingSet: 64 << 20}}
	for _, field := range strings.Fields(cmdline) {
		field, ours := strings.CutPrefix(field, "wanlab.")
		if !ours {
			continue
		}
		key, value, _ := strings.Cut(field, "=")
		var err error
		switch key {
		case "name":
			s.name, err = url.PathUnescape(value)
		case "address":
			s.first.ipv4.address = value
		case "gateway":
			s.first.ipv4.gateway = value
		case "address6":
			s.first.ipv6.address = value
		case "gateway6":
			s.first.ipv6.gateway = value
		case "second-address":
			s.second.ipv4.address = value
		case "second-gateway":
			s.second.ipv4.gateway = value
		case "second-address6":
			s.second.ipv6.address = value
		case "second-gateway6":
			s.second.ipv6.gateway = value
		case "seed":
			s.seed, err = strconv.ParseUint(value, 16, 64)
		case "disks":
			s.disks, err = strconv.Atoi(value)
		case "root":
			s.root = value
			if !diskName.MatchString(value) {
				err = fmt.Errorf("%q is not a disk", value)
			}
		case "dirty":
			s.load.Dirty, err = api.ParseSize(value)
		case "edit":
			s.load.Edit, err = api.ParseSize(value)
		case "write":
			s.load.Write, err = api.ParseSize(value)
		case "working-set":
			s.load.WorkingSet, err = api.ParseSize(value)
		default:
			err = fmt.Errorf("unknown")
		}
		if err != nil {
			return s, fmt.Errorf("kernel parameter wanlab.%s: %w", key, err)
		}
	}
	return s, nil
}

var diskName = regexp.MustCompile(`^[sv]d[a-z]$`)

// mountKernel mounts the kernel's own file systems.
func mountKernel() error {
	for _, m := range []struct{ fstype, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		// The kernel may have mounted devtmpfs by itself.
		if err := unix.Mount(m.fstype, m.at, m.fstype, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return nil
}

// loadModules loads the modules of the initrd in the order of their file names.
func loadModules() error {
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	sort.Strings(files)
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		// A driver whose hardware is absent may decline.
		if err != nil && err != unix.EEXIST && err != unix.ENODEV {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	return nil
}

// secondTable is the routing table of what is sent from an address of the second Ethernet device.
const secondTable = 2

// bringUpNetwork gives the first Ethernet device its addresses, and the second one if it has any; its IPv6 link-local
// address follows from the MAC, and is usable at once like the others. Router advertisements are not listened to. What
// comes by the second device is answered by it; what the guest begins itself takes the first.
func bringUpNetwork(s settings) error {
	for _, conf := range []string{"accept_ra", "autoconf", "accept_dad", "dad_transmits"} {
		for _, scope := range []string{"all", "default", "eth0", "eth1"} {
			path := "/proc/sys/net/ipv6/conf/" + scope + "/" + conf
			if err := os.WriteFile(path, []byte("0"), 0o644); err != nil && !os.IsNotExist(err) {
				return err
			}
		}
	}
	if lo, err := netlink.LinkByName("lo"); err != nil {
		return err
	} else if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	if err := s.first.bringUp("eth0", unix.RT_TABLE_MAIN); err != nil {
		return err
	}
	if s.second == (nic{}) {
		return nil
	}
	return s.second.bringUp("eth1", secondTable)
}

// bringUp raises a device. Routes other than its networks go into a table.
func (n nic) bringUp(device string, table int) error {
	eth, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	for _, f := range []family{n.ipv4, n.ipv6} {
		if err := f.bringUp(eth, table); err != nil {
			return err
		}
	}
	return nil
}

func (f family) bringUp(eth netlink.Link, table int) error {
	if f.address == "" {
		return nil
	}
	address, err := netlink.ParseAddr(f.address)
	if err != nil {
		return fmt.Errorf("address %q: %w", f.address, err)
	}
	if err := netlink.AddrAdd(eth, address); err != nil {
		return fmt.Errorf("address %s: %w", f.address, err)
	}
	if f.gateway == "" {
		return nil
	}
	gateway := net.ParseIP(f.gateway)
	if gateway == nil {
		return fmt.Errorf("gateway %q is not an address", f.gateway)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: gateway, Table: table}); err != nil {
		return fmt.Errorf("gateway %s: %w", f.gateway, err)
	}
	if table == unix.RT_TABLE_MAIN {
		return nil
	}
	network := &net.IPNet{IP: address.IP.Mask(address.Mask), Mask: address.Mask}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: network, Scope: netlink.SCOPE_LINK, Table: table}); err != nil {
		return fmt.Errorf("network of %s: %w", f.address, err)
	}
	rule := netlink.NewRule()
	rule.Src, rule.Table = netlink.NewIPNet(address.IP), table
	if err := netlink.RuleAdd(rule); err != nil {
		return fmt.Errorf("rule for %s: %w", f.address, err)
	}
	return nil
}

// findDisks waits until there are as many disks as expected, or three seconds, since buses are scanned in the background,
// and returns their names.
func findDisks(expected int) []string {
	for deadline := monotonic() + 3*time.Second; ; time.Sleep(10 * time.Millisecond) {
		var names []string
		for _, pattern := range []string{"vd*", "sd*"} {
			paths, _ := filepath.Glob("/sys/block/" + pattern)
			for _, p := range paths {
				names = append(names, filepath.Base(p))
			}
		}
		if len(names) >= expected || monotonic() > deadline {
			return names
		}
	}
}

// mountDisk mounts an ext4 disk and opens it for blocks.
func mountDisk(name string, seed uint64) (*disk, error) {
	root := "/disk/" + name
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("/dev/"+name, root, "ext4", unix.MS_NOATIME, ""); err != nil {
		return nil, fmt.Errorf("mount %s: %w", name, err)
	}
	return openMounted(name, root, seed)
}

// openMounted opens a disk for blocks whose file system is mounted at root.
func openMounted(name, root string, seed uint64) (*disk, error) {
	b, err := os.ReadFile("/sys/block/" + name + "/size")
	if err != nil {
		return nil, err
	}
	sectors, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("size of %s: %w", name, err)
	}
	return openDisk(name, root, sectors*512, seed)
}

// console runs a shell on the serial line, again and again.
func console() {
	for {
		tty, err := os.OpenFile("/dev/ttyS0", os.O_RDWR, 0)
		if err != nil {
			return
		}
		shell := exec.Command("/bin/busybox", "sh")
		shell.Env = []string{"PATH=/bin", "HOME=/", "TERM=linux", "PS1=# "}
		shell.Stdin, shell.Stdout, shell.Stderr = tty, tty, tty
		shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		err = shell.Run()
		tty.Close()
		if err != nil {
			time.Sleep(time.Second)
		}
	}
}

// watchPowerButton powers off when the button is pressed, as virsh shutdown does.
func watchPowerButton(off func()) {
	const size, keyEvent, powerKey = 24, 1, 116 // of struct input_event and its codes, linux/input.h
	paths, _ := filepath.Glob("/dev/input/event*")
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		go func() {
			defer f.Close()
			var b [size]byte
			for {
				if n, err := f.Read(b[:]); err != nil || n != size {
					return
				}
				if b[16] == keyEvent && b[18] == powerKey && b[20] == 1 {
					off()
				}
			}
		}()
	}
}

// powerOff writes everything out, unmounts the disks and powers off.
func powerOff() {
	unix.Sync()
	roots, _ := filepath.Glob("/disk/*")
	for _, root := range roots {
		// The ring is open, so the file system is made read-only rather than unmounted.
		unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
