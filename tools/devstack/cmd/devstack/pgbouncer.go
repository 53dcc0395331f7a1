package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

// pgBouncerCommand runs a connection pooler for another program.
func pgBouncerCommand() *cobra.Command {
	var (
		o        devstack.PgBouncerOptions
		attached bool
	)
	cmd := &cobra.Command{
		Use:   "pgbouncer",
		Short: "Run a private PgBouncer in front of a PostgreSQL server until it is stopped",
		Long: "Run a private PgBouncer in front of a PostgreSQL server until it is stopped.\n\nWhen it accepts connections, it prints one line of JSON:\n" +
			`{"dsn": "postgres://…"}, the address of the database postgres.` + "\n\n" + signalsHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, crashed, stop := whileWanted(cmd.Context(), attached)
			defer stop()
			o.Log = os.Stderr
			pooler, err := devstack.StartPgBouncer(ctx, o)
			if err != nil {
				return err
			}
			return runServer(ctx, crashed, pooler, map[string]string{"dsn": pooler.DSN("postgres")})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Target, "target", "", "URL of the PostgreSQL server, with a user and a password")
	flags.StringVar(&o.PoolMode, "pool-mode", "transaction", "session, transaction or statement")
	flags.IntVar(&o.PoolSize, "pool-size", 20, "server connections for each database")
	flags.BoolVar(&attached, "attached", false, attachedUsage)
	return cmd
}
