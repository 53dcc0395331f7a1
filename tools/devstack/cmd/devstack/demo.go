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

// demoCommand is `make demo`.
func demoCommand() *cobra.Command {
	var (
		o     stack.Options
		users int
	)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Create users over HTTP and watch their events reach ClickHouse",
		Long: "Create users over HTTP and watch their events reach ClickHouse, on the stack that is up\n" +
			"in the folder, or else on one that runs as long as the demo.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := completeStackFlags(cmd.Context(), cmd.Flags()); err != nil {
				return err
			}
			return runDemo(cmd.Context(), o, users)
		},
	}
	addStackFlags(cmd.Flags(), &o)
	cmd.Flags().IntVar(&users, "users", 10_000, "how many users to create")
	return cmd
}

func runDemo(ctx context.Context, o stack.Options, users int) error {
	var out io.Writer = os.Stdout
	state, err := stack.ReadState(o.Dir)
	switch {
	case err == nil && state.Answers(ctx):
		_, _ = fmt.Fprintf(out, "using the stack that is up: %s\n", state.APIURL)
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
	return demo.Run(ctx, demo.Options{State: state, Users: users, Out: out})
}
