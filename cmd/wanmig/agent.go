package main

import (
	"context"
	"errors"
	"log/slog"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/agent"
)

func newAgentCommand() *cobra.Command {
	config := agent.DefaultConfig
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run this host's agent in the foreground",
		Long: `Run this host's agent in the foreground, until SIGTERM or SIGINT.

It logs to stderr. An unusable configuration exits with 2, another failure
with 1.`,
		Args: need(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := agent.LoadConfig(config)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			// A second signal ends an agent that does not manage to stop.
			context.AfterFunc(ctx, stop)
			defer stop()
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			if err := agent.Run(ctx, cfg, log); err != nil && !(ctx.Err() != nil && errors.Is(err, context.Canceled)) {
				return &exitError{exitFailed, err}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", config, "configuration `FILE`")
	return cmd
}
