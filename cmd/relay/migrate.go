package main

import (
	"context"
	"io"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

// schema returns the PostgreSQL schema that the relay requires.
func schema(c *config.Relay) postgres.Schema {
	return postgres.Schema{
		Name:    c.Postgres.Schema,
		Sets:    []postgres.Set{postgres.Outbox},
		Command: "relay migrate",
	}
}

// migrate migrates both schemas. Concurrent migrations are safe: ClickHouse has no
// locks, so the lock in PostgreSQL covers both databases.
func migrate(ctx context.Context, p cli.Process, c *config.Relay) error {
	db, err := postgres.Open(postgres.Options{
		DSN:             c.Postgres.DSN,
		PasswordFile:    c.Postgres.PasswordFile,
		ApplicationName: "diehard-migrate",
		Session:         postgres.MigrationSession(),
		Log:             p.Log,
	})
	if err != nil {
		return err
	}
	defer db.Close()
	return schema(c).Migrate(ctx, db.DB, p.Log, func(ctx context.Context) error {
		return clickhouse.Migrate(ctx, sinkOptions(c), p.Log)
	})
}

// printed writes the SQL of migrate, by database.
var printed = []cli.Printed[*config.Relay]{
	{Name: "postgres", Print: func(w io.Writer, c *config.Relay) error { return schema(c).Print(w) }},
	{Name: "clickhouse", Print: func(w io.Writer, c *config.Relay) error {
		return clickhouse.PrintMigrations(w, sinkOptions(c))
	}},
}
