// Wanlab-guest is the init of the lab's guests. It sets the guest up, does the load that is asked of it, verifies all that it
// wrote and answers over the network; package api has the details. A guest with a system of its own is handed over to that
// system's init, which runs this program as a service.
package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stdout, nil)))
	if os.Getpid() != 1 {
		if len(os.Args) != 2 || os.Args[1] != serviceArgument {
			fmt.Fprintln(os.Stderr, "wanlab-guest is the init of a lab guest; start one with: wanlab vm NAME")
			os.Exit(2)
		}
		slog.Error("guest failed", "err", runService())
		os.Exit(1)
	}
	fmt.Println("wanlab-guest starts")
	if err := run(); err != nil {
		slog.Error("guest failed", "err", err)
	}
	// The end of init would be a panic of the kernel, which hides the reason.
	time.Sleep(time.Second)
	powerOff()
}

// readSettings reads the command line of the kernel that runs.
func readSettings() (settings, error) {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return settings{}, err
	}
	return parseSettings(string(cmdline))
}

func run() error {
	if err := mountKernel(); err != nil {
		return err
	}
	s, err := readSettings()
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(s.name)); err != nil {
		slog.Warn("host name not set", "name", s.name, "err", err)
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := bringUpNetwork(s); err != nil {
		return err
	}
	if s.root != "" {
		return startSystem(s)
	}
	g, err := newGuest(s)
	if err != nil {
		return err
	}
	g.off = powerOff
	watchPowerButton(powerOff)
	startDaemons()
	go console()
	return g.run()
}

// newGuest makes the buffer and opens the disks. A disk that cannot be opened is an error to report, not the end.
func newGuest(s settings) (*guest, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, err
	}
	m, err := newMemory(int64(info.Totalram)*int64(info.Unit)*3/5, s.seed)
	if err != nil {
		return nil, err
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	l := newLoad(m, nil)
	for i, name := range findDisks(s.disks) {
		open := mountDisk
		if name == s.root {
			open = openRoot
		}
		d, err := open(name, s.seed+uint64(i)+1)
		if err != nil {
			slog.Error("disk not opened", "device", name, "err", err)
			d = newDisk(name, 0)
			d.fault("%v", err)
		}
		l.disks = append(l.disks, d)
	}
	if len(l.disks) < s.disks {
		return nil, fmt.Errorf("found %d of %d disks", len(l.disks), s.disks)
	}
	l.set(s.load)
	return &guest{name: s.name, bootID: strings.TrimSpace(string(id)), seed: s.seed, load: l, pauses: &pauses{}, echo: &echo{}}, nil
}

// run serves until one of the services fails.
func (g *guest) run() error {
	// More threads than processors, so that the kernel rather than Go's scheduler decides who runs: the ticker must not
	// wait for the workers.
	runtime.GOMAXPROCS(max(4, runtime.NumCPU()))
	web, err := net.Listen("tcp", fmt.Sprintf(":%d", api.HTTPPort))
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp", fmt.Sprintf(":%d", api.EchoPort))
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp", fmt.Sprintf(":%d", api.EchoPort))
	if err != nil {
		return err
	}
	g.load.start()
	go g.pauses.tick()
	go func() {
		if err := g.pauses.watchRTC(); err != nil {
			slog.Warn("stops are not measured", "err", err)
		}
	}()
	ended := make(chan error)
	go func() { ended <- g.serve(web) }()
	go func() { ended <- g.echo.serveTCP(tcp) }()
	go func() { ended <- g.echo.serveUDP(udp) }()
	slog.Info("guest is up", "name", g.name, "uptime", monotonic().Round(time.Millisecond), "disks", len(g.load.disks))
	return <-ended
}
