//go:build lab

package hypervisor

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// site is a libvirtd in namespaces of its own:
//
//	DIR/run  DIR/lib  DIR/log  DIR/cache  DIR/etc     over /run, /var/lib, /var/log, /var/cache, /etc/libvirt
//	DIR/run/libvirt/libvirt-sock                      the same socket, seen from outside
//	DIR/passwd  DIR/group                             with the user that Debian's libvirt insists on
//	DIR/disks                                         the same path inside and outside
type site struct {
	dir  string
	host *Host
	init int // the first process of the namespaces
}

const siteInit = `
set -e
mount --make-rprivate /
for p in run:/run lib:/var/lib log:/var/log cache:/var/cache etc:/etc/libvirt; do
	mount --bind "$0/${p%%:*}" "${p#*:}"
done
for f in passwd group; do
	cp "/etc/$f" "$0/$f"
	echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin' | if [ $f = group ]; then cut -d: -f1-3 | sed 's/$/:/'; else cat; fi >>"$0/$f"
	mount --bind "$0/$f" "/etc/$f"
done
mkdir -p /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
hostname "$1"
ip link set lo up
set +e
while :; do libvirtd -f /etc/libvirt/libvirtd.conf; sleep 0.1; done
`

func newSite(t *testing.T, name string) *site {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "hv-")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"run", "lib", "log", "cache", "etc", "disks"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	uuid := make([]byte, 16)
	_, _ = rand.Read(uuid)
	write(t, filepath.Join(dir, "etc/libvirtd.conf"), fmt.Sprintf("auth_unix_rw = \"none\"\nhost_uuid = \"%s\"\nlog_outputs = \"2:file:/var/log/libvirt/libvirtd.log\"\n", hex.EncodeToString(uuid)))
	write(t, filepath.Join(dir, "etc/qemu.conf"), "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = \"file\"\n")
	log, err := os.Create(filepath.Join(dir, "site.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", siteInit, dir, name)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &site{dir: dir}
	t.Cleanup(func() {
		if t.Failed() {
			for _, f := range []string{"site.log", "log/libvirt/libvirtd.log"} {
				b, _ := os.ReadFile(filepath.Join(dir, f))
				t.Logf("%s %s:\n%s", name, f, b[max(0, len(b)-4000):])
			}
			logs, _ := filepath.Glob(filepath.Join(dir, "log/libvirt/qemu/*.log"))
			for _, f := range logs {
				b, _ := os.ReadFile(f)
				t.Logf("%s:\n%s", f, b[max(0, len(b)-1500):])
			}
		}
		if s.host != nil {
			s.host.Close()
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		log.Close()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s.init = only(t, children(cmd.Process.Pid))
	s.host = s.open(t)
	return s
}

func (s *site) socket() string { return filepath.Join(s.dir, "run/libvirt/libvirt-sock") }

// open waits until libvirtd answers.
func (s *site) open(t *testing.T) *Host {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		h := New(s.socket(), log)
		_, err := h.Info(t.Context())
		if err == nil {
			return h
		}
		if time.Now().After(until) {
			t.Fatal(err)
		}
	}
}

// restart kills libvirtd and waits for the next one. Guests run on.
func (s *site) restart(t *testing.T) {
	t.Helper()
	p := s.libvirtd(t)
	if err := syscall.Kill(p, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of libvirtd", func() bool { return syscall.Kill(p, 0) != nil })
	s.open(t).Close()
}

// freeze stops libvirtd, not its guests, until resume is called.
func (s *site) freeze(t *testing.T) (resume func()) {
	t.Helper()
	p := s.libvirtd(t)
	if err := syscall.Kill(p, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := syscall.Kill(p, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *site) libvirtd(t *testing.T) int {
	t.Helper()
	for _, p := range children(s.init) {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p)); strings.TrimSpace(string(b)) == "libvirtd" {
			return p
		}
	}
	t.Fatal("no libvirtd")
	return 0
}

// virsh runs virsh on this site.
func (s *site) virsh(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-q", "-c", "qemu+unix:///system?socket=" + s.socket()}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func children(pid int) []int {
	var list []int
	for until := time.Now().Add(5 * time.Second); len(list) == 0 && time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				list = append(list, n)
			}
		}
	}
	return list
}

func only(t *testing.T, pids []int) int {
	t.Helper()
	if len(pids) != 1 {
		t.Fatalf("processes %v, want one", pids)
	}
	return pids[0]
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s did not come", what)
		}
	}
}

// relay joins a listening socket at the source with one at the destination.
type relay struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	closed   bool
	group    sync.WaitGroup
	budget   int64         // bytes before a stall, 0 for no limit
	stalled  chan struct{} // closed when they are spent
	over     chan struct{} // closed by close
}

func newRelay(t *testing.T, l net.Listener, to string) *relay {
	r := &relay{listener: l, stalled: make(chan struct{}), over: make(chan struct{})}
	r.group.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("unix", to)
			if err != nil {
				t.Errorf("relay: %v", err)
				a.Close()
				return
			}
			r.mu.Lock()
			r.conns = append(r.conns, a, b)
			if r.closed {
				a.Close()
				b.Close()
			}
			r.mu.Unlock()
			r.group.Go(func() { r.splice(a, b) })
			r.group.Go(func() { r.splice(b, a) })
		}
	})
	t.Cleanup(r.close)
	return r
}

func (r *relay) splice(dst, src net.Conn) {
	_, _ = io.Copy(struct{ io.Writer }{writerFunc(func(p []byte) (int, error) {
		r.spend(len(p))
		return dst.Write(p)
	})}, src)
	_ = dst.(*net.UnixConn).CloseWrite()
}

// stall makes the relay take so many bytes and then no more.
func (r *relay) stall(after int64) {
	r.mu.Lock()
	r.budget = after
	r.mu.Unlock()
}

func (r *relay) spend(n int) {
	r.mu.Lock()
	if r.budget == 0 {
		r.mu.Unlock()
		return
	}
	if r.budget -= int64(n); r.budget > 0 {
		r.mu.Unlock()
		return
	}
	r.budget = 1
	select {
	case <-r.stalled:
	default:
		close(r.stalled)
	}
	r.mu.Unlock()
	<-r.over
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (r *relay) close() {
	r.listener.Close()
	r.mu.Lock()
	if !r.closed {
		close(r.over)
	}
	r.closed = true
	for _, c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.group.Wait()
}

// attachLoop makes a block device of a file.
func attachLoop(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { tool(t, "losetup", "--detach", dev) })
	return dev
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
