package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/netredirect"
)

// hooked has one program, a shell script.
func hooked(t *testing.T, limit time.Duration, script string) (h Hooks, program string) {
	t.Helper()
	program = filepath.Join(t.TempDir(), "a hook's program")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return Hooks{Programs: map[Hook]string{BeforeStop: program}, Timeout: limit}, program
}

func TestHookSeesTheMove(t *testing.T) {
	out := filepath.Join(t.TempDir(), "seen")
	h, _ := hooked(t, time.Minute, `{ echo "$# $1 $(pwd)"; env; } > "$OUT"`)
	t.Setenv("WANMIG_TEST_SECRET", "not the hook's")
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8:1::10")}
	mapped := map[netip.Addr]netip.Addr{addrs[0]: netip.MustParseAddr("203.0.113.99"), addrs[2]: netip.MustParseAddr("2001:db8:9::99")}
	env := hookEnv("mv-1", "web server $(reboot) `x` 'a' \"b\"; ä", "u-1", "source", "site a", "site b", addrs, mapped)
	if err := h.run(t.Context(), BeforeStop, append(env, "OUT="+out)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if lines[0] != "1 before_stop /" {
		t.Errorf("arguments and folder: %q", lines[0])
	}
	for _, want := range []string{"WANMIG_HOOK=before_stop", "WANMIG_MOVE=mv-1", "WANMIG_VM=web server $(reboot) `x` 'a' \"b\"; ä", "WANMIG_UUID=u-1",
		"WANMIG_ROLE=source", "WANMIG_FROM=site a", "WANMIG_TO=site b", "WANMIG_ADDRESSES=192.0.2.10 192.0.2.11 2001:db8:1::10",
		"WANMIG_NEW_ADDRESSES=203.0.113.99 2001:db8:9::99", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"} {
		if !slices.Contains(lines, want) {
			t.Errorf("the hook does not see %q", want)
		}
	}
	if strings.Contains(string(text), "SECRET") {
		t.Error("the hook sees the agent's environment")
	}
}

func TestHookEnvWithoutRedirect(t *testing.T) {
	env := hookEnv("mv-1", "a", "u", "source", "x", "y", nil, nil)
	for _, want := range []string{"WANMIG_ADDRESSES=", "WANMIG_NEW_ADDRESSES="} {
		if !slices.Contains(env, want) {
			t.Errorf("no %q in %q", want, env)
		}
	}
}

func TestHookFailure(t *testing.T) {
	h, program := hooked(t, time.Minute, "echo to its output; echo to its errors >&2; exit 7")
	err := h.run(t.Context(), BeforeStop, nil)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("%v does not tell the exit status", err)
	}
	for _, want := range []string{"hook before_stop", program, "exit status 7", "to its output\nto its errors"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not tell %q", err, want)
		}
	}
	h, _ = hooked(t, time.Minute, "kill -9 $$")
	if err := h.run(t.Context(), BeforeStop, nil); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("killed: %v", err)
	}
}

func TestHookThatIsNotThere(t *testing.T) {
	h := Hooks{Programs: map[Hook]string{BeforeStop: "/nowhere/hook", AfterSettle: ""}, Timeout: time.Minute}
	if err := h.run(t.Context(), BeforeStop, nil); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/nowhere/hook") {
		t.Errorf("not there: %v", err)
	}
	for _, hook := range []Hook{AfterResume, AfterSettle} {
		if err := h.run(t.Context(), hook, nil); err != nil {
			t.Errorf("%s has no program: %v", hook, err)
		}
	}
	var none Hooks
	if err := none.run(t.Context(), BeforeStop, nil); err != nil {
		t.Errorf("no hooks: %v", err)
	}
}

// TestHookTakesTooLong starts a child that would hold the output open.
func TestHookTakesTooLong(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	h, program := hooked(t, time.Second, `echo began
sleep 1000 &
echo $$ $! > "$PIDS.new"; mv "$PIDS.new" "$PIDS"
wait`)
	ended := make(chan error, 1)
	go func() { ended <- h.run(context.Background(), BeforeStop, []string{"PIDS=" + pids}) }()
	var err error
	select {
	case err = <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("the time limit does not hold")
	}
	for _, want := range []string{"hook before_stop", program, "did not end in 1s", "began"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not tell %q", err, want)
		}
	}
	text, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	var shell, child int
	if _, err := fmt.Sscan(string(text), &shell, &child); err != nil {
		t.Fatal(err)
	}
	if syscall.Kill(shell, 0) == nil {
		t.Errorf("the program %d lives", shell)
	}
	for end := time.Now().Add(10 * time.Second); runs(child); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			_ = syscall.Kill(child, syscall.SIGKILL)
			t.Fatalf("its child %d lives", child)
		}
	}
}

// runs reports whether a process is there and no zombie.
func runs(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, ok := strings.Cut(string(stat), ") ")
	return err == nil && ok && !strings.HasPrefix(state, "Z")
}

// TestHookLeavesAChild ends well with a child that holds its output open.
func TestHookLeavesAChild(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	h, _ := hooked(t, time.Minute, `sleep 1000 & echo $! > "$PIDS"`)
	err := h.run(t.Context(), BeforeStop, []string{"PIDS=" + pids})
	text, readErr := os.ReadFile(pids)
	var child int
	if _, scanErr := fmt.Sscan(string(text), &child); readErr != nil || scanErr != nil {
		t.Fatal(readErr, scanErr)
	}
	if !runs(child) {
		t.Error("the child that it has left is gone")
	}
	_ = syscall.Kill(child, syscall.SIGKILL)
	if err != nil {
		t.Errorf("a hook that has ended well: %v", err)
	}
}

