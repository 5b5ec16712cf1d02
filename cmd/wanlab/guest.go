package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/lab"
)

func imageCommand() *cobra.Command {
	var cache, guest string
	var debian, second bool
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Download and make what guests are made of, ahead of the first guest",
		Long: `image downloads and makes what guests are made of. With --debian it makes the
image for "vm --image debian" instead, and prints its path: Debian 12 with nginx
and PostgreSQL, installed from the Debian mirrors that apt uses here, in a raw
file of 3 GiB of which a bit more than a quarter is in use. It takes some
minutes, once. With --second it makes the image for "vm --image debian-second":
the same packages, installed once more, so that files are in other places and
times, identifiers and keys are others, as on another server of that release.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			im, err := lab.OpenImages(cache, guest)
			if err != nil {
				return err
			}
			name := lab.Debian
			switch {
			case second:
				name = lab.DebianSecond
			case !debian:
				return im.Prepare(cmd.Context())
			}
			installed, err := im.Debian(cmd.Context(), name, func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) })
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), installed.Disk)
			return nil
		},
	}
	cmd.Flags().BoolVar(&debian, "debian", false, "install the Debian that guests can boot")
	cmd.Flags().BoolVar(&second, "second", false, "install Debian a second time, for a disk of the same release that is not a copy")
	addImages(cmd, &cache, &guest)
	return cmd
}

// addImages adds the flags that say what guests are made of.
func addImages(cmd *cobra.Command, cache, guest *string) {
	cmd.Flags().StringVar(cache, "cache", "", "directory for packages and disk contents (default: $WANLAB_CACHE or "+lab.DefaultCache+")")
	cmd.Flags().StringVar(guest, "guest", "", "the guest's program (default: $WANLAB_GUEST or wanlab-guest beside wanlab)")
}

func reportCommand(dir *string) *cobra.Command {
	var site string
	cmd := &cobra.Command{
		Use:   "report NAME",
		Short: "Print what a guest knows of its memory, disks and pauses, as JSON",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			vm, at, err := findVM(cmd, *dir, args[0], site)
			if err != nil {
				return err
			}
			r, err := vm.Report(cmd.Context(), at)
			if err != nil {
				return err
			}
			return printJSON(cmd.OutOrStdout(), r)
		},
	}
	addSite(cmd, &site)
	return cmd
}

func loadCommand(dir *string) *cobra.Command {
	var site string
	cmd := &cobra.Command{
		Use:   "load NAME",
		Short: "Change what a guest does; what is not given stays",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var change lab.LoadChange
			for flag, to := range map[string]**int64{"dirty": &change.Dirty, "edit": &change.Edit, "write": &change.Write, "working-set": &change.WorkingSet} {
				if f := cmd.Flags().Lookup(flag); f.Changed {
					n, err := parseAmount(flag, f.Value.String())
					if err != nil {
						return err
					}
					*to = &n
				}
			}
			vm, at, err := findVM(cmd, *dir, args[0], site)
			if err != nil {
				return err
			}
			r, err := vm.Load(cmd.Context(), at, change)
			if err != nil {
				return err
			}
			return printJSON(cmd.OutOrStdout(), r.Load)
		},
	}
	addSite(cmd, &site)
	cmd.Flags().String("dirty", "", "memory to dirty, such as 20MiB/s; 0 stops")
	cmd.Flags().String("edit", "", "memory to change in a few words a page, such as 20MiB/s; 0 stops")
	cmd.Flags().String("write", "", "blocks to write to each disk, such as 5MiB/s; 0 stops")
	cmd.Flags().String("working-set", "", "memory to dirty in, such as 64MiB")
	return cmd
}

func verifyCommand(dir *string) *cobra.Command {
	var site string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify NAME",
		Short: "Have a guest check all its memory and disks now; fails if it finds an error",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			vm, at, err := findVM(cmd, *dir, args[0], site)
			if err != nil {
				return err
			}
			v, err := vm.Verify(cmd.Context(), at)
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), v); err != nil {
					return err
				}
			}
			if n := v.Bad(); n > 0 {
				return fmt.Errorf("%s: %d of %d pages, %d of %d blocks and %d of %d files are bad",
					vm.Name, v.BadPages, v.Pages, v.BadBlocks, v.Blocks, v.BadFiles, v.Files)
			}
			if n := v.Report.Errors(); n > 0 {
				return fmt.Errorf("%s: everything is well now, but there were %d errors since it booted", vm.Name, n)
			}
			if !asJSON {
				fmt.Fprintf(cmd.OutOrStdout(), "%s at %s verified %d pages of memory, %d numbered blocks and %d files: no error\n", vm.Name, at, v.Pages, v.Blocks, v.Files)
			}
			return nil
		},
	}
	addSite(cmd, &site)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print what was found as JSON")
	return cmd
}

func probeCommand(dir *string) *cobra.Command {
	var interval, duration time.Duration
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "probe NAME",
		Short: "Send echoes to a guest from both data centres, and print the longest time without an answer",
		Long: `probe sends UDP echoes from both data centres until it is interrupted, or for
--duration, and prints the longest gap between two answers: around a move, the
downtime that a client would see.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := lab.Open(*dir)
			if err != nil {
				return err
			}
			vm, err := l.VM(args[0])
			if err != nil {
				return err
			}
			p, err := vm.StartProbe(cmd.Context(), interval)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			if duration > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, duration)
				defer cancel()
			}
			<-ctx.Done()
			r, err := p.Stop()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), r)
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "%d of %d echoes answered; longest time without an answer:\n", r.Answers, r.Sent)
			for _, s := range r.Switches {
				fmt.Fprintf(out, "  %4d ms between %s and %s\n", s.Length.Milliseconds(), s.From, s.To)
			}
			if r.Longest.From == r.Longest.To {
				fmt.Fprintf(out, "  %4d ms at %s\n", r.Longest.Length.Milliseconds(), r.Longest.From)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print all that was seen as JSON")
	cmd.Flags().DurationVar(&interval, "interval", 5*time.Millisecond, "time between echoes")
	cmd.Flags().DurationVar(&duration, "duration", 0, "stop after this time (default: when interrupted)")
	return cmd
}

func addSite(cmd *cobra.Command, site *string) {
	cmd.Flags().StringVar(site, "site", "", "data centre to ask from (default: where the guest runs)")
}
