package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/migrate"
)

func newRollbackCommand(client newClient) *cobra.Command {
	var fromCopy, yes, asJSON, detach bool
	cmd := &cobra.Command{
		Use:   "rollback MOVE",
		Short: "Take a move that is done back",
		Long: `Have the guest of a move that is done come back to this host, from which it
left: by a live move, which begins from what --keep-source and --keep-memory have
left here, and sends only what has changed. Its disks and networks get the names
that they had.

When the other site does not answer, and its guest is lost, --from-copy starts
the guest from the disks that --keep-source has kept here. What it has done since
it left is not in them. Should the other host come back with its guest, it runs
twice: see to it that it stays off, or comes back without its network.

` + exitCodes,
		Example: `  wanmig rollback mv-abcdefgh
  wanmig rollback mv-abcdefgh --from-copy`,
		Args: need("MOVE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client()
			if fromCopy {
				return startCopy(cmd, c, args[0], yes)
			}
			result, err := takeBack(cmd, c, args[0], detach, asJSON)
			return report(cmd, result, err, asJSON)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&fromCopy, "from-copy", false, "start the guest from the disks that it has left here")
	f.BoolVar(&yes, "yes", false, "do not ask")
	f.BoolVar(&asJSON, "json", false, "print the result as one JSON object")
	f.BoolVar(&detach, "detach", false, "begin the move back, print its ID and leave")
	cmd.MarkFlagsMutuallyExclusive("from-copy", "json")
	cmd.MarkFlagsMutuallyExclusive("from-copy", "detach")
	return cmd
}

// takeBack has the guest of a move moved back, and follows that.
func takeBack(cmd *cobra.Command, c *agent.Client, move string, detach, asJSON bool) (migrate.Result, error) {
	result := migrate.Result{Result: "refused"}
	ctx := cmd.Context()
	back, err := c.RollbackMove(ctx, move)
	if err != nil {
		if refused, ok := errors.AsType[*agent.APIError](err); ok && refused.Status == http.StatusBadGateway {
			if left, copyErr := c.LeftCopy(ctx, move); copyErr == nil {
				err = fmt.Errorf("%w. Its disks are here as it left them %s ago: if the guest there is lost, `wanmig rollback %s --from-copy` starts it from them",
					err, span(time.Since(left.Since)), printable(move))
			}
		}
		return result, err
	}
	result.Move = back.Move
	if detach {
		result.Result = resultDetached
		if !asJSON {
			fmt.Fprintln(cmd.OutOrStdout(), printable(back.Move))
		}
		return result, nil
	}
	m, err := arrives(ctx, c, back.Move)
	if err != nil {
		result.Result = resultUnknown
		return result, &exitError{exitUnknown, err}
	}
	return watch(cmd, c, m, result, asJSON)
}

// arrivalWait is how long a guest that comes back may take to show here: it has
// passed its checks.
const arrivalWait = time.Minute

// arrives waits until the move by which a guest comes back is known here.
func arrives(ctx context.Context, c *agent.Client, move string) (migrate.Status, error) {
	for begun := time.Now(); ; {
		m, err := c.Move(ctx, move)
		if err == nil {
			return m, nil
		}
		if time.Since(begun) > arrivalWait {
			return m, fmt.Errorf("move %s has begun at the other site, and is not seen here: %w", move, err)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return m, ctx.Err()
		}
	}
}

// startCopy starts the guest of a move from what it has left, once the operator
// knows how old that is.
func startCopy(cmd *cobra.Command, c *agent.Client, move string, yes bool) error {
	left, err := c.LeftCopy(cmd.Context(), move)
	if err != nil {
		return err
	}
	m, err := c.Move(cmd.Context(), move)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "The disks of %s are here as it left them at %s, %s ago. What it has done since is lost.\n"+
		"Should %s come back with the guest, it runs twice.\n", name(m.VM), left.Since.Local().Format(time.DateTime), span(time.Since(left.Since)), name(m.Peer))
	if !yes {
		if err := typeName(cmd, m.VM); err != nil {
			return err
		}
	}
	if err := c.StartCopy(cmd.Context(), move); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s runs here, from the copy of %s.\n", name(m.VM), left.Since.Local().Format(time.DateTime))
	return nil
}
