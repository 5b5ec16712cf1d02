package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// guestAgentPort is the name by which the hypervisor tells the port of its guest agent.
const guestAgentPort = "org.qemu.guest_agent.0"

// startDaemons starts the programs of others that the guest was made with, for as long as it lives. Who finds the guest
// up finds its ssh server, too.
func startDaemons() {
	if has("/usr/sbin/dropbear") {
		go keep("/usr/sbin/dropbear", "-F", "-E", "-s", "-m", "-j", "-k", "-r", "/etc/dropbear/host")
		awaitListener("127.0.0.1:22")
	}
	if has("/usr/sbin/qemu-ga") {
		go func() {
			// The hypervisor names its ports a while after their driver was loaded.
			for {
				port, ok := virtioPort("/sys/class/virtio-ports", guestAgentPort)
				if ok {
					keep("/usr/sbin/qemu-ga", "--method=virtio-serial", "--path=/dev/"+port, "--statedir=/tmp")
				}
				time.Sleep(100 * time.Millisecond)
			}
		}()
	}
}

func has(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// awaitListener returns when a connection is accepted, or after half a minute.
func awaitListener(address string) {
	for deadline := monotonic() + 30*time.Second; monotonic() < deadline; time.Sleep(50 * time.Millisecond) {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			return
		}
	}
	slog.Warn("no daemon listens", "address", address)
}

// keep runs a program again whenever it ends.
func keep(program string, args ...string) {
	for {
		daemon := exec.Command(program, args...)
		daemon.Env = []string{"PATH=/bin", "HOME=/root"}
		daemon.Stdout, daemon.Stderr = os.Stdout, os.Stdout
		slog.Warn("daemon ended", "program", program, "err", daemon.Run())
		time.Sleep(time.Second)
	}
}

// virtioPort finds the device of the serial port of a name, for which udev would make a link, in a list of ports.
func virtioPort(dir, name string) (device string, ok bool) {
	files, _ := filepath.Glob(filepath.Join(dir, "*", "name"))
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == name {
			return filepath.Base(filepath.Dir(file)), true
		}
	}
	return "", false
}
