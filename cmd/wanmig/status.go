package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/migrate"
)

func newStatusCommand(client newClient) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [MOVE]",
		Short: "Show a move: one by its ID, else the running ones, else the last",
		Args:  need("[MOVE]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var moves []migrate.Status
			var err error
			if len(args) == 1 {
				var m migrate.Status
				m, err = client().Move(cmd.Context(), args[0])
				moves = append(moves, m)
			} else {
				moves, err = client().Moves(cmd.Context())
				moves = current(moves)
			}
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, moves)
			}
			redirects, err := client().Redirects(cmd.Context())
			if err != nil {
				return err
			}
			if len(moves) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "No moves yet.")
			}
			for i, m := range moves {
				if i > 0 {
					fmt.Fprintln(cmd.OutOrStdout())
				}
				fmt.Fprint(cmd.OutOrStdout(), describe(m, time.Now()))
				for _, r := range redirects {
					if r.Move == m.Move {
						fmt.Fprintf(cmd.OutOrStdout(), "  %-10s %s\n", "redirect", standing(r))
					}
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object per move, one a line")
	return cmd
}

// current picks the moves that have not ended, else the last.
func current(moves []migrate.Status) []migrate.Status {
	var running []migrate.Status
	for _, m := range moves {
		if !m.Phase.Final() {
			running = append(running, m)
		}
	}
	if len(running) == 0 && len(moves) > 0 {
		return moves[len(moves)-1:]
	}
	return running
}
