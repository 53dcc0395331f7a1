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

// engineCommand serves the engine in this process. Package devstack runs this command.
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
	flags.StringVar(&o.Library, "library", "", "path of the engine, libchdb.so")
	flags.StringVar(&o.DataDir, "data-dir", "", "data folder")
	flags.StringVar(&o.HTTPAddr, "http-addr", "127.0.0.1:8123", "address of the HTTP interface; port 0 picks a free port")
	flags.StringVar(&o.NativeAddr, "native-addr", "127.0.0.1:9000", "address of the native protocol; port 0 picks a free port")
	flags.StringVar(&o.User, "user", "default", "user name that clients send")
	_ = cmd.MarkFlagRequired("data-dir") // fails only for an unknown flag
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
	fmt.Println(string(ready)) //nolint:forbidigo // the caller waits for this line
	return server.Serve(ctx)
}

// clickhouseCommand runs a ClickHouse server for another program.
func clickhouseCommand() *cobra.Command {
	var (
		o        devstack.ClickHouseOptions
		attached bool
	)
	cmd := &cobra.Command{
		Use:   "clickhouse",
		Short: "Run ClickHouse with HTTP and the native protocol until it is stopped",
		Long: "Run the ClickHouse engine with HTTP and the native protocol until it is stopped.\n\nWhen it " +
			`accepts connections, it prints one line of JSON:` + "\n" +
			`{"native_dsn": "clickhouse://…", "http_dsn": "http://…"}, the addresses of the database default.` + "\n" + devstack.ClickHousePasswordEnv + " sets the password.\n\n" + signalsHelp,
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
	flags.StringVar(&o.DataDir, "data-dir", "", "data folder, created if missing (default: a temporary folder, removed at the end)")
	flags.IntVar(&o.HTTPPort, "http-port", 0, "port of the HTTP interface on 127.0.0.1 (default: a free port)")
	flags.IntVar(&o.NativePort, "native-port", 0, "port of the native protocol on 127.0.0.1 (default: a free port)")
	flags.StringVar(&o.User, "user", "", "user name that clients send (default: the user default, without a password)")
	flags.BoolVar(&attached, "attached", false, attachedUsage)
	return cmd
}
