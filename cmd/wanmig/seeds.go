package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/blocksync/seed"
)

func newSeedsCommand(client newClient) *cobra.Command {
	var asJSON, scan bool
	cmd := &cobra.Command{
		Use:   "seeds",
		Short: "List the images whose content guests that come here need not be sent",
		Long: `List the images whose content guests that come here need not be sent: those of
"seeds" in the agent's configuration. They are indexed in the background, one
after the other. PAGES are the pages of 4 KiB that can be found. One that is
written is indexed again once it is left alone, or after a day; until
then what has not changed is found.`,
		Args: need(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if scan {
				if err := client().ScanSeeds(cmd.Context()); err != nil {
					return err
				}
			}
			list, err := client().Seeds(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, list)
			}
			if len(list) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), `No seeds; "seeds" in the agent's configuration lists folders of images.`)
				return nil
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "IMAGE\tSTATE\tFORMAT\tSIZE\tPAGES\tINDEXED")
			for _, s := range list {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", name(s.Path), seedState(s), orDash(printable(s.Format)), size(s.Size), s.Pages, indexedAt(s))
			}
			if err := w.Flush(); err != nil {
				return err
			}
			for _, s := range list {
				if s.Problem != "" {
					fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", name(s.Path), oneLine(s.Problem))
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object per image, one a line")
	cmd.Flags().BoolVar(&scan, "scan", false, "look for images that are new first, not only every few minutes")
	return cmd
}

func seedState(s seed.Status) string {
	switch {
	case s.State == seed.Indexing:
		return fmt.Sprintf("indexing %d %%", s.Percent)
	case s.State == seed.Ready && s.Changed:
		return "ready, changed since"
	}
	return printable(string(s.State))
}

func indexedAt(s seed.Status) string {
	if s.Indexed == nil {
		return "-"
	}
	return s.Indexed.Local().Format(time.DateTime)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
