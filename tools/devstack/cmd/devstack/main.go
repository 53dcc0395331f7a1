// Command devstack runs Diehard and the databases it needs on one machine,
// without Docker. `make run` and `make demo` call it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
)

var version = "dev" // set by the linker

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	root := &cobra.Command{
		Use:           "devstack",
		Short:         "PostgreSQL, ClickHouse, the API and the relay on this machine, without Docker",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(upCommand(), demoCommand(), fetchCommand(), chromiumCommand(), postgresCommand(), clickhouseCommand(), engineCommand(), superviseCommand())
	err := root.ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "devstack:", err)
		os.Exit(1)
	}
}

// superviseCommand is what package devstack runs between itself and a server.
func superviseCommand() *cobra.Command {
	var temporary bool
	cmd := &cobra.Command{
		Use:    "supervise",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return supervisor.Serve(os.Stdin, os.Stdout, temporary)
		},
	}
	cmd.Flags().BoolVar(&temporary, "temporary", false, "make a folder that goes when this ends")
	return cmd
}
