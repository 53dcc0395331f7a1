package chaos_test

import (
	"context"
	"log/slog"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// An old transaction prevents PostgreSQL from removing rows that were deleted after
// the transaction had begun.
var _ = Describe("While an old transaction holds back vacuum", Label("long"), func() {
	const anyBytes = 1 << 40

	var (
		db, observer *sqlx.DB
		s            *store.Store
	)

	arrange := func(ctx context.Context, maxRows int) {
		GinkgoHelper()
		server, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Settings: map[string]string{
			"shared_preload_libraries": "pg_stat_statements",
			"fsync":                    "off", // this spec kills no server
			"synchronous_commit":       "off",
			"autovacuum_naptime":       "1s", // plans must not change with the statistics
		}})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(server.Stop)
		dsn, err := server.CreateDatabase(ctx, "diehard")
		Expect(err).NotTo(HaveOccurred())
		observer = testengines.OpenPostgres(dsn, nil)
		Expect(testengines.Schema.Migrate(ctx, observer.DB, slog.New(slog.DiscardHandler))).To(Succeed())
		observer.MustExecContext(ctx, "CREATE EXTENSION pg_stat_statements")
		db = testengines.OpenStore(dsn, store.Session(time.Minute))
		s = store.New(db, store.Options{MaxRows: maxRows})

		old, err := observer.BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { _ = old.Rollback() })
		_, err = old.ExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM outbox_events LIMIT 1")
		Expect(err).NotTo(HaveOccurred())
	}

	publish := func(ctx context.Context, n int) {
		GinkgoHelper()
		observer.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context)
			SELECT 'thing_happened', '{"n": 1}' FROM generate_series(1, $1::int)`, n)
	}

	// pages runs do and returns the number of pages that its statements have read.
	pages := func(ctx context.Context, do func()) (n int) {
		GinkgoHelper()
		observer.MustExecContext(ctx, "SELECT pg_stat_statements_reset()")
		do()
		Expect(observer.GetContext(ctx, &n, `SELECT coalesce(sum(shared_blks_hit + shared_blks_read), 0)
			FROM pg_stat_statements WHERE query NOT LIKE '%pg_stat_statements%'`)).To(Succeed())
		return n
	}

	cut := func(ctx context.Context) (batches int) {
		GinkgoHelper()
		cut, err := s.Cut(ctx, 0)
		Expect(err).NotTo(HaveOccurred())
		Expect(cut.Batches).NotTo(BeZero())
		return cut.Batches
	}

	claim := func(ctx context.Context) *store.Lease {
		GinkgoHelper()
		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		Expect(lease).NotTo(BeNil())
		return lease
	}

	poll := func(ctx context.Context) {
		GinkgoHelper()
		_, err := s.Poll(ctx)
		Expect(err).NotTo(HaveOccurred())
	}

	watch := func(ctx context.Context) {
		GinkgoHelper()
		_, err := s.Waiting(ctx, time.Minute)
		Expect(err).NotTo(HaveOccurred())
	}

	It("a cut, a poll and a look of the watchdog do not become slower after many drained events", func(ctx SpecContext) {
		const total, maxRows, atOnce = 1_000_000, 10_000, 100_000
		arrange(ctx, maxRows)
		for range total / atOnce {
			publish(ctx, atOnce)
		}
		var ofCuts, ofPolls []int // the pages of each cut and poll, per batch
		var ofLooks []int
		for drained := 0; drained < total; {
			// Expire the delay of the low watermark. Otherwise the distance between the
			// watermark and the drained events would depend on the machine's speed.
			observer.MustExecContext(ctx, "UPDATE outbox_cursor SET next_low_watermark_at = 'epoch'")
			var batches int
			n := pages(ctx, func() { batches = cut(ctx) })
			for range batches {
				ofCuts = append(ofCuts, n/batches)
				lease := claim(ctx)
				Expect(lease.Settle(ctx)).To(Succeed())
				drained += lease.Events
			}
			ofPolls = append(ofPolls, pages(ctx, func() { poll(ctx) })/batches)
			ofLooks = append(ofLooks, pages(ctx, func() { watch(ctx) }))
		}
		expectLevel(ofCuts)
		expectLevel(ofPolls)
		expectLevel(ofLooks)
	})

	It("a claim and a look of the watchdog do not become slower after ten thousand small cuts", func(ctx SpecContext) {
		const cuts, maxRows, polled = 10_000, 10, 100
		arrange(ctx, maxRows)
		var ofCuts, ofLooks, ofClaims []int
		for n := range cuts {
			publish(ctx, maxRows)
			var lease *store.Lease
			if n < cuts/10 || n >= cuts-cuts/10 {
				ofCuts = append(ofCuts, pages(ctx, func() { cut(ctx) }))
				ofLooks = append(ofLooks, pages(ctx, func() { watch(ctx) }))
				ofClaims = append(ofClaims, pages(ctx, func() { lease = claim(ctx) }))
			} else {
				cut(ctx)
				lease = claim(ctx)
			}
			Expect(lease.Settle(ctx)).To(Succeed())
			if n%polled == 0 {
				poll(ctx)
			}
		}
		expectLevel(ofCuts)
		expectLevel(ofLooks)
		expectLevel(ofClaims)
	})
})

// expectLevel expects that the means of the first and of the last tenth have the same
// order of magnitude. If the cost grew with the number of dead rows, the last mean would
// be at least ten times the first.
func expectLevel(pages []int) {
	GinkgoHelper()
	tenth := len(pages) / 10
	mean := func(some []int) (mean float64) {
		for _, n := range some {
			mean += float64(n) / float64(len(some))
		}
		return mean
	}
	first, last := mean(pages[:tenth]), mean(pages[len(pages)-tenth:])
	AddReportEntry("pages", []float64{first, last})
	const few = 50
	Expect(last).To(BeNumerically("<=", 4*first+few))
}
