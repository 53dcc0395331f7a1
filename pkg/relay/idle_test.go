package relay_test

import (
	"log/slog"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("An idle relay", func() {
	It("executes at most 25 statements a minute", func(ctx SpecContext) {
		dsn := testengines.StartPostgres(ctx, map[string]string{"shared_preload_libraries": "pg_stat_statements"}).DSN()
		quiet := slog.New(slog.DiscardHandler)
		db := testengines.OpenStore(dsn, store.Session(relay.DefaultFlushTimeout))
		schema := postgres.Schema{Sets: []postgres.Set{postgres.Outbox}}
		Expect(schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
		db.MustExecContext(ctx, "CREATE EXTENSION pg_stat_statements")
		idle := relay.New(relay.Options{
			Store: store.New(db, store.Options{}), Log: quiet, Registry: prometheus.NewRegistry(),
			Vacuum: true, DeadLetterRetention: time.Hour, AuditRetention: time.Hour,
		})
		Expect(idle.IdleMinute(ctx)).To(Succeed(), "the first minute also does the tasks of the hour")
		db.MustExecContext(ctx, "SELECT pg_stat_statements_reset()")
		Expect(idle.IdleMinute(ctx)).To(Succeed())
		var statements []string
		Expect(db.SelectContext(ctx, &statements, `SELECT calls || ' ' || left(query, 60) FROM pg_stat_statements
			WHERE query NOT LIKE '%pg_stat_statements%' ORDER BY calls DESC`)).To(Succeed())
		var calls int
		Expect(db.GetContext(ctx, &calls, `SELECT sum(calls) FROM pg_stat_statements
			WHERE query NOT LIKE '%pg_stat_statements%'`)).To(Succeed())
		Expect(calls).To(And(BeNumerically(">", 0), BeNumerically("<=", 25)), "%q", statements)
	})
})
