//go:build lab

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab"
)

// wanlab prepares the program, for the lab in dir.
func wanlab(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "WANLAB_TEST_MAIN=1", "WANLAB_DIR="+dir)
	return cmd
}

// run runs the program and returns its output, its errors and its exit status.
func run(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// mustRun runs the program, which must succeed, and returns its output.
func mustRun(t *testing.T, dir string, args ...string) string {
	t.Helper()
	stdout, stderr, status := run(t, wanlab(dir, args...))
	if status != 0 {
		t.Fatalf("wanlab %q: status %d: %s", args, status, stderr)
	}
	return stdout
}

func labDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "lab")
	t.Cleanup(func() {
		if _, stderr, status := run(t, wanlab(dir, "down")); status != 0 {
			t.Errorf("wanlab down: %s", stderr)
		}
	})
	return dir
}

func TestCommands(t *testing.T) {
	dir := labDir(t)
	if got := mustRun(t, dir, "up", "--no-agent", "--rate", "200mbit", "--rtt", "20ms", "--loss", "0.5%", "--burst", "3", "--seed", "9"); !strings.Contains(got, "200mbit, 20ms round trip, 0.5% loss in bursts of 3") {
		t.Errorf("up printed:\n%s", got)
	}
	if _, stderr, status := run(t, wanlab(dir, "up", "--no-agent")); status != 1 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "runs there already") {
		t.Errorf("up again: status %d: %s", status, stderr)
	}

	cmd := wanlab(dir, "exec", lab.LocalDC, "--", "sh", "-c", "cat; echo $0 $1 >&2; exit 9", "a", "--flag")
	cmd.Stdin = strings.NewReader("input")
	if stdout, stderr, status := run(t, cmd); stdout != "input" || stderr != "a --flag\n" || status != 9 {
		t.Errorf("exec: status %d, output %q, errors %q", status, stdout, stderr)
	}
	if got := mustRun(t, dir, "exec", lab.RemoteDC, "hostname", "--short"); got != "remote-dc\n" {
		t.Errorf("exec without --: %q", got)
	}
	if _, stderr, status := run(t, wanlab(dir, "exec", "paris", "--", "true")); status != 1 || stderr != "wanlab: no site \"paris\": there are local-dc, remote-dc, users\n" {
		t.Errorf("exec in an unknown site: status %d: %s", status, stderr)
	}

	mustRun(t, dir, "link", "--loss", "0%", "--burst", "0", "--reset-counters")
	mustRun(t, dir, "exec", lab.Users, "--", "ping", "-c", "3", "-i", "0.2", "10.255.0.2")
	mustRun(t, dir, "link", "--cut", "--from", lab.RemoteDC)
	if _, _, status := run(t, wanlab(dir, "exec", lab.Users, "--", "ping", "-c", "2", "-i", "0.2", "-W", "1", "10.255.0.2")); status == 0 {
		t.Error("ping across a link that is cut")
	}
	if got := mustRun(t, dir, "link", "--restore"); got != "WAN: 200mbit, 20ms round trip, 0% loss\n" {
		t.Errorf("link --restore printed %q", got)
	}
	mustRun(t, dir, "exec", lab.Users, "--", "ping", "-c", "1", "-W", "5", "10.255.0.2")
	var state lab.LinkState
	if err := json.Unmarshal([]byte(mustRun(t, dir, "link", "--counters", "--json")), &state); err != nil {
		t.Fatal(err)
	}
	if c := state.Counters[lab.LocalDC]; c.Packets < 6 || c.Bytes < 6*84 || c.Cut+c.Lost+c.Dropped != 0 {
		t.Errorf("counters from local-dc: %+v, want 6 pings", c)
	}
	if c := state.Counters[lab.RemoteDC]; c.Cut < 2 {
		t.Errorf("counters from remote-dc: %+v, want 2 cut answers", c)
	}
	if _, stderr, status := run(t, wanlab(dir, "link", "--rebind", lab.LocalDC)); status != 1 || !strings.Contains(stderr, `no NAT stands before "local-dc"`) {
		t.Errorf("rebinding no NAT: status %d: %s", status, stderr)
	}
	if got, want := mustRun(t, dir, "link", "--mtu", "1280", "--no-icmp", "--block", "udp", "--nat", lab.LocalDC, "--rebind", lab.LocalDC, "--reorder", "1%", "--duplicate", "0.5%"),
		"WAN: 200mbit, 20ms round trip, 0% loss, 1% reordered, 0.5% twice, MTU 1280 without ICMP, no udp, NAT before local-dc\n"; got != want {
		t.Errorf("link printed %q, want %q", got, want)
	}
	if got := mustRun(t, dir, "link", "--mtu", "0", "--block", "none", "--nat", "none", "--reorder", "0", "--duplicate", "0"); got != "WAN: 200mbit, 20ms round trip, 0% loss\n" {
		t.Errorf("link without faults printed %q", got)
	}
	if got := mustRun(t, dir, "link", "--readdress", lab.LocalDC); !strings.HasPrefix(got, "local-dc: WAN 10.255.8.1 fd00:255:8::1\n") {
		t.Errorf("link --readdress printed %q", got)
	}
	mustRun(t, dir, "exec", lab.LocalDC, "--", "ping", "-c", "1", "-W", "5", "10.255.0.2")
	if _, stderr, status := run(t, wanlab(dir, "link", "--cut", "--from", "paris")); status != 1 || !strings.Contains(stderr, "there are local-dc, remote-dc\n") {
		t.Errorf("cut from an unknown site: status %d: %s", status, stderr)
	}

	var status lab.Status
	if err := json.Unmarshal([]byte(mustRun(t, dir, "status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	if status.Supervisor == 0 || len(status.Sites) != 2 || !status.Sites[1].Daemons[lab.Libvirtd].Running || len(status.Problems) > 0 {
		t.Errorf("status: %+v", status)
	}
	if got := mustRun(t, dir, "status"); strings.Count(got, "libvirtd  runs") != 2 {
		t.Errorf("status printed:\n%s", got)
	}

	mustRun(t, dir, "down")
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after down: %v, want no directory", err)
	}
	mustRun(t, dir, "down")
}

