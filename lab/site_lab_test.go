//go:build lab

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// makeLab makes a lab without agents that is removed with the test.
func makeLab(t *testing.T, link LinkSettings) *Lab {
	t.Helper()
	return upWith(t, Options{Link: link, NoAgent: true})
}

// upWith makes a lab that is removed with the test, and checks that its removal
// leaves nothing.
func upWith(t *testing.T, o Options) *Lab {
	t.Helper()
	o.Dir = filepath.Join(t.TempDir(), "lab")
	before := traces(t, o.Dir)
	l, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
		compareTraces(t, before, traces(t, o.Dir))
	})
	return l
}

// traces lists everything by which a lab in dir could be seen on the host.
func traces(t *testing.T, dir string) []string {
	t.Helper()
	l := newLab(dir)
	var found []string
	for _, pid := range l.processes() {
		found = append(found, fmt.Sprintf("process %d %q", pid, commandLine(pid)))
	}
	for _, pid := range findProcesses(func(pid int) bool { return strings.Contains(strings.Join(commandLine(pid), " "), dir) }) {
		found = append(found, fmt.Sprintf("process %d %q", pid, commandLine(pid)))
	}
	points, err := mountPoints()
	if err != nil {
		t.Fatal(err)
	}
	for _, point := range points {
		if within(point, dir) || strings.Contains(point, "wanlab-"+l.ID) {
			found = append(found, "mount on "+point)
		}
	}
	namespaces, err := filepath.Glob(namespaceDir + "/wanlab-" + l.ID + "-*")
	if err != nil {
		t.Fatal(err)
	}
	found = append(found, namespaces...)
	if _, err := os.Stat(dir); err == nil {
		found = append(found, dir)
	}
	links, err := exec.Command("ip", "-oneline", "link").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(links)) {
		found = append(found, "host interface "+line)
	}
	forward, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		t.Fatal(err)
	}
	return append(found, "ip_forward "+string(forward))
}

func compareTraces(t *testing.T, before, after []string) {
	t.Helper()
	if !slices.Equal(before, after) {
		t.Errorf("the lab left traces:\n%q\nbefore it there were:\n%q", after, before)
	}
}

