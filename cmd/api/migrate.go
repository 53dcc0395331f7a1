package main

import (
	"context"
	"io"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// schema returns the PostgreSQL schema that the API requires.
func schema(c *config.API) postgres.Schema {
	return postgres.Schema{
		Name:    c.Postgres.Schema,
		Sets:    []postgres.Set{postgres.Outbox, postgres.Users},
		Command: "api migrate",
	}
}

// migrate migrates the PostgreSQL schema. Concurrent migrations are safe.
func migrate(ctx context.Context, p cli.Process, c *config.API) error {
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
	return schema(c).Migrate(ctx, db.DB, p.Log)
}

// printed writes the SQL of migrate.
var printed = []cli.Printed[*config.API]{
	{Name: "postgres", Print: func(w io.Writer, c *config.API) error { return schema(c).Print(w) }},
}
