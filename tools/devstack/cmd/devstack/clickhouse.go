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

// engineCommand serves the engine in this process. It is what package devstack runs.
func engineCommand() *cobra.Command {
	o := chserver.Options{}
	cmd := &cobra.Command{
		Use:    "clickhouse-engine",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			o.Password = os.Getenv(devstack.ClickHousePasswordEnv)
			o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
			return serveClickHouse(ctx, o)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Library, "library", "", "the engine, libchdb.so")
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

// clickhouseCommand runs a server for another program.
func clickhouseCommand() *cobra.Command {
	var (
		o        devstack.ClickHouseOptions
		attached bool
	)
	cmd := &cobra.Command{
		Use:   "clickhouse",
		Short: "Run the ClickHouse engine behind HTTP and the native protocol, until it is stopped",
		Long: "Run the ClickHouse engine behind HTTP and the native protocol, until it is stopped. Once it\n" +
			`answers, it prints a line of JSON: {"native_dsn": "clickhouse://…", "http_dsn": "http://…"}, the` + "\n" +
			"addresses of its database default. " + devstack.ClickHousePasswordEnv + " sets the password.\n\n" + signalsHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, crashed, stop := whileWanted(cmd.Context(), attached)
			defer stop()
			o.Password = os.Getenv(devstack.ClickHousePasswordEnv)
			o.Log = os.Stderr
			server, err := devstack.StartClickHouse(ctx, o)
			if err != nil {
				return err
			}
			return runServer(ctx, crashed, server, map[string]string{
				"native_dsn": server.NativeDSN("default"), "http_dsn": server.HTTPDSN("default"),
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.DataDir, "data-dir", "", "folder of the data; made if it does not exist (default: a temporary folder, removed at the end)")
	flags.IntVar(&o.HTTPPort, "http-port", 0, "port of the HTTP interface on 127.0.0.1 (default: a free one)")
	flags.IntVar(&o.NativePort, "native-port", 0, "port of the native protocol on 127.0.0.1 (default: a free one)")
	flags.StringVar(&o.User, "user", "", "user that clients have to name (default: the user default, without a password)")
	flags.BoolVar(&attached, "attached", false, attachedUsage)
	return cmd
}
