package main

import (
	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/lab"
)

func downCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove a lab with its guests and all its files",
		Long: `down kills everything that runs in the lab, guests too, and removes its network
namespaces and all files in its directory. It also removes what a crash left
behind. Where there is no lab it does nothing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return lab.Down(cmd.Context(), *dir) },
	}
}
