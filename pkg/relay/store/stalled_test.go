package store_test

import (
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("Waiting", func() {
	var (
		db *sqlx.DB
		s  *store.Store
	)

	BeforeEach(func(ctx SpecContext) {
		db = newDatabase(ctx)
		s = newStore(db)
	})

	It("is empty if the outbox is empty", func(ctx SpecContext) {
		waiting, err := s.Waiting(ctx, time.Minute)
		Expect(err).NotTo(HaveOccurred())
		Expect(waiting.Events).To(BeEmpty())
		Expect(waiting.Batches).To(BeEmpty())
	})

	It("has due batches in the order in which workers claim them", func(ctx SpecContext) {
		publishEvents(ctx, db, 40)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 4))
		db.MustExecContext(ctx, `UPDATE outbox_batches SET failures = 1, attempts = 1, last_error = 'why',
			last_attempt_at = now() - make_interval(secs => row) FROM (
				SELECT batch_id AS id, row_number() OVER (ORDER BY batch_id) AS row FROM outbox_batches
			) AS numbered WHERE batch_id = id AND row > 1`)
		waiting, err := s.Waiting(ctx, time.Minute)
		Expect(err).NotTo(HaveOccurred())
		Expect(waiting.Batches).To(HaveLen(4))
		Expect([]int{waiting.Unattempted, waiting.Delivering, waiting.Failing, waiting.Starving}).To(Equal([]int{1, 1, 3, 0}))
		Expect(waiting.Batches[0].Failures).To(BeZero())
		Expect(waiting.Batches[1].LastError).To(Equal("why"))
		var failing []string
		Expect(db.SelectContext(ctx, &failing, "SELECT batch_id FROM outbox_batches WHERE failures > 0 ORDER BY last_attempt_at")).To(Succeed())
		for i, id := range failing {
			Expect(waiting.Batches[1+i].ID.String()).To(Equal(id))
		}
		db.MustExecContext(ctx, "DELETE FROM outbox_batches WHERE failures = 0")
		for _, id := range failing {
			lease, err := s.Claim(ctx, anyBytes, true)
			Expect(err).NotTo(HaveOccurred())
			Expect(lease.ID.String()).To(Equal(id))
			DeferCleanup(lease.Release)
		}
	})

	It("leaves out batches that wait as planned, and counts batches that wait too long for their turn", func(ctx SpecContext) {
		s = store.New(db, store.Options{MaxRows: 10, FlushTimeout: time.Minute, MaxDelay: 10 * time.Minute})
		publishEvents(ctx, db, 40)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 4))
		db.MustExecContext(ctx, `UPDATE outbox_batches SET failures = 1, attempts = 1, created_at = now() - interval '1 hour',
			last_attempt_at = now() - interval '1 hour', quarantined = row = 3,
			next_attempt_at = CASE row WHEN 1 THEN now() + interval '9 minutes' WHEN 2 THEN now() + interval '11 minutes'
			                           WHEN 3 THEN now() + interval '59 minutes' ELSE '-infinity' END
			FROM (SELECT batch_id AS id, row_number() OVER (ORDER BY batch_id) AS row FROM outbox_batches) AS numbered
			WHERE batch_id = id`)
		waiting, err := s.Waiting(ctx, time.Minute)
		Expect(err).NotTo(HaveOccurred())
		Expect(waiting.Batches).To(HaveExactElements(
			HaveField("Delay", BeNumerically("~", 11*time.Minute, time.Minute)), HaveField("Delay", BeZero())))
		Expect([]int{waiting.Failing, waiting.Quarantined, waiting.Starving}).To(Equal([]int{4, 1, 1}))

		db.MustExecContext(ctx, "UPDATE outbox_history SET flush_timeout = interval '15 minutes'") // of another relay
		Expect(s.Waiting(ctx, time.Minute)).To(HaveField("Batches", HaveLen(1)))
	})
})
