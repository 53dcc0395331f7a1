package outbox_test

import (
	"context"
	"database/sql"
	"log/slog"
	"testing"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

func TestOutbox(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "outbox")
}

var suite = testengines.Start(testengines.Options{Postgres: true})

func newDatabase(ctx context.Context) *sqlx.DB {
	GinkgoHelper()
	return testengines.OpenPostgres(suite.PostgresDSN(ctx), nil)
}

// exampleDatabase starts a server for the example. The example runs after the suite, when
// the suite's engines have already stopped.
func exampleDatabase(ctx context.Context) (db *sql.DB, stop func()) {
	dsn, stopServer := testengines.ExamplePostgres(ctx)
	pool, err := postgres.Open(postgres.Options{DSN: dsn})
	if err != nil {
		panic(err)
	}
	if err := testengines.Schema.Migrate(ctx, pool.DB, slog.New(slog.DiscardHandler)); err != nil {
		panic(err)
	}
	return pool.DB, func() {
		_ = pool.Close()
		stopServer()
	}
}
