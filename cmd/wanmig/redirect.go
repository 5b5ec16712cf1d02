package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/netredirect"
)

func newRedirectCommand(client newClient) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "redirect",
		Short: "Show and end the tunnels that connections of moved VMs take",
		Long: `Show and end the tunnels that connections of moved VMs take. Without a
subcommand they are listed.

A redirect stands at both hosts of a move, and each command works at either. It
is named by the move's ID or by the VM.`,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return listRedirects(cmd, client(), false) },
	}
	cmd.AddCommand(newRedirectList(client), newRedirectShow(client), newRedirectDrain(client), newRedirectCut(client))
	return cmd
}

func newRedirectList(client newClient) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the redirects that stand at this host",
		Long:  "List the redirects that stand at this host, oldest first.",
		Args:  need(),
		RunE:  func(cmd *cobra.Command, _ []string) error { return listRedirects(cmd, client(), asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object per redirect, one a line")
	return cmd
}

func listRedirects(cmd *cobra.Command, client *agent.Client, asJSON bool) error {
	list, err := client.Redirects(cmd.Context())
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(cmd, list)
	}
	if len(list) == 0 {
		fmt.Fprintln(cmd.OutOrStdout(), "No redirects.")
		return nil
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "MOVE\tVM\tSITE\tSTATE\tTUNNEL\tUSED BY\tUNTIL\tPROBLEMS")
	for _, r := range list {
		tunnel, used, until := "-", "-", "-"
		if tunnelled(r) {
			tunnel, used = printable(string(r.Kind)), fmt.Sprint(len(r.Flows))
		}
		if r.Deadline != nil {
			until = r.Deadline.Local().Format(time.DateTime)
		}
		fmt.Fprintf(w, "%s\t%s\t%s %s\t%s\t%s\t%s\t%s\t%d\n", printable(r.Move), name(r.VM), direction(r), name(r.Peer),
			printable(string(r.State)), tunnel, used, until, len(r.Problems))
	}
	return w.Flush()
}

func newRedirectShow(client newClient) *cobra.Command {
	var asJSON, steps bool
	cmd := &cobra.Command{
		Use:   "show MOVE|VM",
		Short: "Show a redirect: who uses it, how long it stays and why",
		Long: `Show a redirect: who uses it, how long it stays and why, what is wrong with it.
With --steps also what it has changed of this host's network, as one would
type it, and how to undo that by hand.`,
		Args: need("MOVE|VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := client().Redirect(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, []netredirect.Status{r})
			}
			fmt.Fprint(cmd.OutOrStdout(), describeRedirect(r, time.Now()))
			if steps {
				fmt.Fprint(cmd.OutOrStdout(), listSteps("standing here", r.Steps), listSteps("undone by hand with", r.Undo))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	cmd.Flags().BoolVar(&steps, "steps", false, "show what it has changed, and how to undo it")
	return cmd
}

func newRedirectDrain(client newClient) *cobra.Command {
	return &cobra.Command{
		Use:   "drain MOVE|VM",
		Short: "Let a tunnel go as soon as no connection uses it",
		Long: `Let a tunnel go as soon as no connection uses it, without waiting for DNS or
routes: you have seen to it that new connections find the VM, or none is to.`,
		Args: need("MOVE|VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := client().DrainRedirect(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "The tunnel of %s goes when nothing uses it; `wanmig redirect show %[1]s` shows what does.\n", name(args[0]))
			return nil
		},
	}
}

func newRedirectCut(client newClient) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "cut MOVE|VM",
		Short: "Remove a tunnel now, at both ends",
		Long: `Remove a tunnel now, at both ends. Connections that use it break: while there are
any it asks first on a terminal, and elsewhere needs --force. What the
destination does for a VM with foreign addresses stays until the VM leaves.`,
		Args: need("MOVE|VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client()
			err := c.CutRedirect(cmd.Context(), args[0], force)
			refused, _ := errors.AsType[*agent.APIError](err)
			if refused != nil && refused.Status == http.StatusConflict && !force && onTerminal() {
				r, showErr := c.Redirect(cmd.Context(), args[0])
				if showErr != nil || len(r.Flows) == 0 {
					return err
				}
				if !confirmCut(cmd.InOrStdin(), cmd.ErrOrStderr(), r) {
					return errors.New("nothing was cut")
				}
				err = c.CutRedirect(cmd.Context(), args[0], true)
				refused, _ = errors.AsType[*agent.APIError](err)
			}
			if refused != nil && refused.Status == http.StatusBadGateway {
				return &exitError{exitFailed, err}
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "The tunnel of %s is removed.\n", name(args[0]))
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also while connections use it")
	return cmd
}

// onTerminal reports whether there is somebody to ask.
func onTerminal() bool {
	return term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd()))
}

// confirmCut asks whether connections may break. Only a yes is one.
func confirmCut(in io.Reader, out io.Writer, r netredirect.Status) bool {
	const shown = 10
	for _, f := range r.Flows[:min(len(r.Flows), shown)] {
		fmt.Fprintf(out, "  %s\n", flow(f))
	}
	if more := len(r.Flows) - shown; more > 0 {
		fmt.Fprintf(out, "  and %d more\n", more)
	}
	fmt.Fprintf(out, "Cut the tunnel? %s of %s will break. [y/n] ", count(len(r.Flows), "connection"), name(r.VM))
	line, _ := bufio.NewReader(io.LimitReader(in, 4096)).ReadString('\n') // an end is a no
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return true
	}
	return false
}
