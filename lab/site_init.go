package lab

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// runSiteInit is process 1 of a data centre, and a process of the users. It
// mounts the site's own directories, starts and kills daemons when asked, and
// reaps whatever is orphaned to it. It ends only by being killed.
func runSiteInit(dir, name string, ready *os.File) error {
	l, err := Open(dir)
	if err != nil {
		return err
	}
	s, err := l.Site(name)
	if err != nil {
		return err
	}
	if err := l.mountSite(s); err != nil {
		return err
	}
	if name != Users {
		if err := unix.Sethostname([]byte(name)); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
	}
	d := newDaemons(l, s)
	go d.reap() // for as long as the process lives
	listener, err := listenControl(s.Control)
	if err != nil {
		return err
	}
	if err := report(ready, nil); err != nil {
		return err
	}
	return http.Serve(listener, d.handler())
}

// daemons are the processes that a site's init was asked to run.
type daemons struct {
	children chan os.Signal // SIGCHLD
	byName   map[string]*daemon
	mu       sync.Mutex // guards the fields of each daemon
}

type daemon struct {
	program string
	args    []string
	log     string

	pid   int           // 0 unless running
	ended string        // how it ended last
	done  chan struct{} // closed at the end of the current run
}

func newDaemons(l *Lab, s *Site) *daemons {
	d := &daemons{children: make(chan os.Signal, 1), byName: map[string]*daemon{}}
	add := func(name, program string, args ...string) {
		d.byName[name] = &daemon{program: program, args: args, log: s.log(name)}
	}
	if s.Name != Users {
		add(Libvirtd, "libvirtd", "--listen")
		if l.Wanmig != "" {
			add(Agent, l.Wanmig, "agent", "--config", "/etc/wanmig/agent.yaml")
		}
	}
	if l.Services {
		add(Bird, "bird", "-f", "-c", s.birdConfig(), "-s", s.BirdSocket())
		if s.Name == LocalDC {
			add(Named, "named", "-g", "-n", "1", "-c", namedFile)
		}
	}
	signal.Notify(d.children, unix.SIGCHLD)
	return d
}

func (d *daemons) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/daemons", answer(func(*http.Request) (any, error) { return d.status(), nil }))
	mux.HandleFunc("POST /v1/daemons/{name}/start", answer(func(r *http.Request) (any, error) {
		return nil, d.start(r.PathValue("name"))
	}))
	mux.HandleFunc("POST /v1/daemons/{name}/kill", answer(func(r *http.Request) (any, error) {
		return nil, d.kill(r.PathValue("name"))
	}))
	return mux
}

func (d *daemons) status() map[string]DaemonStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	status := map[string]DaemonStatus{}
	for name, p := range d.byName {
		status[name] = DaemonStatus{Running: p.pid != 0, Pid: p.pid, Ended: p.ended}
	}
	return status
}

func (d *daemons) find(name string) (*daemon, error) {
	if p := d.byName[name]; p != nil {
		return p, nil
	}
	if name == Agent {
		return nil, errors.New("this lab was made without agents")
	}
	return nil, fmt.Errorf("no daemon %q", name)
}

// start forks with syscall since os would wait for the child itself, and reap
// waits for every child.
func (d *daemons) start(name string) error {
	p, err := d.find(name)
	if err != nil {
		return err
	}
	program, err := lookPath(p.program)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()

	d.mu.Lock() // until the pid is known to reap
	defer d.mu.Unlock()
	if p.pid != 0 {
		return fmt.Errorf("it runs already, as process %d", p.pid)
	}
	pid, err := syscall.ForkExec(program, append([]string{filepath.Base(program)}, p.args...), &syscall.ProcAttr{
		Dir:   "/",
		Env:   os.Environ(),
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		// The kernel kills what is in a data centre with its init anyway. No thread
		// of init's ends before init, since none is locked to a goroutine.
		Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", program, err)
	}
	p.pid, p.ended, p.done = pid, "", make(chan struct{})
	slog.Info("daemon started", "daemon", name, "pid", pid)
	return nil
}

func (d *daemons) kill(name string) error {
	p, err := d.find(name)
	if err != nil {
		return err
	}
	d.mu.Lock()
	if p.pid == 0 {
		d.mu.Unlock()
		return errors.New("it does not run")
	}
	done := p.done
	err = syscall.Kill(p.pid, syscall.SIGKILL)
	d.mu.Unlock()
	if err != nil {
		return fmt.Errorf("kill %s: %w", name, err)
	}
	<-done
	return nil
}

func (d *daemons) reap() {
	for range d.children {
		for d.reapOne() {
		}
	}
}

func (d *daemons) reapOne() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	var status syscall.WaitStatus
	pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
	if err != nil || pid <= 0 {
		return errors.Is(err, syscall.EINTR)
	}
	for name, p := range d.byName {
		if p.pid != pid {
			continue
		}
		p.pid, p.ended = 0, fmt.Sprintf("exit status %d", status.ExitStatus())
		if status.Signaled() {
			p.ended = "signal: " + status.Signal().String()
		}
		close(p.done)
		slog.Info("daemon ended", "daemon", name, "pid", pid, "status", p.ended)
	}
	return true
}
