package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/lab"
)

// linkFlags are the flags that describe a link.
type linkFlags struct {
	rate, rtt, loss, queue string
	burst                  float64
	seed                   uint64
	reorder, duplicate     string
	mtu                    int
	noICMP                 bool
	block, nat             []string
}

func (f *linkFlags) add(cmd *cobra.Command) {
	d := lab.DefaultLink()
	cmd.Flags().StringVar(&f.rate, "rate", lab.FormatRate(d.Rate), "rate of each direction, such as 100mbit or 1gbit, or unlimited")
	cmd.Flags().StringVar(&f.rtt, "rtt", d.RTT.String(), "round-trip time, half of it in each direction")
	cmd.Flags().StringVar(&f.loss, "loss", lab.FormatLoss(d.Loss), "share of the packets lost in each direction, such as 0.1%")
	cmd.Flags().Float64Var(&f.burst, "burst", 0, "mean number of packets lost in a row (0: each by itself)")
	cmd.Flags().StringVar(&f.queue, "queue", "", "what waits before packets are dropped, such as 256KiB (default: rate x rtt, at least 64KiB)")
	cmd.Flags().StringVar(&f.reorder, "reorder", "0%", "share of the packets that others overtake, by up to 5ms")
	cmd.Flags().StringVar(&f.duplicate, "duplicate", "0%", "share of the packets that arrive twice")
	cmd.Flags().IntVar(&f.mtu, "mtu", 0, "largest packet in bytes of IP (0: 1500)")
	cmd.Flags().BoolVar(&f.noICMP, "no-icmp", false, "let larger packets vanish without a word, as a black hole")
	cmd.Flags().StringSliceVar(&f.block, "block", nil, "drop what is of these protocols: tcp, udp, or none")
	cmd.Flags().StringSliceVar(&f.nat, "nat", nil, "put a NAT before these data centres, or none: their flows get other ports, what others begin passes")
}

// change holds what was given on the command line, and nothing else.
func (f *linkFlags) change(cmd *cobra.Command) (lab.LinkChange, error) {
	var c lab.LinkChange
	given := cmd.Flags().Changed
	if given("rate") {
		rate, err := lab.ParseRate(f.rate)
		if err != nil {
			return c, err
		}
		c.Rate = &rate
	}
	if given("rtt") {
		rtt, err := lab.ParseRTT(f.rtt)
		if err != nil {
			return c, err
		}
		c.RTT = &rtt
	}
	if given("loss") {
		loss, err := lab.ParseLoss(f.loss)
		if err != nil {
			return c, err
		}
		c.Loss = &loss
	}
	if given("burst") {
		c.Burst = &f.burst
	}
	if given("queue") {
		queue, err := lab.ParseSize(f.queue)
		if err != nil {
			return c, err
		}
		c.Queue = &queue
	}
	if given("reorder") {
		share, err := lab.ParseLoss(f.reorder)
		if err != nil {
			return c, fmt.Errorf("--reorder: %w", err)
		}
		c.Reorder = &share
	}
	if given("duplicate") {
		share, err := lab.ParseLoss(f.duplicate)
		if err != nil {
			return c, fmt.Errorf("--duplicate: %w", err)
		}
		c.Duplicate = &share
	}
	if given("mtu") {
		c.MTU = &f.mtu
	}
	if given("no-icmp") {
		c.NoICMP = &f.noICMP
	}
	if given("block") {
		c.Block = names(f.block)
	}
	if given("nat") {
		c.NAT = names(f.nat)
	}
	return c, nil
}

// names reads "none" as no name at all.
func names(list []string) *[]string {
	if slices.Equal(list, []string{"none"}) {
		list = nil
	}
	return &list
}

