package main

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/migrate"
)

func newListCommand(client newClient) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the moves that the agent knows",
		Long:  "List the moves that the agent knows, oldest first.",
		Args:  need(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			moves, err := client().Moves(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, moves)
			}
			if len(moves) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "No moves yet.")
				return nil
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "MOVE\tVM\tSITE\tSTATE\tSTARTED\tTIME")
			for _, m := range moves {
				fmt.Fprintf(w, "%s\t%s\t%s %s\t%s\t%s\t%s\n", printable(m.Move), name(m.VM), toOrFrom(m), name(m.Peer),
					state(m), m.Started.Local().Format(time.DateTime), span(elapsed(m, time.Now())))
			}
			if err := w.Flush(); err != nil {
				return err
			}
			redirects, err := client().Redirects(cmd.Context())
			if err != nil {
				return err
			}
			if len(redirects) > 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "%s here; `wanmig redirect` shows who still uses them.\n", count(len(redirects), "redirect"))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object per move, one a line")
	return cmd
}

// printJSON prints an object a line, so that one and many read alike.
func printJSON[T any](cmd *cobra.Command, objects []T) error {
	enc := json.NewEncoder(cmd.OutOrStdout())
	for _, o := range objects {
		if err := enc.Encode(o); err != nil {
			return &exitError{exitFailed, err}
		}
	}
	return nil
}

func toOrFrom(m migrate.Status) string {
	if m.Role == "destination" {
		return "from"
	}
	return "to"
}