// run runs a command in a site and returns what it prints.
func run(t *testing.T, l *Lab, site string, args ...string) string {
	t.Helper()
	out, err := l.output(t.Context(), site, args[0], args[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSitesAreApart(t *testing.T) {
	l := makeLab(t, LinkSettings{})
	for _, name := range DataCentres {
		s := l.Sites[name]
		if got := run(t, l, name, "hostname"); got != name {
			t.Errorf("host name of %s is %s", name, got)
		}
		if got := run(t, l, name, "virsh", "list", "--all", "--name"); got != "" {
			t.Errorf("a fresh libvirtd of %s has guests: %s", name, got)
		}
		if got := run(t, l, name, "virsh", "--connect", l.Sites[s.peer()].LibvirtURI, "hostname"); got != s.peer() {
			t.Errorf("the peer of %s is %s", name, got)
		}
		if got := run(t, l, name, "virsh", "capabilities"); !strings.Contains(got, "<uuid>"+s.hostUUID(l.ID)+"</uuid>") {
			t.Errorf("capabilities of %s do not have its host UUID:\n%s", name, got)
		}
		if got := run(t, l, name, "ps", "--no-headers", "-o", "args", "-p", "1"); !strings.HasPrefix(got, siteInitName) {
			t.Errorf("process 1 of %s is %s", name, got)
		}
		if got := run(t, l, name, "ls", "/sys/class/net"); !slices.Contains(strings.Fields(got), bridgeName) {
			t.Errorf("interfaces of %s in /sys are %s", name, got)
		}
		if host, inside := run(t, l, Users, "ls", "/usr/share"), run(t, l, name, "ls", "/usr/share"); host != inside {
			t.Errorf("/usr/share differs in %s", name)
		}
		run(t, l, name, "touch", "/etc/wanmig/trace", "/var/lib/libvirt/trace", "/run/trace")
		for _, dir := range []string{"/etc/wanmig", "/var/lib/libvirt", "/run"} {
			if _, err := os.Stat(s.Dir + dir + "/trace"); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(dir + "/trace"); err == nil {
				t.Errorf("%s of %s is the host's", dir, name)
			}
		}
		mounts := run(t, l, name, "cat", "/proc/self/mountinfo")
		if strings.Contains(mounts, namespaceDir+"/") || strings.Contains(mounts, "/sys/fs/cgroup") {
			t.Errorf("%s keeps mounts of the host in use:\n%s", name, mounts)
		}
	}
	for _, addr := range []string{"10.10.0.1", "10.20.0.1", "10.255.0.2", "fd00:10::1", "fd00:20::1", "fd00:255::2",
		"10.11.0.1", "10.21.0.1", "fd00:11::1", "fd00:21::1"} {
		run(t, l, Users, "ping", "-c", "1", "-W", "5", addr)
	}
}

func TestCommand(t *testing.T) {
	l := makeLab(t, LinkSettings{})
	for _, site := range []string{LocalDC, Users} {
		cmd, err := l.Command(t.Context(), site, "sh", "-c", "cat; echo problem >&2; exit 7")
		if err != nil {
			t.Fatal(err)
		}
		var stdout, stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("input"), &stdout, &stderr
		err = cmd.Run()
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 7 {
			t.Errorf("in %s: %v, want exit status 7", site, err)
		}
		if stdout.String() != "input" || stderr.String() != "problem\n" {
			t.Errorf("in %s: output %q and %q", site, stdout.String(), stderr.String())
		}
		dir, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		if got := run(t, l, site, "pwd"); got != dir {
			t.Errorf("in %s: working directory %s, want %s", site, got, dir)
		}

		ctx, cancel := context.WithCancel(t.Context())
		cmd, err = l.Command(ctx, site, "sleep", "987654")
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		sleeping := func(pid int) bool { return slices.Equal(commandLine(pid), []string{"sleep", "987654"}) }
		eventually(t, "the command runs", func() bool { return len(findProcesses(sleeping)) == 1 })
		cancel()
		_ = cmd.Wait()
		eventually(t, "the command is killed", func() bool { return len(findProcesses(sleeping)) == 0 })
	}
	if _, err := l.Command(t.Context(), "paris", "true"); err == nil {
		t.Error("a command runs in an unknown site")
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func TestDaemonsAreKilledAndStarted(t *testing.T) {
	l := makeLab(t, LinkSettings{})
	s := l.Sites[RemoteDC]
	if err := s.StartLibvirtd(t.Context()); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("libvirtd started twice: %v", err)
	}
	if err := s.KillLibvirtd(t.Context()); err != nil {
		t.Fatal(err)
	}
	daemons, err := s.Daemons(t.Context())
	if want := (DaemonStatus{Ended: "signal: killed"}); err != nil || daemons[Libvirtd] != want {
		t.Errorf("libvirtd is %+v, %v; want %+v", daemons[Libvirtd], err, want)
	}
	if err := s.KillLibvirtd(t.Context()); err == nil {
		t.Error("libvirtd was killed twice")
	}
	if status := l.Status(t.Context()); len(status.Problems) > 0 || status.Sites[1].Daemons[Libvirtd].Running || !status.Sites[0].Daemons[Libvirtd].Running {
		t.Errorf("status is %+v", status)
	}
	if err := s.StartLibvirtd(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, l, RemoteDC, "virsh", "list")
	if err := s.StartAgent(t.Context()); err == nil || !strings.Contains(err.Error(), "without agents") {
		t.Errorf("an agent started in a lab without: %v", err)
	}
}

func buildWanmig(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wanmig")
	if out, err := exec.Command("go", "build", "-o", path, "../cmd/wanmig").CombinedOutput(); err != nil {
		t.Fatalf("build wanmig: %v\n%s", err, out)
	}
	return path
}

func TestAgentsKnowEachOther(t *testing.T) {
	wanmig := buildWanmig(t)
	l := upWith(t, Options{Wanmig: wanmig})
	ids := map[string]string{}
	for _, name := range DataCentres {
		ids[name] = run(t, l, name, "wanmig", "id")
	}
	for _, name := range DataCentres {
		peer := l.Sites[l.Sites[name].peer()]
		if got := run(t, l, name, "wanmig", "site", "list"); !strings.Contains(got, ids[peer.Name]) || !strings.Contains(got, peer.AgentAddr.String()) {
			t.Errorf("the agent of %s does not know %s:\n%s", name, peer.Name, got)
		}
		run(t, l, name, "wanmig", "site", "check", peer.Name)
	}
	s := l.Sites[RemoteDC]
	if err := s.KillAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	if daemons, err := s.Daemons(t.Context()); err != nil || daemons[Agent].Running {
		t.Errorf("killed agent is %+v, %v", daemons[Agent], err)
	}
	if err := s.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := run(t, l, RemoteDC, "wanmig", "id"); got != ids[RemoteDC] {
		t.Errorf("a new start made the identity %s of %s", got, ids[RemoteDC])
	}
}

// TestOrphansAreReaped lets a child of init be one whose parent has gone.
func TestOrphansAreReaped(t *testing.T) {
	l := makeLab(t, LinkSettings{})
	run(t, l, LocalDC, "sh", "-c", "sleep 0.2 >/dev/null 2>&1 & sleep 0.1 >/dev/null 2>&1 &")
	eventually(t, "no process is left but init, libvirtd and ps", func() bool {
		lines := strings.Split(run(t, l, LocalDC, "ps", "--no-headers", "-eo", "comm"), "\n")
		return len(lines) == 3
	})
}

func TestKilledSupervisorTakesAllWithIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lab")
	before := traces(t, dir)
	l, err := Up(t.Context(), Options{Dir: dir, NoAgent: true})
	if err != nil {
		t.Fatal(err)
	}
	var inside []*exec.Cmd
	for _, site := range []string{LocalDC, Users} {
		cmd, err := l.Command(context.Background(), site, "sleep", "876543")
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		inside = append(inside, cmd)
	}
	run(t, l, RemoteDC, "sh", "-c", "setsid --fork sleep 876543 >/dev/null 2>&1")
	if err := unix.Kill(l.Supervisor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the data centres end with the supervisor", func() bool {
		return !isSiteInit(l.Sites[LocalDC].Pid, LocalDC) && !isSiteInit(l.Sites[RemoteDC].Pid, RemoteDC)
	})
	if _, err := l.Command(t.Context(), LocalDC, "true"); err == nil {
		t.Error("a command runs in a site that has ended")
	}
	if _, err := l.LinkState(t.Context()); err == nil || !strings.Contains(err.Error(), "wanlab down") {
		t.Errorf("the link of a dead lab: %v", err)
	}
	if status := l.Status(t.Context()); status.Supervisor != 0 {
		t.Errorf("status of a dead lab: %+v", status)
	}
	if _, err := Up(t.Context(), Options{Dir: dir, NoAgent: true}); err == nil || !strings.Contains(err.Error(), "wanlab down") {
		t.Errorf("up on what is left of a lab: %v", err)
	}
	if err := Down(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range inside {
		_ = cmd.Wait()
	}
	compareTraces(t, before, traces(t, dir))
	if left := findProcesses(func(pid int) bool { return slices.Equal(commandLine(pid), []string{"sleep", "876543"}) }); len(left) > 0 {
		t.Errorf("processes %v outlived the lab", left)
	}
	if err := Down(t.Context(), dir); err != nil {
		t.Errorf("down again: %v", err)
	}
}

func TestDownAfterAHalfMadeUp(t *testing.T) {
	for name, crash := range map[string]func(dir string) error{
		"directory made": func(dir string) error {
			return os.Mkdir(unclaimed(dir), 0o700)
		},
		"not named yet": func(dir string) error {
			if err := os.Mkdir(unclaimed(dir), 0o700); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(unclaimed(dir), markerName), nil, 0o600)
		},
		"marked": func(dir string) error {
			lock, err := claim(dir)
			if err != nil {
				return err
			}
			return lock.Close()
		},
		"described": func(dir string) error {
			lock, err := claim(dir)
			if err != nil {
				return err
			}
			lock.Close()
			return newLab(dir).save()
		},
		"namespace named": func(dir string) error {
			lock, err := claim(dir)
			if err != nil {
				return err
			}
			lock.Close()
			// Never the host's own: down kills what is in it.
			return onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
				return nameNamespace(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), newLab(dir).Sites[Users].Namespace)
			})
		},
		"namespace file only": func(dir string) error {
			return os.WriteFile(newLab(dir).Sites[LocalDC].namespacePath(), nil, 0o444)
		},
		"lab.json cut short": func(dir string) error {
			lock, err := claim(dir)
			if err != nil {
				return err
			}
			lock.Close()
			return os.WriteFile(filepath.Join(dir, "lab.json"), []byte(`{"dir":`), 0o600)
		},
		"directory gone": func(dir string) error {
			if _, err := Up(context.Background(), Options{Dir: dir, NoAgent: true}); err != nil {
				return err
			}
			return os.RemoveAll(dir)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "lab")
			before := traces(t, dir)
			if err := crash(dir); err != nil {
				t.Fatal(err)
			}
			if err := Down(t.Context(), dir); err != nil {
				t.Fatal(err)
			}
			compareTraces(t, before, traces(t, dir))
			if entries, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(entries) > 0 {
				t.Errorf("left beside the lab: %v, %v", entries, err)
			}
		})
	}
}

