package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A lab's own processes are this program again, under these names, with the
// lab's directory as first argument: Down knows them by it.
const (
	supervisorName = "wanlab-supervisor"
	siteInitName   = "wanlab-site"
)

var canRunChildren bool

// RunChild runs a process of a lab if this process was started as one, and then
// never returns. A program that calls Up must call it first of all, since
// Up starts the program again: in main, or in a test's TestMain.
func RunChild() {
	canRunChildren = true
	var err error
	switch {
	case os.Args[0] == supervisorName && len(os.Args) == 2:
		ready := inherited(4)
		unix.CloseOnExec(lockFD)
		err = report(ready, runSupervisor(os.Args[1], ready))
	case os.Args[0] == siteInitName && len(os.Args) == 3:
		ready := inherited(3)
		err = report(ready, runSiteInit(os.Args[1], os.Args[2], ready))
	case os.Args[0] == debianBuilderName && len(os.Args) == 2:
		if err := installDebian(os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	default:
		return
	}
	slog.Error("ended", "err", err)
	os.Exit(1)
}

// lockFD is the lab's lock in the supervisor, held until its end.
const lockFD = 3

func inherited(fd int) *os.File {
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "ready")
}

// report tells the parent that the child is ready, or why it ended before. It
// returns err.
func report(ready *os.File, err error) error {
	message := "ready"
	if err != nil {
		message = err.Error()
	}
	// Once the child was ready the pipe is closed, and nobody listens.
	_, _ = ready.WriteString(message)
	ready.Close()
	return err
}

// startChild starts this program again as one of the lab's processes and waits
// until it reports. It is killed with the calling thread if sys says so.
func startChild(name string, args []string, log string, inherit []*os.File, sys *syscall.SysProcAttr) (*exec.Cmd, error) {
	logFile, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	defer logFile.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	defer r.Close()
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{name}, args...), Dir: "/",
		Stdout: logFile, Stderr: logFile, ExtraFiles: append(inherit, w), SysProcAttr: sys,
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	text, err := io.ReadAll(io.LimitReader(r, 1<<16))
	if err == nil && string(text) == "ready" {
		return cmd, nil
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if len(text) == 0 {
		return nil, fmt.Errorf("%s ended, %s", name, logEnd(log))
	}
	return nil, errors.New(strings.TrimSpace(string(text)))
}

// runSupervisor makes the sites and the link of the lab in dir and carries the
// link's packets until it is killed. All that it made ends with it, except the
// names of the network namespaces and the files in dir.
func runSupervisor(dir string, ready *os.File) error {
	// The kernel kills the inits when the thread that started them ends.
	runtime.LockOSThread()
	// The link's threads must find a processor of the Go scheduler idle when a
	// packet comes, or they would wait for a thread without their priority.
	runtime.GOMAXPROCS(runtime.NumCPU() + 4)
	l, err := Open(dir)
	if err != nil {
		return err
	}
	l.Supervisor = os.Getpid()
	if err := l.save(); err != nil {
		return err
	}
	if err := l.writeConfig(); err != nil {
		return err
	}
	for _, s := range l.Sites {
		if err := l.startSite(s); err != nil {
			return fmt.Errorf("start site %s: %w", s.Name, err)
		}
	}
	wires, err := l.connectDataCentres()
	if err != nil {
		return err
	}
	if err := l.Sites[Users].connectUsers(l.Sites[LocalDC]); err != nil {
		return err
	}
	if l.Services {
		if err := l.connectUplinks(); err != nil {
			return err
		}
	}
	link, err := newEmulator(l.Link, wires...)
	if err != nil {
		return err
	}
	go func() { // for as long as the process lives
		slog.Error("link ended", "err", link.run())
	}()
	listener, err := listenControl(l.Control)
	if err != nil {
		return err
	}
	if err := l.save(); err != nil {
		return err
	}
	if err := report(ready, nil); err != nil {
		return err
	}
	return http.Serve(listener, linkHandler(link))
}

// connectDataCentres makes the bridges, and a link between any two data centres.
// A site's devices of the WAN are wan0, wan1.
func (l *Lab) connectDataCentres() ([]wire, error) {
	names := l.DataCentres()
	for _, name := range names {
		if err := l.Sites[name].connectGuests(); err != nil {
			return nil, err
		}
	}
	var wires []wire
	links := map[string]int{} // of each site so far
	for i, name := range names {
		for _, peer := range names[:i] {
			w := wire{sites: [2]string{peer, name}}
			for end, site := range w.sites {
				var err error
				device := fmt.Sprintf("wan%d", links[site])
				if w.tuns[end], err = l.Sites[site].connectPeer(device, l.Sites[w.sites[1-end]]); err != nil {
					return nil, err
				}
				links[site]++
			}
			wires = append(wires, w)
		}
	}
	return wires, nil
}

// startSite starts the init of a site and names its network namespace. The
// users' commands are ordinary processes of the host, so that they can be
// signalled, but for network and mounts.
func (l *Lab) startSite(s *Site) error {
	var namespaces uintptr = unix.CLONE_NEWNS | unix.CLONE_NEWNET
	if s.Name != Users {
		namespaces |= unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC
	}
	init, err := startChild(siteInitName, []string{l.Dir, s.Name}, filepath.Join(s.Dir, "log", "init.log"), nil, &syscall.SysProcAttr{
		Cloneflags: namespaces,
		Pdeathsig:  unix.SIGKILL,
		Setsid:     true,
	})
	if err != nil {
		return err
	}
	s.Pid = init.Process.Pid
	go func() { // reaps it; ends with the process at the latest
		slog.Error("site ended", "site", s.Name, "err", init.Wait())
	}()
	return nameNamespace(fmt.Sprintf("/proc/%d/ns/net", s.Pid), s.Namespace)
}

func linkHandler(link *emulator) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/link", answer(func(*http.Request) (any, error) { return link.state() }))
	mux.HandleFunc("PATCH /v1/link", answer(func(r *http.Request) (any, error) {
		var change LinkChange
		decoder := json.NewDecoder(r.Body)
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&change); err != nil {
			return nil, fmt.Errorf("bad request: %w", err)
		}
		return nil, link.change(change)
	}))
	mux.HandleFunc("POST /v1/link/rebind/{site}", answer(func(r *http.Request) (any, error) {
		return nil, link.rebind(r.PathValue("site"))
	}))
	mux.HandleFunc("POST /v1/link/reset-counters", answer(func(*http.Request) (any, error) {
		link.resetCounters()
		return nil, nil
	}))
	return mux
}
