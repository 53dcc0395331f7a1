package main

import (
	"context"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

// migrate brings both schemas up to date. Several may do so at once: ClickHouse
// has no lock to take, so the one in PostgreSQL covers both.
func migrate(ctx context.Context, p cli.Process, c *config.Relay) error {
	db, err := postgres.Open(postgres.Options{DSN: c.Postgres.DSN, ApplicationName: "diehard-migrate"})
	if err != nil {
		return err
	}
	defer db.Close()
	return postgres.Migrate(ctx, db.DB, p.Log, func(ctx context.Context) error {
		return clickhouse.Migrate(ctx, sinkOptions(c), p.Log)
	})
}
