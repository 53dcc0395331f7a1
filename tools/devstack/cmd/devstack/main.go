// Command devstack runs PostgreSQL, the ClickHouse engine, and Diehard with
// both, on one machine without Docker. `make run` and `make demo` call it.
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
	root.AddCommand(upCommand(), demoCommand(), fetchCommand(), chromiumCommand(), axeCommand(), postgresCommand(), pgBouncerCommand(), clickhouseCommand(), engineCommand(), superviseCommand())
	err := root.ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "devstack:", err)
		os.Exit(1)
	}
}

// superviseCommand supervises a server. Package devstack runs this command between
// itself and the server.
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
	cmd.Flags().BoolVar(&temporary, "temporary", false, "create a folder that is removed when this process ends")
	return cmd
}
