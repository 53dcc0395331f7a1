package store_test

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("The housekeeping", func() {
	var (
		dsn  string
		db   *sqlx.DB
		s    *store.Store
		a, b = uuid.New(), uuid.New()
	)
	tasks := []store.Task{store.TaskAudit, store.TaskVacuum}

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		db = testengines.OpenStore(dsn, store.Session(time.Minute))
		s = newStore(db)
	})

	Describe("leases a task", func() {
		It("to one relay until its end, and then after the pause", func(ctx SpecContext) {
			Expect(s.LeaseTasks(ctx, a, tasks)).To(Equal(tasks))
			Expect(s.LeaseTasks(ctx, b, tasks)).To(BeEmpty())
			Expect(s.EndTask(ctx, b, store.TaskAudit, 0, true)).To(Succeed(), "the task of another relay")
			Expect(s.TaskSuccesses(ctx)).To(BeEmpty())

			Expect(s.EndTask(ctx, a, store.TaskAudit, 0, true)).To(Succeed())
			Expect(s.EndTask(ctx, a, store.TaskVacuum, time.Hour, false)).To(Succeed())
			Expect(s.TaskSuccesses(ctx)).To(HaveLen(1))
			Expect(s.TaskSuccesses(ctx)).To(HaveKeyWithValue(store.TaskAudit, BeTemporally("~", time.Now(), time.Hour)))
			Expect(s.LeaseTasks(ctx, b, tasks)).To(Equal([]store.Task{store.TaskAudit}))
		})

		DescribeTable("to another relay", func(ctx SpecContext, change string) {
			Expect(s.LeaseTasks(ctx, a, tasks)).To(Equal(tasks))
			Expect(s.EndTask(ctx, a, store.TaskAudit, time.Hour, true)).To(Succeed())
			db.MustExecContext(ctx, change)
			Expect(s.LeaseTasks(ctx, b, tasks)).To(Equal(tasks))
		},
			Entry("if the first is dead for longer than the lease", "UPDATE outbox_housekeeping SET due_at = '-infinity', leased_until = least(leased_until, clock_timestamp() - interval '1 s')"),
			Entry("after the clock was set back", "UPDATE outbox_housekeeping SET due_at = due_at + interval '10 days', leased_until = leased_until + interval '10 days'"),
			Entry("after the table was truncated", "TRUNCATE outbox_housekeeping"),
		)
	})

	// deliver publishes events and deletes them, and returns the look at the dead rows when
	// PostgreSQL has counted them.
	deliver := func(ctx context.Context) (dead store.DeadRows) {
		GinkgoHelper()
		db.MustExecContext(ctx, "INSERT INTO outbox_events (event_type, event_context) SELECT 'a', '{}' FROM generate_series(1, 120000)")
		db.MustExecContext(ctx, "DELETE FROM outbox_events")
		Eventually(ctx, func() (int64, error) {
			var err error
			dead, err = s.DeadRows(ctx)
			return dead.Rows, err
		}).WithTimeout(time.Minute).Should(BeNumerically(">=", 100_000))
		return dead
	}
	pages := func(ctx context.Context) (pages int) {
		GinkgoHelper()
		Expect(db.GetContext(ctx, &pages, "SELECT pg_relation_size('outbox_events') / 8192")).To(Succeed())
		return pages
	}

	It("vacuums dead rows, so that their space is used again", func(ctx SpecContext) {
		db.MustExecContext(ctx, "ALTER TABLE outbox_events SET (autovacuum_enabled = false)")
		dead := deliver(ctx)
		Expect(dead.Due()).To(BeTrue())
		Expect(s.LeaseTasks(ctx, a, tasks)).To(ContainElement(store.TaskVacuum))
		Expect(s.Vacuum(ctx, a, dead, 0)).To(Succeed())
		Expect(s.TaskSuccesses(ctx)).To(HaveKey(store.TaskVacuum))
		Expect(s.DeadRows(ctx)).To(And(HaveField("Rows", BeNumerically("<", 1_000)), HaveField("Due()", BeFalse())))
		size := pages(ctx)
		Expect(size).To(BeNumerically(">", 1_000), "the table is not truncated")
		deliver(ctx)
		// VACUUM skips a page that another process uses at this moment. Without a vacuum, the
		// table would have twice as many pages.
		Expect(pages(ctx)).To(BeNumerically("~", size, size/20))
	})

	It("does not vacuum again while an old snapshot keeps the rows", func(ctx SpecContext) {
		db.MustExecContext(ctx, "ALTER TABLE outbox_events SET (autovacuum_enabled = false)")
		old := testengines.OpenPostgres(dsn, nil).MustBegin()
		defer func() { _ = old.Rollback() }()
		old.MustExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
		old.MustExecContext(ctx, "SELECT count(*) FROM outbox_events")
		dead := deliver(ctx)
		Expect(dead.HorizonSeconds).To(BeNumerically(">", 0))
		Expect(dead.UnseenHolder).To(BeEmpty())
		Expect(dead.Due()).To(BeTrue(), "no vacuum has failed yet")
		Expect(s.LeaseTasks(ctx, a, tasks)).To(ContainElement(store.TaskVacuum))
		Expect(s.Vacuum(ctx, a, dead, 0)).To(Succeed())
		Expect(s.DeadRows(ctx)).To(And(HaveField("Rows", BeNumerically(">=", 100_000)), HaveField("Due()", BeFalse())))

		Expect(old.Rollback()).To(Succeed())
		dead, err := s.DeadRows(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(dead.Due()).To(BeTrue())
		Expect(dead.HorizonSeconds).To(BeZero())
		Expect(s.LeaseTasks(ctx, b, []store.Task{store.TaskVacuum})).To(HaveLen(1))
		Expect(s.Vacuum(ctx, b, dead, 0)).To(Succeed())
		Expect(s.DeadRows(ctx)).To(HaveField("Rows", BeNumerically("<", 1_000)))
	})

	It("leaves the vacuum to autovacuum if the role may not, and names a snapshot that it may not see", func(ctx SpecContext) {
		role := fmt.Sprintf("tidy_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
		db.MustExecContext(ctx, "CREATE ROLE "+role)
		DeferCleanup(func(ctx SpecContext) {
			db.MustExecContext(ctx, "DROP OWNED BY "+role)
			db.MustExecContext(ctx, "DROP ROLE "+role)
		})
		db.MustExecContext(ctx, "GRANT SELECT ON outbox_events, outbox_housekeeping TO "+role)
		old := testengines.OpenPostgres(dsn, nil).MustBegin()
		defer func() { _ = old.Rollback() }()
		old.MustExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
		old.MustExecContext(ctx, "SELECT count(*) FROM outbox_events")
		settings := store.Session(time.Minute)
		settings["role"] = role
		dead, err := newStore(testengines.OpenStore(dsn, settings)).DeadRows(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(dead.MayVacuum).To(BeFalse())
		Expect(dead.UnseenHolder).NotTo(BeEmpty())
	})

	DescribeTable("deletes old rows", func(ctx SpecContext, insert, count string, del func(*store.Store, context.Context, time.Duration) (int64, error)) {
		db.MustExecContext(ctx, insert)
		Expect(del(s, ctx, 2*time.Hour)).To(Equal(int64(2_500)))
		var left int
		Expect(db.GetContext(ctx, &left, count)).To(Succeed())
		Expect(left).To(Equal(2))
	},
		Entry("of the audit table", `INSERT INTO outbox_audit (actor, action, at)
			SELECT 'alice', 'pause', now() - CASE WHEN n > 2 THEN interval '3 hours' ELSE interval '1 hour' END FROM generate_series(1, 2502) AS n`,
			"SELECT count(*) FROM outbox_audit", (*store.Store).DeleteAudit),
		Entry("of the dead letters", `INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
			environment, event_context, metadata_version, published_at, batch_id, token, error, dead_lettered_at)
			SELECT n, gen_random_uuid(), 'a', now(), 'Local', '{}', 1, now(), gen_random_uuid(), 't', 'why',
			now() - CASE WHEN n > 2 THEN interval '3 hours' ELSE interval '1 hour' END FROM generate_series(1, 2502) AS n`,
			"SELECT count(*) FROM outbox_dead_letters", (*store.Store).DeleteDeadLetters),
	)
})