func TestDownRefusesWhatIsNoLab(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "precious")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Down(t.Context(), dir); !errors.Is(err, ErrNoLab) {
		t.Errorf("got %v, want ErrNoLab", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestDownRefusesMountsInItsDirectory(t *testing.T) {
	l := makeLab(t, LinkSettings{})
	point := filepath.Join(l.Dir, "mounted")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(t.TempDir(), point, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	err := l.Down(t.Context())
	if unmountErr := unix.Unmount(point, 0); unmountErr != nil {
		t.Fatal(unmountErr)
	}
	if err == nil || !strings.Contains(err.Error(), point) {
		t.Errorf("got %v, want an error that names %s", err, point)
	}
}

func TestTwoLabs(t *testing.T) {
	one, two := makeLab(t, LinkSettings{RTT: 10 * time.Millisecond}), makeLab(t, LinkSettings{})
	run(t, one, LocalDC, "touch", "/run/one")
	if out, err := two.output(t.Context(), LocalDC, "ls", "/run/one"); err == nil {
		t.Errorf("two labs share a /run: %s", out)
	}
	if _, err := Up(t.Context(), Options{Dir: two.Dir, NoAgent: true}); !errors.Is(err, ErrRunning) {
		t.Errorf("up in a running lab: %v, want ErrRunning", err)
	}
	if err := two.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, one, Users, "ping", "-c", "1", "-W", "5", "10.20.0.1")
}

func TestFailedUpLeavesNothing(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		o    Options
		want string
	}{
		"agent ends":       {t.Context(), Options{Wanmig: "/bin/false"}, "start agent in local-dc: exit status 1"},
		"no agent program": {t.Context(), Options{Wanmig: "/no/wanmig"}, "--wanmig"},
		"given up":         {cancelled, Options{NoAgent: true}, "context canceled"},
		"bad link":         {t.Context(), Options{NoAgent: true, Link: LinkSettings{Loss: 2}}, "loss"},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Dir = filepath.Join(t.TempDir(), "lab")
			before := traces(t, c.o.Dir)
			_, err := Up(c.ctx, c.o)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			compareTraces(t, before, traces(t, c.o.Dir))
		})
	}
}
