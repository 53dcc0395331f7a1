package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/demo"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/stack"
)

// demoCommand runs `make demo`.
func demoCommand() *cobra.Command {
	var (
		o stack.Options
		d demo.Options
	)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Create users over HTTP and watch their events reach ClickHouse",
		Long: "Create users over HTTP and watch their events reach ClickHouse. The demo uses the stack that\n" +
			"runs in the folder. If none runs, it starts one and stops it at the end.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := completeStackFlags(cmd.Context(), cmd.Flags()); err != nil {
				return err
			}
			return runDemo(cmd.Context(), o, d)
		},
	}
	addStackFlags(cmd.Flags(), &o)
	cmd.Flags().IntVar(&d.Users, "users", 10_000, "number of users to create")
	cmd.Flags().StringVar(&d.APIKey, "api-key", "", "API key, required if DIEHARD_API_KEYS is set; also set by "+stack.Variable("api-key"))
	return cmd
}

func runDemo(ctx context.Context, o stack.Options, d demo.Options) error {
	var out io.Writer = os.Stdout
	state, err := stack.ReadState(o.Dir)
	switch {
	case err == nil && state.Answers(ctx):
		_, _ = fmt.Fprintf(out, "using the running stack: %s\n", state.APIURL)
	case err == nil || errors.Is(err, os.ErrNotExist):
		o.Out, o.Logs, o.Hurry = out, stack.FileLogs(filepath.Join(o.Dir, "logs")), secondSignal(ctx)
		started, err := stack.Start(ctx, o)
		if err != nil {
			return err
		}
		defer started.Stop()
		state = started.State()
	default:
		return err
	}
	d.State, d.Out = state, out
	return demo.Run(ctx, d)
}
