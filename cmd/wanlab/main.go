// Command wanlab builds two data centres and their users on one machine, to
// try, test and measure wanmig.
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab"
)

func main() {
	lab.RunChild()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "wanlab:", err)
		os.Exit(1)
	}
}

func rootCommand() *cobra.Command {
	var dir string
	root := &cobra.Command{
		Use:   "wanlab",
		Short: "Two data centres and their users on one machine, to try, test and measure wanmig",
		Long: `wanlab makes network namespaces for two data centres and their users. Each data
centre has a libvirtd and a wanmig agent of its own; a WAN of any rate, delay
and loss joins them. The host's own network is left alone.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.PersistentFlags().StringVar(&dir, "dir", cmp.Or(os.Getenv("WANLAB_DIR"), lab.DefaultDir), "directory of the lab, also $WANLAB_DIR")
	root.AddCommand(
		upCommand(&dir),
		vmCommand(&dir),
		execCommand(&dir),
		linkCommand(&dir),
		statusCommand(&dir),
		reportCommand(&dir),
		loadCommand(&dir),
		verifyCommand(&dir),
		probeCommand(&dir),
		clientCommand(&dir),
		imageCommand(),
		downCommand(&dir),
	)
	return root
}
