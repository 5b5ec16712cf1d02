package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newIDCommand(client newClient) *cobra.Command {
	return &cobra.Command{
		Use:   "id",
		Short: "Print the agent's identity",
		Long: `Print the agent's identity: the fingerprint of its key, which the other site
needs for wanmig site add.`,
		Args: need(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			info, err := client().Info(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), printable(info.ID))
			return nil
		},
	}
}
