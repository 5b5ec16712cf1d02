package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/lab"
)

func statusCommand(dir *string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what runs in a lab",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := lab.Open(*dir)
			if err != nil {
				return err
			}
			status := l.Status(cmd.Context())
			if asJSON {
				return printJSON(cmd.OutOrStdout(), status)
			}
			printStatus(cmd.OutOrStdout(), status)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func printStatus(w io.Writer, status lab.Status) {
	if status.Supervisor == 0 {
		fmt.Fprintf(w, "lab in %s does not run: remove it with wanlab down\n", status.Dir)
		return
	}
	fmt.Fprintf(w, "lab in %s runs, supervisor is process %d\n", status.Dir, status.Supervisor)
	if status.Link != nil {
		fmt.Fprintln(w, "WAN:", describeLink(status.Link.Settings))
		printCounters(w, *status.Link)
	}
	for _, site := range status.Sites {
		fmt.Fprintf(w, "%s:\n", site.Name)
		for _, name := range []string{lab.Libvirtd, lab.Agent, lab.Bird, lab.Named} {
			if d, ok := site.Daemons[name]; ok {
				fmt.Fprintf(w, "  %-10s%s\n", name, describeDaemon(d))
			}
		}
		for _, g := range site.Guests {
			fmt.Fprintf(w, "  %-10s%s, %s\n", "guest", g.Name, g.State)
		}
	}
	for _, problem := range status.Problems {
		fmt.Fprintln(w, "problem:", problem)
	}
}

func describeDaemon(d lab.DaemonStatus) string {
	switch {
	case d.Running:
		return fmt.Sprintf("runs, process %d in the site", d.Pid)
	case d.Ended != "":
		return "ended: " + d.Ended
	}
	return "not started"
}
