package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

// postgresCommand runs a PostgreSQL server for another program.
func postgresCommand() *cobra.Command {
	var (
		o        devstack.PostgresOptions
		attached bool
	)
	cmd := &cobra.Command{
		Use:   "postgres",
		Short: "Run a private PostgreSQL server until it is stopped",
		Long: "Run a private PostgreSQL server until it is stopped.\n\nWhen it accepts connections, it prints one line of JSON:\n" +
			`{"dsn": "postgres://…"}, the address of the database postgres.` + "\n\n" + signalsHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, crashed, stop := whileWanted(cmd.Context(), attached)
			defer stop()
			o.Log = os.Stderr
			server, err := devstack.StartPostgres(ctx, o)
			if err != nil {
				return err
			}
			return runServer(ctx, crashed, server, map[string]string{"dsn": server.DSN("postgres")})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.DataDir, "data-dir", "", "data folder, created if missing (default: a temporary folder, removed at the end)")
	flags.IntVar(&o.Port, "port", 0, "port on 127.0.0.1 (default: a free port)")
	flags.BoolVar(&o.Durable, "durable", false, "keep committed data even if the machine crashes (slower)")
	flags.StringToStringVar(&o.Settings, "setting", nil, "additional server setting, NAME=VALUE; may be repeated")
	flags.BoolVar(&attached, "attached", false, attachedUsage)
	return cmd
}
