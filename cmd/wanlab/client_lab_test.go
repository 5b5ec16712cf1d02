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

func TestClient(t *testing.T) {
	dir := labDir(t)
	guest := filepath.Join(t.TempDir(), "wanlab-guest")
	build := exec.Command("go", "build", "-o", guest, "../../lab/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	mustRun(t, dir, "up", "--no-agent")
	made := mustRun(t, dir, "vm", "web", "--ssh", "--second-nic", "--memory", "256MiB", "--disk", "16MiB", "--guest", guest)
	if !strings.Contains(made, "  10.11.0.10, fd00:11::10, 52:54:01:") {
		t.Errorf("a guest with a second NIC printed:\n%s", made)
	}

	var seen struct {
		Stream   lab.StreamResult
		UDP      lab.UDPResult
		Download lab.DownloadResult
		SSH      lab.SSHResult
	}
	text := mustRun(t, dir, "client", "web", "--stream", "20ms", "--udp", "20ms", "--download", "64,1MiB/s", "--ssh", "--for", "2s", "--json")
	if err := json.Unmarshal([]byte(text), &seen); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	if seen.Stream.Answered < 50 || seen.UDP.Answered < 50 || seen.Download.Bytes < 1<<19 || seen.SSH.Lines < 3 {
		t.Errorf("too little came back: %+v", seen)
	}

	// It ends with its download, long before its time.
	got := mustRun(t, dir, "client", "web", "--from", lab.RemoteDC, "--address", "10.11.0.10", "--download", "2", "--for", "10m")
	if !strings.HasPrefix(got, "download  2.0 of 2 MiB at ") || !strings.Contains(got, ", 0 bytes wrong, 0 resets; longest gap ") || strings.Count(got, "\n") != 1 {
		t.Errorf("a download printed:\n%s", got)
	}

	cmd := wanlab(dir, "client", "web", "--stream", "10ms", "--ssh")
	stdout, stderr, status := runThen(t, cmd, 3*time.Second, func() {
		if err := cmd.Process.Signal(unix.SIGINT); err != nil {
			t.Error(err)
		}
	})
	if status != 0 || stderr != "" || strings.Count(stdout, "\n") != 2 || !strings.Contains(stdout, " 0 out of order, 0 resets; longest gap ") {
		t.Errorf("interrupted: status %d: %s%s", status, stdout, stderr)
	}

	cmd = wanlab(dir, "client", "web", "--from", lab.RemoteDC, "--stream", "10ms", "--udp", "10ms", "--for", "4s")
	stdout, stderr, status = runThen(t, cmd, 2*time.Second, func() { mustRun(t, dir, "link", "--cut") })
	if status != 1 || !strings.Contains(stdout, ", BROKEN: no more answers within 10s") || !strings.Contains(stderr, "stream: the connection broke with ") ||
		!strings.Contains(stderr, "; udp: no answer in the last ") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("over a link that was cut: status %d: %s%s", status, stdout, stderr)
	}
	if _, stderr, status := run(t, wanlab(dir, "client", "web", "--from", lab.RemoteDC, "--stream", "10ms")); status != 1 || !strings.Contains(stderr, `stream to VM "web": connect from remote-dc: `) {
		t.Errorf("over a link that is cut: status %d: %s", status, stderr)
	}
}

// runThen is run, with something done a while after the start.
func runThen(t *testing.T, cmd *exec.Cmd, after time.Duration, do func()) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(after)
	do()
	err := cmd.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}
