package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/migrate"
)

// Results that only this command reports; the agent's are in migrate.Result.
const (
	resultDetached = "detached" // the move goes on unwatched
	resultUnknown  = "unknown"  // the agent stopped answering
)

func newMoveCommand(client newClient) *cobra.Command {
	req := migrate.Request{Networks: map[string]string{}, Storage: map[string]string{}, VMAddresses: map[string][]netip.Addr{}}
	var asJSON, detach bool
	cmd := &cobra.Command{
		Use:   "move VM --to SITE",
		Short: "Move a running VM to another site",
		Long: `Move a running VM, its memory and its disks, to another site.

The agent does the work: closing the terminal does not stop it. Ctrl-C on a
terminal asks whether to cancel, to detach or to go on; elsewhere SIGINT and
SIGTERM detach. Progress goes to stderr, the summary to stdout.

While the link is gone the move waits for it, and the guest runs on; only while it
is stopped for the handoff a destination that does not answer for 10 s ends the
move, and the guest goes on here.

The guest is stopped as soon as the predicted downtime fits --downtime: what is
left of its memory and disks at the rate that the link takes it, half a round
trip, and what libvirt took in earlier moves. A guest that dirties its memory
faster than the link takes it does not get there. When what is left no longer
falls, --on-stall tells what to do:

  throttle  QEMU takes more and more CPU time from the guest, up to 99 %; if
            that is not enough, the guest is stopped for up to 5 times --downtime
  stop      the guest is stopped near a minimum of what is left, however long
            its rest takes
  wait      the move goes on until it is cancelled or the guest does less
  fail      the move is rolled back

` + rateHelp + `

A move that is rolled back because the link, or a daemon or QEMU on the way, has
died is tried again by itself when the destination answers again, up to --retries
times: each attempt is a move of its own, and begins from what has arrived.

With --json the last line of stdout is one object, whatever happened. Its
result is done, checked (--dry-run), refused, rolled-back, in-doubt, abandoned,
split, detached or unknown; of a move that was tried again, the last one's.

` + exitCodes,
		Example: `  wanmig move web --to remote-dc --dry-run
  wanmig move web --to remote-dc
  wanmig move web --to remote-dc --network br0=br-public --storage vdb=/srv/images
  wanmig move web --to remote-dc --rate 400mbit --priority low
  wanmig move web --to remote-dc --downtime 1s --on-stall fail
  wanmig move web --to remote-dc --addresses new --dns-name www.example.org --lower-ttl`,
		Args: need("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if req.To == "" {
				return errors.New("--to SITE is missing: `wanmig site list` shows the sites")
			}
			if err := checkConnectionFlags(cmd, req); err != nil {
				return err
			}
			req.VM = args[0]
			result, err := move(cmd, client(), req, detach, asJSON)
			return report(cmd, result, err, asJSON)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.To, "to", "", "the `SITE` to move to")
	f.BoolVar(&asJSON, "json", false, "print the result as one JSON object")
	f.BoolVar(&detach, "detach", false, "begin the move, print its ID and leave")
	f.BoolVar(&req.DryRun, "dry-run", false, "only check whether the VM can be moved")
	f.Var(mapping(req.Networks), "network", "attach what is on network or bridge SRC here to DST there; repeatable")
	f.Var(mapping(req.Storage), "storage", "place disk, file or folder SRC at file or folder DST there; repeatable")
	f.BoolVar(&req.KeepSource, "keep-source", false, "keep the disks at the source")
	f.BoolVar(&req.KeepMemory, "keep-memory", false, "keep what the guest has in its memory at the source as well, for a move back")
	f.BoolVar(&req.Verify, "verify", false, "compare the disks of both sites before the guest runs at the destination")
	f.BoolVar(&req.Fresh, "fresh", false, "make the disks anew, also where the destination has an older copy of them")
	f.BoolVar(&req.Paused, "paused", false, "leave the guest paused at the destination")
	f.BoolVar(&req.CopyCDROM, "copy-cdrom", false, "carry read-only CD-ROMs along instead of ejecting them")
	f.Var((*limitFlag)(&req.Rate), "rate", "use no more of the link: bits per second as in 400mbit; auto leaves room for others")
	f.Var(choice[migrate.Priority]{&req.Priority, migrate.Priorities}, "priority", "among moves that share the link; normal if not said")
	f.Var((*downtimeGoal)(&req.Downtime), "downtime", "stop the VM when its downtime is predicted to be no longer (300ms if not said)")
	f.Var(choice[migrate.OnStall]{&req.OnStall, migrate.OnStalls}, "on-stall", "what to do when the VM dirties memory faster than the link takes it; throttle if not said")
	f.Var((*outage)(&req.MaxOutage), "max-outage", "how long the link may be gone before the move is rolled back (10m if not said)")
	f.IntVar(&req.Retries, "retries", migrate.DefaultRetries, "how often to try again by itself when something on the way died that can come back; the guest runs on")
	connectionFlags(cmd, &req)
	cmd.MarkFlagsMutuallyExclusive("detach", "dry-run")
	return cmd
}

