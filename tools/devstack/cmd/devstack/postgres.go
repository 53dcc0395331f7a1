package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

// postgresCommand runs a server for another program.
func postgresCommand() *cobra.Command {
	var (
		o        devstack.PostgresOptions
		attached bool
	)
	cmd := &cobra.Command{
		Use:   "postgres",
		Short: "Run a private PostgreSQL, until it is stopped",
		Long: "Run a private PostgreSQL, until it is stopped. Once it takes connections, it prints a line of\n" +
			`JSON: {"dsn": "postgres://…"}, the address of its database postgres.` + "\n\n" + signalsHelp,
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
	flags.StringVar(&o.DataDir, "data-dir", "", "folder of the data; made if it does not exist (default: a temporary folder, removed at the end)")
	flags.IntVar(&o.Port, "port", 0, "port on 127.0.0.1 (default: a free one)")
	flags.BoolVar(&o.Durable, "durable", false, "keep what is committed if the machine crashes, too, and not only the server")
	flags.StringToStringVar(&o.Settings, "setting", nil, "further setting of the server, NAME=VALUE; may be repeated")
	flags.BoolVar(&attached, "attached", false, attachedUsage)
	return cmd
}
