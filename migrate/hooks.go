package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/wanmig/wanmig/netredirect"
)

// Hook is a moment of a move at which a program of the operator's is run.
type Hook string

const (
	// BeforeStop is run at the source when the guest is about to be stopped. The
	// stop waits for it; if it fails the move is rolled back.
	BeforeStop Hook = "before_stop"
	// AfterResume is run at both hosts when the guest runs at the destination.
	AfterResume Hook = "after_resume"
	// AfterSettle is run at both hosts when the redirect's tunnel is gone.
	AfterSettle Hook = "after_settle"
)

// Hooks are the programs of an agent's configuration.
type Hooks struct {
	Programs map[Hook]string // absolute paths
	Timeout  time.Duration   // of each
}

// maxHookOutput is how much of a hook's output an error quotes, in bytes.
const maxHookOutput = 2 << 10

// run runs the program of a hook, if there is one, and waits for it. It gets the
// hook's name as its argument and the move in its environment.
func (h Hooks) run(ctx context.Context, hook Hook, env []string) error {
	program := h.Programs[hook]
	if program == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, h.Timeout)
	defer cancel()
	var out head
	cmd := exec.CommandContext(ctx, program, string(hook))
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "WANMIG_HOOK=" + string(hook)}, env...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // with its children
	cmd.WaitDelay = time.Second                                                          // of children that hold its output open
	if err := cmd.Run(); err != nil && !errors.Is(err, exec.ErrWaitDelay) {              // it ended well, and left a child behind
		switch {
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			err = fmt.Errorf("it did not end in %v", h.Timeout)
		case ctx.Err() != nil:
			err = fmt.Errorf("it was ended: %w", context.Cause(ctx))
		}
		return fmt.Errorf("hook %s: %s: %w: %s", hook, program, err, strings.TrimSpace(strings.ToValidUTF8(string(out), "?")))
	}
	return nil
}

// head keeps the beginning of a hook's output.
type head []byte

func (h *head) Write(b []byte) (int, error) {
	*h = append(*h, b[:min(len(b), maxHookOutput-len(*h))]...)
	return len(b), nil
}

// runHook runs a hook that no move waits for, and logs its failure. It ends with
// the agent.
func (e *Engine) runHook(log *slog.Logger, hook Hook, env []string) {
	report := func(err error) {
		if err != nil {
			log.Warn("hook failed: do by hand what it should have done", "hook", hook, "error", err)
		}
	}
	if e.Hooks.Programs[hook] == "" {
		return
	}
	if err := e.begin(); err != nil {
		report(err)
		return
	}
	go func() {
		defer e.work.Done()
		report(e.Hooks.run(e.ctx, hook, env))
	}()
}

// hookEnv describes a move to a hook.
func hookEnv(move, vm, uuid, role, from, to string, addrs []netip.Addr, mapped map[netip.Addr]netip.Addr) []string {
	var old, new []string
	for _, a := range addrs {
		old = append(old, a.String())
		if to, ok := mapped[a]; ok {
			new = append(new, to.String())
		}
	}
	return []string{"WANMIG_MOVE=" + move, "WANMIG_VM=" + vm, "WANMIG_UUID=" + uuid, "WANMIG_ROLE=" + role, "WANMIG_FROM=" + from,
		"WANMIG_TO=" + to, "WANMIG_ADDRESSES=" + strings.Join(old, " "), "WANMIG_NEW_ADDRESSES=" + strings.Join(new, " ")}
}

func (s *source) hookEnv() []string {
	addrs, mapped := s.Redirects.AddressesOf(s.entry.Move) // new ones offered before the move may have been given to another VM
	if len(addrs) == 0 {                                   // it is not redirected
		for _, n := range s.redirect.ask.NICs {
			addrs = append(addrs, n.Addresses...)
		}
	}
	return hookEnv(s.entry.Move, s.dom.Name, s.dom.UUID, "source", s.Site, s.req.To, addrs, mapped)
}

// Settled runs the hook of a redirect whose tunnel is gone.
func (e *Engine) Settled(s netredirect.Status) {
	from, to := s.Peer, e.Site
	if s.Role == netredirect.Source {
		from, to = to, from
	}
	env := hookEnv(s.Move, s.VM, s.UUID, string(s.Role), from, to, s.Addresses, s.Mapped)
	e.runHook(e.Log.With("move", s.Move, "vm", s.VM), AfterSettle, env)
}

// Check checks each hook's program before it is needed.
func (h Hooks) Check() error {
	for hook, program := range h.Programs {
		if program == "" {
			continue
		}
		info, err := os.Stat(program)
		if err != nil {
			return fmt.Errorf("hooks.%s: %w", hook, err)
		}
		if info.IsDir() || info.Mode()&0o111 == 0 {
			return fmt.Errorf("hooks.%s: %s can't be run: chmod +x it", hook, program)
		}
	}
	return nil
}
