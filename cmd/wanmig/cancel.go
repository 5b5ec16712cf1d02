package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newCancelCommand(client newClient) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel MOVE",
		Short: "Roll a running move back",
		Long: `Ask the agent to roll a running move back: the guest stays at the source and
nothing is left at the destination. The command does not wait for that; wanmig
status MOVE shows it. A move that has handed the guest over can't be cancelled.`,
		Args: need("MOVE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := client().CancelMove(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Move %s is being rolled back; `wanmig status %s` shows how it ends.\n", printable(args[0]), printable(args[0]))
			return nil
		},
	}
}
