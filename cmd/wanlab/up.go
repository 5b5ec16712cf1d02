package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/lab"
)

func upCommand(dir *string) *cobra.Command {
	var link linkFlags
	var o lab.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Make a lab and leave it running",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			change, err := link.change(cmd)
			if err != nil {
				return err
			}
			o.Dir = *dir
			o.Link = change.ApplyTo(lab.DefaultLink())
			if cmd.Flags().Changed("seed") {
				o.Link.Seed = link.seed
			}
			l, err := lab.Up(cmd.Context(), o)
			if cmd.Context().Err() != nil && err != nil {
				return errors.New("interrupted; nothing is left of the lab")
			}
			if err != nil {
				return err
			}
			printSummary(cmd.OutOrStdout(), l)
			return nil
		},
	}
	link.add(cmd)
	cmd.Flags().Uint64Var(&link.seed, "seed", 1, "seed of the losses")
	cmd.Flags().StringVar(&o.Wanmig, "wanmig", "", "the program for the agents (default: wanmig beside wanlab)")
	cmd.Flags().BoolVar(&o.NoAgent, "no-agent", false, "make data centres without a wanmig agent")
	cmd.Flags().BoolVar(&o.Third, "third", false, "make a third data centre, "+lab.ThirdDC+", with links like the others' to both")
	cmd.Flags().BoolVar(&o.Services, "services", false, "add routers (BIRD) to all sites and a name server (BIND) to "+lab.LocalDC)
	return cmd
}

func printSummary(w io.Writer, l *lab.Lab) {
	fmt.Fprintf(w, "lab in %s, WAN of %s\n", l.Dir, describeLink(l.Link))
	for _, name := range l.DataCentres() {
		s := l.Sites[name]
		fmt.Fprintf(w, "  %-9s  WAN %s, guests on %s %s %s, ip netns %s\n",
			name, s.WANAddr.Addr(), s.Bridge, s.BridgeAddr, s.BridgeAddr6, s.Namespace)
	}
	users := l.Sites[lab.Users]
	fmt.Fprintf(w, "  %-9s  %s %s on the guests' network of %s, ip netns %s\n",
		lab.Users, users.Addr.Addr(), users.Addr6.Addr(), lab.LocalDC, users.Namespace)
	if l.Services {
		fmt.Fprintf(w, "             send from %s %s; names in %s; router at birdc -s %s\n",
			users.Loopback.Addr(), users.Loopback6.Addr(), lab.Zone, users.BirdSocket())
	}
	fmt.Fprintf(w, `next:
  wanlab vm web
  wanlab exec %s -- virsh list --all
  wanlab link --loss 1%%
  wanlab status
  wanlab down
`, lab.LocalDC)
}