func TestHookOutputIsBounded(t *testing.T) {
	h, _ := hooked(t, time.Minute, `head -c 50000000 /dev/zero | tr '\0' x; exit 1`)
	if err := h.run(t.Context(), BeforeStop, nil); err == nil || len(err.Error()) > maxHookOutput+200 || strings.Count(err.Error(), "x") < maxHookOutput {
		t.Errorf("an error of %d bytes", len(fmt.Sprint(err)))
	}
	h, _ = hooked(t, time.Minute, `printf 'x'; for i in 1 2 3 4 5 6 7 8 9 10 11; do s="${s:-ä}${s:-ä}"; done; printf '%s\377' "$s"; exit 1`)
	if err := h.run(t.Context(), BeforeStop, nil); err == nil || !utf8.ValidString(err.Error()) || !strings.Contains(err.Error(), "xää") {
		t.Errorf("%q", err)
	}
}

func TestHookReport(t *testing.T) {
	for script, want := range map[string]string{"": "", "true": "", "exit 7": "exit status 7"} {
		var out strings.Builder
		log := slog.New(slog.NewTextHandler(&out, nil))
		e := &Engine{ctx: t.Context()}
		if script != "" {
			e.Hooks, _ = hooked(t, time.Minute, script)
		}
		e.runHook(log, BeforeStop, nil)
		e.Wait()
		if got := out.String(); (got == "") != (want == "") || !strings.Contains(got, want) || want != "" && !strings.Contains(got, "level=WARN") {
			t.Errorf("%q is reported as %q", script, got)
		}
	}
}

func TestHooksCheck(t *testing.T) {
	good, program := hooked(t, time.Minute, "true")
	good.Programs[AfterSettle] = ""
	if err := good.Check(); err != nil {
		t.Errorf("good hooks: %v", err)
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/nowhere/hook": "no such file", filepath.Dir(program): "can't be run", plain: "chmod +x"} {
		h := Hooks{Programs: map[Hook]string{AfterResume: path}}
		if err := h.Check(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "hooks.after_resume") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestSettledRunsAtBothEnds tells from where to where the VM went at either host.
func TestSettledRunsAtBothEnds(t *testing.T) {
	for role, want := range map[netredirect.Role]string{netredirect.Source: "here there source", netredirect.Destination: "there here destination"} {
		out := filepath.Join(t.TempDir(), "seen")
		h, program := hooked(t, time.Minute, `echo "$WANMIG_FROM $WANMIG_TO $WANMIG_ROLE $1 $WANMIG_ADDRESSES" > "`+out+`"`)
		h.Programs = map[Hook]string{AfterSettle: program}
		e := &Engine{Config: Config{Hooks: h, Log: slog.New(slog.DiscardHandler), Site: "here"}, ctx: t.Context()}
		e.Settled(netredirect.Status{Role: role, Peer: "there", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
		e.work.Wait()
		text, err := os.ReadFile(out)
		if err != nil || string(text) != want+" after_settle 192.0.2.1\n" {
			t.Errorf("%s: %q, %v", role, text, err)
		}
	}
}

// TestSourceHookTellsNoOffers keeps from the source's hooks the new addresses
// that the destination has only offered: another VM may have them by now.
func TestSourceHookTellsNoOffers(t *testing.T) {
	own, offered := netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("203.0.113.99")
	s := &source{Engine: &Engine{Config: Config{Redirects: &netredirect.Manager{}, Site: "a"}}, dom: &hypervisor.Domain{Name: "web"}}
	s.redirect.ask.NICs = []netredirect.NIC{{Addresses: []netip.Addr{own}}}
	s.redirect.offer.Mapped = map[netip.Addr]netip.Addr{own: offered}
	env := s.hookEnv()
	for _, want := range []string{"WANMIG_ADDRESSES=192.0.2.10", "WANMIG_NEW_ADDRESSES=", "WANMIG_VM=web", "WANMIG_ROLE=source"} {
		if !slices.Contains(env, want) {
			t.Errorf("no %q in %q", want, env)
		}
	}
}

// TestHooksEndWithTheAgent ends one that runs, and begins none when it stops.
func TestHooksEndWithTheAgent(t *testing.T) {
	began := filepath.Join(t.TempDir(), "began")
	h, _ := hooked(t, time.Minute, `> "$BEGAN"; sleep 1000`)
	ctx, cancel := context.WithCancel(t.Context())
	var out strings.Builder
	log := slog.New(slog.NewTextHandler(&out, nil))
	e := &Engine{Config: Config{Hooks: h}, ctx: ctx}
	e.runHook(log, BeforeStop, []string{"BEGAN=" + began})
	for {
		if _, err := os.Stat(began); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	e.Wait()
	if got := out.String(); !strings.Contains(got, "it was ended: context canceled") {
		t.Errorf("the one that ran: %q", got)
	}
	out.Reset()
	if err := os.Remove(began); err != nil {
		t.Fatal(err)
	}
	e.runHook(log, BeforeStop, []string{"BEGAN=" + began})
	if _, err := os.Stat(began); !errors.Is(err, os.ErrNotExist) || !strings.Contains(out.String(), "the agent stops") {
		t.Errorf("begun by an agent that stops: %v, %q", err, out.String())
	}
	if err := e.begin(); !errors.Is(err, errStopping) {
		t.Errorf("other work: %v", err)
	}
}
