package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/rate"
)

func newSiteCommand(client newClient) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "site",
		Short: "Manage the sites that this host's agent knows",
		Args:  noSuchCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newSiteAdd(client), newSiteList(client), newSiteRemove(client), newSiteCheck(client))
	return cmd
}

func newSiteAdd(client newClient) *cobra.Command {
	var id, transport string
	cmd := &cobra.Command{
		Use:   "add NAME ADDRESS --id ID",
		Short: "Make another site's agent known, by its address and identity",
		Long: `Make another site's agent known, by its address (host:port, UDP and TCP) and its
identity (wanmig id, asked there). The other site has to add this one as well.`,
		Args: need("NAME", "ADDRESS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if id == "" {
				return errors.New("--id ID is missing: `wanmig id` prints it at the other site")
			}
			if err := client().PutSite(cmd.Context(), agent.Site{Name: args[0], Address: args[1], ID: id, Transport: transport}); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Added %s; `wanmig site check %s` tries it.\n", name(args[0]), name(args[0]))
			return nil
		},
	}
	cmd.Flags().StringVar(&id, "id", "", "the other agent's identity, an `ID`")
	cmd.Flags().Var(choice[string]{&transport, []string{"auto", "quic", "tcp"}}, "transport", "what moves run over; auto takes what works and is faster")
	return cmd
}

func newSiteList(client newClient) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the known sites",
		Args:  need(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			sites, err := client().Sites(cmd.Context())
			if err != nil {
				return err
			}
			if len(sites) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "No sites yet; `wanmig site add` adds one.")
				return nil
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tADDRESS\tTRANSPORT\tID")
			for _, s := range sites {
				transport := s.Transport
				if transport == "" {
					transport = "auto"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", name(s.Name), printable(s.Address), printable(transport), printable(s.ID))
			}
			return w.Flush()
		},
	}
}

func newSiteRemove(client newClient) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "Forget a site",
		Args:  need("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := client().DeleteSite(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Removed %s.\n", name(args[0]))
			return nil
		},
	}
}

func newSiteCheck(client newClient) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check NAME",
		Short: "Try a site: reachable, identity, versions, round trip, rates, clock",
		Long: `Try a site: reachable, identity, versions, round trip, clock, and what QUIC and
TCP carry there, each for a second, within the rates of agent.yaml. Exits with 1
when the site can't be used as it is.`,
		Args: need("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			check, err := client().CheckSite(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(cmd, []agent.SiteCheck{check}); err != nil {
					return err
				}
			} else {
				writeSiteCheck(cmd.OutOrStdout(), check)
			}
			fatal := 0
			for _, f := range check.Findings {
				if f.Fatal {
					fatal++
				}
			}
			switch {
			case fatal > 0:
				return &exitError{exitFailed, fmt.Errorf("site %s can't be used: %s", name(args[0]), count(fatal, "problem"))}
			case !check.Reachable:
				return &exitError{exitFailed, fmt.Errorf("site %s can't be used: it is not reachable", name(args[0]))}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

func writeSiteCheck(w io.Writer, c agent.SiteCheck) {
	fmt.Fprintf(w, "%s at %s\n", name(c.Site), printable(c.Address))
	row := func(label, value string) {
		if value != "" {
			fmt.Fprintf(w, "  %-11s %s\n", label, printable(value))
		}
	}
	row("identity", c.ID)
	if c.Reachable {
		row("reachable", "yes")
		row("its name", c.PeerSite)
		row("wanmig", c.Version)
		row("libvirt", c.Libvirt)
		row("QEMU", c.QEMU)
		row("round trip", millis(c.RTTMS))
		for _, t := range c.Carriers {
			if t.Problem != "" {
				row(t.Transport, "does not work")
			} else {
				row(t.Transport, fmt.Sprintf("%s to there, RTT %s", round(rate.Rate(8*t.Rate)), millis(t.RTTMS)))
			}
		}
		switch {
		case c.ClockOffsetMS > 0:
			row("clock", millis(c.ClockOffsetMS)+" ahead of ours")
		case c.ClockOffsetMS < 0:
			row("clock", millis(-c.ClockOffsetMS)+" behind ours")
		default:
			row("clock", "as ours")
		}
	} else {
		row("reachable", "no")
	}
	io.WriteString(w, findings(c.Findings))
}
