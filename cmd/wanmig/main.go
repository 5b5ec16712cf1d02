package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/wanmig/wanmig/agent"
)

// Exit codes, as the help of wanmig states them.
const (
	exitDone     = 0
	exitFailed   = 1
	exitRefused  = 2
	exitUnknown  = 3
	exitDetached = 130
)

const exitCodes = `Exit codes:
  0    done
  1    the move failed and the guest runs at the source; a check found a problem;
       a tunnel was cut at one end only
  2    refused before anything was touched: wrong usage, a failed check, no agent
  3    the move's outcome is not known: in doubt, or the agent stopped answering
  130  detached by Ctrl-C or a signal: the move goes on`

// exitError carries the exit code of an error; other errors exit with
// exitRefused.
type exitError struct {
	code int
	err  error // nil: everything has been said
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return exitDone
	}
	if message := err.Error(); message != "" {
		fmt.Fprintf(stderr, "wanmig: %s\n", oneLine(message))
	}
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.code
	}
	return exitRefused
}

func newRoot() *cobra.Command {
	socket := os.Getenv("WANMIG_AGENT")
	if socket == "" {
		socket = agent.DefaultAPI
	}
	root := &cobra.Command{
		Use:   "wanmig",
		Short: "Move running virtual machines between sites",
		Long: `wanmig moves a running libvirt/QEMU guest, its memory and its disks, from one
site to another over a WAN.

The agent of this host does the work (see wanmig agent); the other commands ask
it over a unix socket.

` + exitCodes,
		Args:          noSuchCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	client := func() *agent.Client { return agent.NewClient(socket) }
	root.PersistentFlags().StringVar(&socket, "agent", socket, "the agent's `SOCKET`; also from $WANMIG_AGENT")
	root.SetFlagErrorFunc(explainFlag)
	root.AddCommand(
		newAgentCommand(),
		newIDCommand(client),
		newSiteCommand(client),
		newMoveCommand(client),
		newStatusCommand(client),
		newListCommand(client),
		newLimitCommand(client),
		newCancelCommand(client),
		newRecoverCommand(client),
		newRollbackCommand(client),
		newRedirectCommand(client),
		newCopiesCommand(client),
		newSeedsCommand(client),
		newVersionCommand(),
	)
	return root
}

// noSuchCommand refuses arguments of a command that only has subcommands.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	message := fmt.Sprintf("no command %q", cmd.CommandPath()+" "+args[0])
	if near := nearest(cmd, args[0]); near != "" {
		return fmt.Errorf("%s (did you mean %q?)", message, cmd.CommandPath()+" "+near)
	}
	return fmt.Errorf("%s (see %s --help)", message, cmd.CommandPath())
}

// explainFlag adds the nearest flag to the error about one that doesn't exist.
func explainFlag(cmd *cobra.Command, err error) error {
	unknown, ok := errors.AsType[*pflag.NotExistError](err)
	if !ok {
		return err
	}
	// As a command's children the flags are measured as commands are.
	flags := &cobra.Command{}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		flags.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
	})
	if near := nearest(flags, unknown.GetSpecifiedName()); near != "" {
		return fmt.Errorf("%w (did you mean --%s?)", err, near)
	}
	return fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath())
}

// nearest returns the subcommand that was likely meant, if any: rather one
// that was begun than one that is merely alike.
func nearest(cmd *cobra.Command, typed string) string {
	cmd.SuggestionsMinimumDistance = 2
	near := cmd.SuggestionsFor(typed)
	for _, s := range near {
		if strings.HasPrefix(s, typed) {
			return s
		}
	}
	if len(near) > 0 {
		return near[0]
	}
	return ""
}

// need checks the number of arguments and names what is missing or too much. A
// name in brackets may be left out.
func need(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) && !strings.HasPrefix(names[len(args)], "[") {
			return fmt.Errorf("%s is missing: %s", names[len(args)], cmd.UseLine())
		}
		if len(args) > len(names) {
			return fmt.Errorf("one argument too many, %q: %s (a name with spaces needs quotes)", args[len(names)], cmd.UseLine())
		}
		return nil
	}
}

// newClient makes a client of the agent that the flags name.
type newClient func() *agent.Client