func TestUpWithServices(t *testing.T) {
	dir := labDir(t)
	got := mustRun(t, dir, "up", "--no-agent", "--services")
	_, after, found := strings.Cut(got, "router at birdc -s ")
	socket, _, _ := strings.Cut(after, "\n")
	if !found {
		t.Fatalf("up printed:\n%s", got)
	}
	if out, err := exec.Command("birdc", "-r", "-s", socket, "show", "status").CombinedOutput(); err != nil || !strings.Contains(string(out), "up and running") {
		t.Errorf("birdc -s %s: %v\n%s", socket, err, out)
	}
	if got := mustRun(t, dir, "status"); strings.Count(got, "bird      runs") != 3 || strings.Count(got, "named     runs") != 1 {
		t.Errorf("status printed:\n%s", got)
	}
	if got := mustRun(t, dir, "exec", lab.Users, "--", "getent", "ahostsv4", "ns.local-dc"); !strings.HasPrefix(got, "10.10.0.1 ") {
		t.Errorf("users look up the name server: %s", got)
	}
}

// TestUpIsStopped stops up at many moments, asking it and killing it.
func TestUpIsStopped(t *testing.T) {
	dir := labDir(t)
	mustRun(t, dir, "up", "--no-agent")
	l, err := lab.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, dir, "down")

	stopped := 0
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGKILL} {
		for _, after := range []time.Duration{1, 10, 20, 30, 50, 80, 120, 200, 300} {
			cmd := wanlab(dir, "up", "--no-agent")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after * time.Millisecond)
			if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				stopped++
			}
			if signal == unix.SIGKILL || cmd.ProcessState.ExitCode() == 0 {
				mustRun(t, dir, "down")
			}
			for _, path := range []string{dir, "/run/netns/" + l.Sites[lab.LocalDC].Namespace, "/run/netns/" + l.Sites[lab.Users].Namespace} {
				if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%v after %d ms: %s is left: %s", signal, after, path, stderr.String())
				}
			}
			out, err := exec.Command("pgrep", "--full", "wanlab-.*"+dir).Output()
			if err == nil {
				t.Errorf("%v after %d ms: processes are left: %s", signal, after, out)
			}
		}
	}
	if stopped < 4 {
		t.Errorf("up was stopped %d times of 18: the test is too slow to show anything", stopped)
	}
}
