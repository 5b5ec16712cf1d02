package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/migrate"
)

// rateHelp tells what a rate of a move may be.
const rateHelp = `A rate is of bits on the wire: 400mbit, 1.5gbit, or 50MB/s; auto, auto:50mbit-400mbit
or none. With auto the move takes a share that leaves room for others on the
link, and each round of its memory no more than it needs, between the two
rates; when that does not get the guest across, the rest goes at full speed.`

func newLimitCommand(client newClient) *cobra.Command {
	return &cobra.Command{
		Use:   "limit MOVE|VM RATE",
		Short: "Change how much of the link a running move may use",
		Long: `Change how much of the link a running move may use, at its source. Limits of
agent.yaml hold as well.

` + rateHelp,
		Example: `  wanmig limit web 200mbit
  wanmig limit web none`,
		Args: need("MOVE|VM", "RATE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := migrate.ParseLimit(args[1])
			if err != nil {
				return err
			}
			if err := client().LimitMove(cmd.Context(), args[0], l); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Rate of %s from now on: %s.\n", name(args[0]), l)
			return nil
		},
	}
}

// limitFlag is the value of --rate.
type limitFlag migrate.Limit

func (l *limitFlag) Set(s string) error { return (*migrate.Limit)(l).UnmarshalText([]byte(s)) }
func (l *limitFlag) Type() string       { return "RATE|auto|none" }
func (l *limitFlag) String() string     { return "" }

// outage is the value of --max-outage.
type outage time.Duration

func (o *outage) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d < migrate.LeastOutage || d > migrate.MostOutage {
		return fmt.Errorf("want a time from %v to %v, as in 90s or 30m", migrate.LeastOutage, migrate.MostOutage)
	}
	*o = outage(d)
	return nil
}

func (o *outage) Type() string   { return "DURATION" }
func (o *outage) String() string { return "" }

// downtimeGoal is the value of --downtime.
type downtimeGoal time.Duration

func (g *downtimeGoal) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d < migrate.LeastDowntime || d > migrate.MostDowntime {
		return fmt.Errorf("want a time from %v to %v, as in 300ms or 2s", migrate.LeastDowntime, migrate.MostDowntime)
	}
	*g = downtimeGoal(d)
	return nil
}

func (g *downtimeGoal) Type() string   { return "DURATION" }
func (g *downtimeGoal) String() string { return "" }
