package store_test

import (
	"context"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("Poll", func() {
	var (
		db *sqlx.DB
		s  *store.Store
	)

	BeforeEach(func(ctx SpecContext) {
		db = newDatabase(ctx)
		s = newStore(db)
	})

	settle := func(ctx context.Context) {
		GinkgoHelper()
		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		Expect(lease.Settle(ctx)).To(Succeed())
	}

	// pass publishes and settles some events, so that the watermarks pass all earlier ids.
	pass := func(ctx context.Context) {
		GinkgoHelper()
		for range 3 {
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			db.MustExecContext(ctx, "UPDATE outbox_cursor SET next_low_watermark_at = 'epoch'")
			settle(ctx)
			Expect(s.Poll(ctx)).To(BeFalse())
		}
	}

	expectFound := func(ctx context.Context, events int) {
		GinkgoHelper()
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 0), "the low watermark hides it")
		Expect(s.Poll(ctx)).To(BeTrue())
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", events))
		settle(ctx)
	}

	It("finds a late commit of a transaction that was open during earlier polls", func(ctx SpecContext) {
		publisher := outbox.NewPublisher(outbox.PublisherOptions{})
		first, second := db.MustBegin(), db.MustBegin()
		Expect(publisher.Publish(ctx, first, complete(outbox.Event{}))).To(Succeed())
		pass(ctx)
		Expect(publisher.Publish(ctx, second, complete(outbox.Event{}))).To(Succeed())
		pass(ctx)
		Expect(first.Commit()).To(Succeed())
		expectFound(ctx, 1)
		pass(ctx)
		Expect(second.Commit()).To(Succeed())
		expectFound(ctx, 1)
	})

	It("finds a late commit of a transaction that no poll has seen", func(ctx SpecContext) {
		publishEvents(ctx, db, 1)
		Expect(s.Poll(ctx)).To(BeTrue())
		late := db.MustBegin()
		Expect(outbox.NewPublisher(outbox.PublisherOptions{}).Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
		Expect(late.Commit()).To(Succeed())
		db.MustExecContext(ctx, "UPDATE outbox_batches SET attempts = 1")
		db.MustExecContext(ctx, "UPDATE outbox_cursor SET low_watermark = high_watermark, next_low_watermark = high_watermark")
		expectFound(ctx, 1)
	})

	It("finds a late commit after polls of an idle outbox", func(ctx SpecContext) {
		pass(ctx)
		for range 2 {
			Expect(s.Poll(ctx)).To(BeFalse())
		}
		late := db.MustBegin()
		Expect(outbox.NewPublisher(outbox.PublisherOptions{}).Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		db.MustExecContext(ctx, "UPDATE outbox_cursor SET low_watermark = high_watermark, next_low_watermark = high_watermark")
		settle(ctx)
		Expect(late.Commit()).To(Succeed())
		expectFound(ctx, 1)
	})

	It("finds it again if it could not lower the low watermark", func(ctx SpecContext) {
		late := db.MustBegin()
		Expect(outbox.NewPublisher(outbox.PublisherOptions{}).Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
		pass(ctx)
		Expect(late.Commit()).To(Succeed())
		cutting := db.MustBegin()
		cutting.MustExecContext(ctx, "SELECT FROM outbox_cursor FOR UPDATE")
		Expect(s.Poll(ctx)).To(BeTrue())
		Expect(cutting.Rollback()).To(Succeed())
		expectFound(ctx, 1)
	})

	It("finds an event whose id was not drawn from the sequence", func(ctx SpecContext) {
		publishEvents(ctx, db, 20)
		for range 2 {
			Expect(s.Cut(ctx, 0)).To(HaveField("Batches", BeNumerically("<=", 2)))
		}
		db.MustExecContext(ctx, "DELETE FROM outbox_batches")
		db.MustExecContext(ctx, "DELETE FROM outbox_events")
		pass(ctx)
		db.MustExecContext(ctx, "INSERT INTO outbox_events (id, event_type, event_context) OVERRIDING SYSTEM VALUE VALUES (3, 'a', '{}')")
		expectFound(ctx, 1)
	})

	It("finds events after the table was emptied and its sequence restarted", func(ctx SpecContext) {
		pass(ctx)
		db.MustExecContext(ctx, "TRUNCATE outbox_events RESTART IDENTITY")
		publishEvents(ctx, db, 1)
		expectFound(ctx, 1)
	})

	It("finds events of a session that caches ids", func(ctx SpecContext) {
		db.MustExecContext(ctx, "ALTER SEQUENCE outbox_events_id_seq CACHE 10")
		session, err := db.Connx(ctx)
		Expect(err).NotTo(HaveOccurred())
		defer session.Close()
		insert := "INSERT INTO outbox_events (event_type, event_context) VALUES ('a', '{}')"
		_, err = session.ExecContext(ctx, insert)
		Expect(err).NotTo(HaveOccurred())
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		settle(ctx)
		pass(ctx)
		_, err = session.ExecContext(ctx, insert)
		Expect(err).NotTo(HaveOccurred())
		expectFound(ctx, 1)
	})

	It("limits a wait that was written before the clock was set back", func(ctx SpecContext) {
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		wait := func() (seconds float64) {
			GinkgoHelper()
			Expect(db.GetContext(ctx, &seconds, "SELECT extract(epoch FROM next_attempt_at - clock_timestamp()) FROM outbox_batches")).To(Succeed())
			return seconds
		}
		db.MustExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = clock_timestamp() + interval '20 s'")
		Expect(s.Poll(ctx)).To(BeTrue())
		Expect(wait()).To(And(BeNumerically(">", 0), BeNumerically("<=", 20)))
		db.MustExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = clock_timestamp() + interval '1 year'")
		Expect(s.Poll(ctx)).To(BeTrue())
		Expect(wait()).To(And(BeNumerically(">", 20), BeNumerically("<=", 35)))
	})

	It("does not wait for a leased batch to limit the waits", func(ctx SpecContext) {
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		defer lease.Release()
		longLimit := store.New(db, store.Options{MaxDelay: time.Nanosecond, FlushTimeout: time.Nanosecond})
		Expect(longLimit.Poll(ctx)).To(BeTrue())
	})
})

var _ = Describe("PostgreSQL's clock", func() {
	var (
		db *sqlx.DB
		s  *store.Store
	)

	BeforeEach(func(ctx SpecContext) {
		db = newDatabase(ctx)
		s = newStore(db)
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		db.MustExecContext(ctx, "UPDATE outbox_batches SET attempts = 1") // no batch waits for its first attempt
	})

	It("may be set back: one cut ignores the linger, and the next waits for it", func(ctx SpecContext) {
		db.MustExecContext(ctx, `UPDATE outbox_cursor SET last_cut_at = clock_timestamp() + interval '1 year',
			last_batch_at = clock_timestamp() + interval '1 year', next_low_watermark_at = clock_timestamp() + interval '1 year'`)
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, time.Hour)).To(HaveField("Events", 1))
		db.MustExecContext(ctx, "UPDATE outbox_batches SET attempts = 1")
		publishEvents(ctx, db, 1)
		waiting, err := s.Cut(ctx, time.Hour)
		Expect(err).NotTo(HaveOccurred())
		Expect(waiting.Batches).To(BeZero())
		Expect(waiting.Wait).To(And(BeNumerically(">", 0), BeNumerically("<=", time.Hour)))
		var ahead bool
		Expect(db.GetContext(ctx, &ahead, "SELECT next_low_watermark_at > clock_timestamp() FROM outbox_cursor")).To(Succeed())
		Expect(ahead).To(BeFalse())
	})

	It("may be set back: the batches keep their order", func(ctx SpecContext) {
		db.MustExecContext(ctx, "UPDATE outbox_cursor SET last_batch_at = clock_timestamp() + interval '1 year'")
		for range 3 {
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			db.MustExecContext(ctx, "UPDATE outbox_batches SET attempts = 1")
		}
		var ids []string
		Expect(db.SelectContext(ctx, &ids, "SELECT event_ids FROM outbox_batches ORDER BY batch_id")).To(Succeed())
		Expect(ids).To(Equal([]string{"{[1,2)}", "{[2,3)}", "{[3,4)}", "{[4,5)}"}))
	})

	It("may be set back: a poll finds batches that are cut later", func(ctx SpecContext) {
		db.MustExecContext(ctx, "UPDATE outbox_cursor SET last_batch_at = clock_timestamp() + interval '1 year'")
		db.MustExecContext(ctx, "DELETE FROM outbox_batches")
		db.MustExecContext(ctx, "DELETE FROM outbox_events")
		Expect(s.Poll(ctx)).To(BeFalse())
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		Expect(claimed(ctx, s)).To(BeTrue())
	})

	It("may be set back: no event has a negative age", func(ctx SpecContext) {
		db.MustExecContext(ctx, "DELETE FROM outbox_batches")
		db.MustExecContext(ctx, "DELETE FROM outbox_events")
		db.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context, published_at)
			VALUES ('a', '{}', clock_timestamp() + interval '1 hour')`)
		Expect(s.Stats(ctx)).To(HaveField("OldestSeconds", 0.0))
	})
})
