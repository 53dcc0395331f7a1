package main

import (
	"context"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// migrate brings PostgreSQL's schema up to date. Several may do so at once.
func migrate(ctx context.Context, p cli.Process, c *config.API) error {
	db, err := postgres.Open(postgres.Options{DSN: c.Postgres.DSN, ApplicationName: "diehard-migrate"})
	if err != nil {
		return err
	}
	defer db.Close()
	return postgres.Migrate(ctx, db.DB, p.Log)
}
