package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wanmig/wanmig/migrate"
)

func newRecoverCommand(client newClient) *cobra.Command {
	var runHere, abandonHere, yes bool
	cmd := &cobra.Command{
		Use:   "recover MOVE {--run-here | --abandon-here}",
		Short: "Decide a move that is in doubt",
		Long: `Decide where the guest of a move goes on that is in doubt: its two hosts can't
tell each other, or the destination died in the moment in which it let the guest
run. wanmig never guesses then; wanmig status says what each answer risks.

Say it at the host that it is about: --run-here where the guest is to run,
--abandon-here where it is not. A guest that is made to run at both sites runs
twice, and its disks part for good: be sure of the other side first.

--run-here is also good when a move has ended here, and the guest does not run
because its host or the agent went down meanwhile.`,
		Example: `  wanmig status
  wanmig recover mv-abcdefgh --run-here`,
		Args: need("MOVE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			move, word := args[0], migrate.WordRunHere
			if abandonHere {
				word = migrate.WordAbandonHere
			}
			s, err := client().Move(cmd.Context(), move)
			if err != nil {
				return err
			}
			if !yes {
				if err := confirm(cmd, word, s); err != nil {
					return err
				}
			}
			if err := client().RecoverMove(cmd.Context(), move, word); err != nil {
				return err
			}
			does := "runs here"
			if abandonHere {
				does = "is given up here"
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s %s; `wanmig status %s` shows what comes of the move.\n", name(s.VM), does, printable(move))
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&runHere, migrate.WordRunHere, false, "the guest runs at this host, and nowhere else")
	f.BoolVar(&abandonHere, migrate.WordAbandonHere, false, "the guest does not run at this host: what is left of it here is ended")
	f.BoolVar(&yes, "yes", false, "do not ask")
	cmd.MarkFlagsMutuallyExclusive(migrate.WordRunHere, migrate.WordAbandonHere)
	cmd.MarkFlagsOneRequired(migrate.WordRunHere, migrate.WordAbandonHere)
	return cmd
}

// confirm tells what a word does, and has the operator say the guest's name.
func confirm(cmd *cobra.Command, word string, s migrate.Status) error {
	if s.Result != nil {
		for _, w := range s.Result.Ways {
			if strings.HasSuffix(w.Command, word) {
				fmt.Fprintf(cmd.ErrOrStderr(), "--%s %s.\n", word, printable(w.Does))
			}
		}
	}
	return typeName(cmd, s.VM)
}

// typeName has the operator type a guest's name, to show that it is meant.
func typeName(cmd *cobra.Command, vm string) error {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return errors.New("nobody is there to be asked: --yes says that you are sure")
	}
	fmt.Fprint(cmd.ErrOrStderr(), "Type the guest's name to go on: ")
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		return fmt.Errorf("not confirmed: %w", err)
	}
	if strings.TrimSpace(line) != vm {
		return fmt.Errorf("not confirmed: the guest is %s", name(vm))
	}
	return nil
}
