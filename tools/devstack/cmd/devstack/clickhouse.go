package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/chserver"
)

// clickhouseCommand serves the engine in this process.
func clickhouseCommand() *cobra.Command {
	o := chserver.Options{}
	cmd := &cobra.Command{
		Use:   "clickhouse",
		Short: "Serve the ClickHouse engine over HTTP and the native protocol, until it is stopped",
		Long: "Serve the ClickHouse engine over HTTP and the native protocol, until it is stopped.\n" +
			"Once it answers, it prints its addresses as a line of JSON. A password is taken from\n" +
			devstack.ClickHousePasswordEnv + ".",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if o.Library == "" {
				var err error
				if o.Library, err = devstack.ClickHouseLibrary(ctx, os.Stderr); err != nil {
					return err
				}
			}
			o.Password = os.Getenv(devstack.ClickHousePasswordEnv)
			o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
			return serveClickHouse(ctx, o)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Library, "library", "", "the engine, libchdb.so (default: the pinned one)")
	flags.StringVar(&o.DataDir, "data-dir", "", "the folder of the data")
	flags.StringVar(&o.HTTPAddr, "http-addr", "127.0.0.1:8123", "address of the HTTP interface; port 0 is a free one")
	flags.StringVar(&o.NativeAddr, "native-addr", "127.0.0.1:9000", "address of the native protocol; port 0 is a free one")
	flags.StringVar(&o.User, "user", "default", "the user that clients name")
	_ = cmd.MarkFlagRequired("data-dir") // fails for a flag that is not there
	return cmd
}

func serveClickHouse(ctx context.Context, o chserver.Options) error {
	server, err := chserver.New(o)
	if err != nil {
		return err
	}
	ready, err := json.Marshal(devstack.ClickHouseReady{HTTPAddr: server.HTTPAddr(), NativeAddr: server.NativeAddr()})
	if err != nil {
		return err //nolint:wrapcheck // cannot happen with this type
	}
	fmt.Println(string(ready)) //nolint:forbidigo // what the caller waits for
	return server.Serve(ctx)
}
