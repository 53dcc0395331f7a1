package outbox_test

import (
	"context"
	"database/sql"
	"log/slog"
	"testing"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/test/engines"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

func TestOutbox(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "outbox")
}

var suite = engines.Start(engines.Options{})

func newDatabase(ctx context.Context) *sqlx.DB {
	GinkgoHelper()
	return engines.OpenPostgres(suite.PostgresDSN(ctx), nil)
}

// exampleDatabase starts a server for the example, which runs when the suite
// has ended, and its engines with it.
func exampleDatabase(ctx context.Context) (db *sql.DB, stop func()) {
	server, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{})
	if err != nil {
		panic(err)
	}
	pool, err := postgres.Open(postgres.Options{DSN: server.DSN("postgres")})
	if err != nil {
		panic(err)
	}
	if err := engines.Schema.Migrate(ctx, pool.DB, slog.New(slog.DiscardHandler)); err != nil {
		panic(err)
	}
	return pool.DB, func() {
		_ = pool.Close()
		_ = server.Stop()
	}
}
