package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/agent"
)

func newCopiesCommand(client newClient) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "copies",
		Short: "Show and remove older copies of VMs' disks that this host keeps",
		Long: `Show and remove older copies of VMs' disks that this host keeps. Without a
subcommand they are listed.

What has arrived of a move that did not end is kept for a while, and what
--keep-source leaves is kept until it is removed. The next move of that VM to
this host sends only what differs.`,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return listCopies(cmd, client(), false) },
	}
	cmd.AddCommand(newCopiesList(client), newCopiesRemove(client))
	return cmd
}

func newCopiesList(client newClient) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the older copies at this host",
		Args:  need(),
		RunE:  func(cmd *cobra.Command, _ []string) error { return listCopies(cmd, client(), asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object per copy, one a line")
	return cmd
}

func listCopies(cmd *cobra.Command, client *agent.Client, asJSON bool) error {
	list, err := client.Copies(cmd.Context())
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(cmd, list)
	}
	if len(list) == 0 {
		fmt.Fprintln(cmd.OutOrStdout(), "No copies.")
		return nil
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VM\tSINCE\tUNTIL\tSTORAGE\tSTATE\tPATH")
	for _, c := range list {
		until, state := "removed by hand", "part of it changed since"
		if !c.Kept() {
			until, state = c.Until.Local().Format(time.DateTime), "not whole"
		}
		if c.Whole {
			state = "as the VM left it"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", name(c.VM), c.Since.Local().Format(time.DateTime), until, size(c.Storage), state, printable(c.Path))
	}
	return w.Flush()
}

func newCopiesRemove(client newClient) *cobra.Command {
	return &cobra.Command{
		Use:   "remove VM",
		Short: "Remove the copies of a VM's disks",
		Args:  need("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := client().RemoveCopies(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Removed the copies of %s.\n", name(args[0]))
			return nil
		},
	}
}
