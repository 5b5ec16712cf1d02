package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab"
)

func execCommand(dir *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec SITE -- COMMAND [ARGUMENT]...",
		Short: "Run a command inside a site, and exit with its status",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 && args[1] == "--" {
				args = slices.Delete(args, 1, 2)
			}
			if len(args) < 2 {
				return errors.New("no command: want wanlab exec SITE -- COMMAND")
			}
			l, err := lab.Open(*dir)
			if err != nil {
				return err
			}
			inside, err := l.Command(cmd.Context(), args[0], args[1], args[2:]...)
			if err != nil {
				return err
			}
			if inside.Err != nil {
				return inside.Err
			}
			// Becoming the command leaves terminal, signals and status to it.
			err = unix.Exec(inside.Path, inside.Args, inside.Environ())
			return fmt.Errorf("run %s: %w", inside.Path, err)
		},
	}
	// Flags after the command are the command's, also without --.
	cmd.Flags().SetInterspersed(false)
	return cmd
}
