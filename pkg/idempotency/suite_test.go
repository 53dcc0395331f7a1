package idempotency_test

import (
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
)

func TestIdempotency(t *testing.T) {
	RegisterFailHandler(Fail)
	EnforceDefaultTimeoutsWhenUsingContexts()
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "idempotency")
}

var suite = testengines.Start(testengines.Options{Postgres: true})

// db is a database that is empty at the start of each spec.
var db *sqlx.DB

var _ = BeforeEach(func(ctx SpecContext) {
	db = testengines.OpenPostgres(suite.LastingPostgresDSN(ctx), nil)
	db.MustExecContext(ctx, "CREATE TABLE IF NOT EXISTS effects (note text)")
	DeferCleanup(func(ctx SpecContext) { db.MustExecContext(ctx, "DROP TABLE effects") })
})