func linkCommand(dir *string) *cobra.Command {
	var link linkFlags
	var cut, restore, counters, reset, asJSON bool
	var from, rebind, readdress string
	cmd := &cobra.Command{
		Use:   "link",
		Short: "Change or show the WAN while it runs",
		Long: `link changes what is given, and leaves the rest of the WAN as it is. Without
flags it shows the WAN.

--nat puts a NAT before a data centre, best before its flows begin; --rebind then
has them seen from other ports, as if the NAT had been restarted. --readdress
gives a data centre other addresses, which its agent must not be bound to:
--nat, --rebind and --readdress show what sessions survive.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			change, err := link.change(cmd)
			if err != nil {
				return err
			}
			if from != "" && !cut && !restore {
				return errors.New("--from says whose packets --cut or --restore means: give one of them")
			}
			l, err := lab.Open(*dir)
			if err != nil {
				return err
			}
			if cut || restore {
				state, err := l.LinkState(cmd.Context())
				if err != nil {
					return err
				}
				sites := cutFrom(state.Settings.Cut, l.DataCentres(), from, cut)
				change.Cut = &sites
			}
			if change != (lab.LinkChange{}) {
				if err := l.ChangeLink(cmd.Context(), change); err != nil {
					return err
				}
			}
			if rebind != "" {
				if err := l.Rebind(cmd.Context(), rebind); err != nil {
					return err
				}
			}
			if readdress != "" {
				if err := l.Readdress(cmd.Context(), readdress); err != nil {
					return err
				}
				s := l.Sites[readdress]
				fmt.Fprintf(cmd.OutOrStdout(), "%s: WAN %s %s\n", s.Name, s.WANAddr.Addr(), s.WANAddr6.Addr())
			}
			state, err := l.LinkState(cmd.Context())
			if err != nil {
				return err
			}
			if reset {
				if err := l.ResetCounters(cmd.Context()); err != nil {
					return err
				}
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), state)
			}
			fmt.Fprintln(cmd.OutOrStdout(), "WAN:", describeLink(state.Settings))
			if counters || reset {
				printCounters(cmd.OutOrStdout(), state)
			}
			return nil
		},
	}
	link.add(cmd)
	// What is not given stays, so no flag has a default here.
	for _, name := range []string{"rate", "rtt", "loss", "reorder", "duplicate"} {
		cmd.Flags().Lookup(name).DefValue = ""
	}
	cmd.Flags().BoolVar(&cut, "cut", false, "let all packets vanish")
	cmd.Flags().BoolVar(&restore, "restore", false, "end a cut")
	cmd.Flags().StringVar(&from, "from", "", "cut or restore only what this data centre sends")
	cmd.Flags().StringVar(&rebind, "rebind", "", "have the NAT before this data centre use other ports")
	cmd.Flags().StringVar(&readdress, "readdress", "", "give this data centre other addresses in the WAN")
	cmd.Flags().BoolVar(&counters, "counters", false, "show the counters of each direction")
	cmd.Flags().BoolVar(&reset, "reset-counters", false, "show the counters and set them to zero")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print settings and counters as JSON")
	cmd.MarkFlagsMutuallyExclusive("cut", "restore")
	return cmd
}

// cutFrom adds a site to those that are cut, or takes it away; no site means all.
func cutFrom(sites, all []string, from string, cut bool) []string {
	meant := all
	if from != "" {
		meant = []string{from}
	}
	sites = slices.DeleteFunc(slices.Clone(sites), func(s string) bool { return slices.Contains(meant, s) })
	if cut {
		sites = append(sites, meant...)
	}
	return slices.Sorted(slices.Values(sites))
}

func describeLink(s lab.LinkSettings) string {
	text := fmt.Sprintf("%s, %v round trip, %s loss", lab.FormatRate(s.Rate), s.RTT, lab.FormatLoss(s.Loss))
	if s.Burst != 0 {
		text += fmt.Sprintf(" in bursts of %g", s.Burst)
	}
	if s.Reorder > 0 {
		text += fmt.Sprintf(", %s reordered", lab.FormatLoss(s.Reorder))
	}
	if s.Duplicate > 0 {
		text += fmt.Sprintf(", %s twice", lab.FormatLoss(s.Duplicate))
	}
	if s.MTU > 0 {
		text += fmt.Sprintf(", MTU %d", s.MTU)
		if s.NoICMP {
			text += " without ICMP"
		}
	}
	if len(s.Block) > 0 {
		text += ", no " + strings.Join(s.Block, " and no ")
	}
	if len(s.NAT) > 0 {
		text += ", NAT before " + strings.Join(s.NAT, " and ")
	}
	if len(s.Cut) > 0 {
		text += ", cut from " + strings.Join(s.Cut, " and ")
	}
	return text
}

func printCounters(w io.Writer, state lab.LinkState) {
	fmt.Fprintf(w, "%-20s%16s%12s%10s%10s%10s%10s%10s%11s%10s\n", "from", "bytes", "packets", "lost", "cut", "dropped", "blocked", "too big", "reordered", "twice")
	for _, from := range slices.Sorted(maps.Keys(state.Counters)) {
		c := state.Counters[from]
		fmt.Fprintf(w, "%-20s%16d%12d%10d%10d%10d%10d%10d%11d%10d\n", from, c.Bytes, c.Packets, c.Lost, c.Cut, c.Dropped, c.Blocked, c.TooBig, c.Reordered, c.Duplicated)
	}
}