// move begins a move, follows it and tells how it ended, all but its error.
func move(cmd *cobra.Command, client *agent.Client, req migrate.Request, detach, asJSON bool) (migrate.Result, error) {
	result := migrate.Result{VM: req.VM, To: req.To}
	ctx := cmd.Context()
	m, err := client.StartMove(ctx, req)
	if err != nil {
		result.Result = "refused"
		if !neverBegan(err) {
			result.Result = resultUnknown
			err = &exitError{exitUnknown, fmt.Errorf("%w (`wanmig list` shows whether the move began)", err)}
		}
		return result, err
	}
	result.Move = m.Move
	if detach {
		result.Result = resultDetached
		if !asJSON {
			fmt.Fprintln(cmd.OutOrStdout(), printable(m.Move))
		}
		fmt.Fprintln(cmd.ErrOrStderr(), detached(m.Move))
		return result, nil
	}

	return watch(cmd, client, m, result, asJSON)
}

// report prints the result of a move as an object, if that is asked for, and returns
// the command's error.
func report(cmd *cobra.Command, result migrate.Result, err error, asJSON bool) error {
	if !asJSON {
		return err
	}
	if err != nil && result.Error == "" {
		result.Error = err.Error()
	}
	if err := json.NewEncoder(cmd.OutOrStdout()).Encode(result); err != nil {
		return &exitError{exitFailed, err}
	}
	return err
}

// watch follows a move and tells how it ended, all but its error.
func watch(cmd *cobra.Command, client *agent.Client, m migrate.Status, result migrate.Result, asJSON bool) (migrate.Result, error) {
	f := newFollower(cmd, client, asJSON)
	defer f.stop()
	m, err := f.follow(cmd.Context(), m)
	switch {
	case errors.Is(err, errDetached):
		result.Result = resultDetached
		fmt.Fprintln(cmd.ErrOrStderr(), detached(m.Move))
		return result, &exitError{exitDetached, nil}
	case err != nil:
		result.Result = resultUnknown
		return result, &exitError{exitUnknown, fmt.Errorf("move %s: %w: `wanmig status %[1]s` tells how it stands once the agent answers", m.Move, err)}
	}
	result = *m.Result
	if !asJSON {
		fmt.Fprint(cmd.OutOrStdout(), summary(result))
	}
	return result, ending(result)
}

// neverBegan reports whether an error of StartMove says that nothing happened.
func neverBegan(err error) bool {
	_, refused := errors.AsType[*agent.APIError](err)
	return refused || errors.Is(err, agent.ErrNoAgent) || errors.Is(err, fs.ErrPermission)
}

// ending turns a move's result into the command's.
func ending(r migrate.Result) error {
	message := r.Error
	if message == "" {
		message = "the agent gave no reason"
	}
	problem := fmt.Errorf("move %s of %s: %s: %s", r.Move, name(r.VM), r.Result, message)
	switch r.Result {
	case "done":
		return nil
	case "checked", "refused":
		if r.Result == "checked" && !blocked(r) {
			return nil
		}
		fatal := 0
		for _, f := range r.Findings {
			if f.Fatal {
				fatal++
			}
		}
		if r.Error == "" && fatal > 0 {
			return fmt.Errorf("%s can't be moved to %s: %s", name(r.VM), name(r.To), count(fatal, "problem"))
		}
		return errors.New(message)
	case "in-doubt":
		return &exitError{exitUnknown, problem}
	}
	return &exitError{exitFailed, problem}
}

func detached(move string) string {
	return fmt.Sprintf("Detached: move %s goes on. `wanmig status %[1]s` shows it, `wanmig cancel %[1]s` rolls it back.", printable(move))
}

func newFollower(cmd *cobra.Command, client *agent.Client, asJSON bool) *follower {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	f := &follower{client: client, signals: signals, patience: time.Minute}
	f.stop = func() { signal.Stop(signals) }
	f.view = &lines{w: cmd.ErrOrStderr(), now: time.Now}
	if canDraw(os.Stderr) && !asJSON {
		f.view = &bars{out: os.Stderr, style: styleOf(os.Getenv), now: time.Now}
	}
	if term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd())) {
		f.ask = func(ctx context.Context) answer { return ask(ctx, os.Stderr) }
	}
	return f
}
