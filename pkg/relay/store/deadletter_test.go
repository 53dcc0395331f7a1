package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

func batchCount(stats store.Stats) int64 { return stats.BatchCount() }

var _ = Describe("Dead letters", func() {
	var (
		dsn string
		db  *sqlx.DB
		s   *store.Store
	)

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		db = testengines.OpenPostgres(dsn, store.Session(30*time.Second))
		s = store.New(db, store.Options{MaxRows: 1000})
	})

	// deadLetterWaiting makes dead letters of all events that wait, and returns the id
	// of their batch.
	deadLetterWaiting := func(ctx context.Context, cause string) uuid.UUID {
		GinkgoHelper()
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		keys, err := lease.Keys(ctx)
		Expect(err).NotTo(HaveOccurred())
		var outcome store.Outcome
		for _, id := range keys.ID {
			outcome.Refused = append(outcome.Refused, store.Refused{ID: id, Cause: errors.New(cause)})
		}
		Expect(lease.Shrink(ctx, outcome, nil)).To(Succeed())
		return lease.ID
	}

	deadLetter := func(ctx context.Context, cause string, events ...outbox.Event) uuid.UUID {
		GinkgoHelper()
		publish(ctx, db, outbox.NewPublisher(outbox.PublisherOptions{}), events...)
		return deadLetterWaiting(ctx, cause)
	}

	// all collects the ids of all letters that were changed.
	all := func(changes iter.Seq2[[]store.DeadLetterKey, error]) (ids []int64, err error) {
		for letters, err := range changes {
			if err != nil {
				return ids, err
			}
			for _, letter := range letters {
				ids = append(ids, letter.ID)
			}
		}
		return ids, nil
	}

	ids := func(ctx context.Context, filter store.DeadLetterFilter) []int64 {
		GinkgoHelper()
		found, err := s.DeadLetterIDs(ctx, filter)
		Expect(err).NotTo(HaveOccurred())
		return found
	}

	count := func(table string) (rows int) {
		GinkgoHelper()
		Expect(db.Get(&rows, "SELECT count(*) FROM "+table)).To(Succeed())
		return rows
	}

	It("are listed page by page, the newest first, with the number of letters that follow", func(ctx SpecContext) {
		deadLetter(ctx, "why", make([]outbox.Event, 7)...)
		var seen []int64
		var mores []int
		for before := int64(0); ; before = seen[len(seen)-1] {
			letters, more, err := s.DeadLetters(ctx, store.DeadLetterFilter{Before: before}, 3)
			Expect(err).NotTo(HaveOccurred())
			for _, letter := range letters {
				seen = append(seen, letter.ID)
			}
			mores = append(mores, more)
			if more == 0 {
				break
			}
		}
		Expect(seen).To(Equal([]int64{7, 6, 5, 4, 3, 2, 1}))
		Expect(mores).To(Equal([]int{4, 1, 0}))
	})

	It("are shown with all published fields and the error", func(ctx SpecContext) {
		event := complete(outbox.Event{
			EventType: "first_thing", EventContext: outboxtest.JSON(`{"a" : 1.10, "a":2}`), Environment: "Production",
			MetadataVersion: 3, Traceparent: outboxtest.Traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
		})
		batch := deadLetter(ctx, "the year 2500", event)
		letter, err := s.DeadLetter(ctx, 1)
		Expect(err).NotTo(HaveOccurred())
		Expect(letter.DeadLetteredAt).To(BeTemporally(">=", letter.PublishedAt))
		Expect(letter.DeadLetteredAt.Location()).To(Equal(time.UTC))
		letter.DeadLetteredAt, letter.PublishedAt = time.Time{}, time.Time{}
		Expect(letter).To(Equal(store.DeadLetter{
			DeadLetterKey: store.DeadLetterKey{ID: 1, EventType: "first_thing", EventID: event.EventID},
			Error:         "the year 2500", BatchID: batch, OutboxEventID: 1, EventDateTime: event.EventDateTime,
			Environment: "Production", MetadataVersion: 3, Traceparent: event.Traceparent.String(), EventContext: json.RawMessage(event.EventContext.String()),
		}))

		listed, _, err := s.DeadLetters(ctx, store.DeadLetterFilter{}, 10)
		Expect(err).NotTo(HaveOccurred())
		Expect(listed).To(HaveLen(1))
		Expect(listed[0].EventContext).To(BeNil(), "a list has no payloads")

		_, err = s.DeadLetter(ctx, 2)
		Expect(err).To(MatchError(store.ErrNoDeadLetter))
	})

	It("are selected by each filter, and by all filters together", func(ctx SpecContext) {
		one, two := uuid.New(), uuid.New()
		first := deadLetter(ctx, "100% wrong", outbox.Event{EventID: one, EventType: "a_thing", Environment: "Production"})
		second := deadLetter(ctx, "out of range", outbox.Event{EventID: two, EventType: "b_thing", Environment: "Production"},
			outbox.Event{EventType: "a_thing", Environment: "Staging"})
		var died time.Time
		Expect(db.Get(&died, "SELECT dead_lettered_at FROM outbox_dead_letters WHERE id = 2")).To(Succeed())

		for _, expected := range []struct {
			filter store.DeadLetterFilter
			ids    []int64
		}{
			{store.DeadLetterFilter{}, []int64{1, 2, 3}},
			{store.DeadLetterFilter{EventType: "a_thing"}, []int64{1, 3}},
			{store.DeadLetterFilter{Environment: "Production"}, []int64{1, 2}},
			{store.DeadLetterFilter{EventIDs: []uuid.UUID{one, two, uuid.New()}}, []int64{1, 2}},
			{store.DeadLetterFilter{BatchID: first}, []int64{1}},
			{store.DeadLetterFilter{BatchID: second}, []int64{2, 3}},
			{store.DeadLetterFilter{Since: died}, []int64{2, 3}},
			{store.DeadLetterFilter{Until: died}, []int64{1}},
			{store.DeadLetterFilter{Error: "0% w"}, []int64{1}},
			{store.DeadLetterFilter{Error: "%"}, []int64{1}},
			{store.DeadLetterFilter{Error: "nowhere"}, nil},
			{store.DeadLetterFilter{IDs: []int64{3, 1, 99}}, []int64{1, 3}},
			{store.DeadLetterFilter{IDs: []int64{}}, nil},
			{store.DeadLetterFilter{EventIDs: []uuid.UUID{}}, nil},
			{store.DeadLetterFilter{Before: 3}, []int64{1, 2}},
			{store.DeadLetterFilter{EventType: "a_thing", Environment: "Production", Since: died}, nil},
			{store.DeadLetterFilter{EventType: "a_thing", Environment: "Staging", BatchID: second, Error: "range"}, []int64{3}},
		} {
			Expect(ids(ctx, expected.filter)).To(Equal(expected.ids), "%+v", expected.filter)
		}
	})

	It("are requeued with every column as it was", func(ctx SpecContext) {
		large := `{"b" : 1,	"a":1.000000000000000000001, "b": "\u0000ü` + strings.Repeat("x", 100_000) + "\" }"
		publish(ctx, db, outbox.NewPublisher(outbox.PublisherOptions{}), outbox.Event{
			EventContext: outboxtest.JSON(large), Environment: "Production", MetadataVersion: 1 << 62,
			EventDateTime: time.Date(1900, 1, 1, 0, 0, 0, 1000, time.UTC),
			Traceparent:   outboxtest.Traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
		}, outbox.Event{})
		const columns = `SELECT event_id::text || event_type || event_date_time || environment || md5(event_context::text)
			|| metadata_version || coalesce(traceparent, 'null') || published_at || context_bytes FROM outbox_events ORDER BY id`
		var before, after []string
		Expect(db.Select(&before, columns)).To(Succeed())
		deadLetterWaiting(ctx, "why")
		Expect(count("outbox_events")).To(BeZero())

		Expect(all(s.RequeueDeadLetters(ctx, []int64{1, 2}))).To(Equal([]int64{1, 2}))
		Expect(db.Select(&after, columns)).To(Succeed())
		Expect(after).To(Equal(before))
		Expect(after).To(HaveLen(2))
		Expect(count("outbox_dead_letters")).To(BeZero())
		var outboxIDs []int64
		Expect(db.Select(&outboxIDs, "SELECT id FROM outbox_events ORDER BY id")).To(Succeed())
		Expect(outboxIDs).To(Equal([]int64{3, 4}), "new ids, above every cut")
	})

	It("wake the relays when they are requeued, after the commit", func(ctx SpecContext) {
		deadLetter(ctx, "why", outbox.Event{})
		wake, err := postgres.Listen(ctx, postgres.ListenOptions{
			DSN: dsn, Channels: []string{store.BatchesChannel, outbox.Channel}, Log: slog.New(slog.DiscardHandler),
		})
		Expect(err).NotTo(HaveOccurred())
		for _, channel := range wake {
			Eventually(ctx, channel).WithTimeout(time.Minute).Should(Receive(), "it listens")
		}
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1}))).To(HaveLen(1))
		for _, channel := range wake {
			Eventually(ctx, channel).WithTimeout(time.Minute).Should(Receive())
		}
	})

	It("are requeued once each by concurrent calls", func(ctx SpecContext) {
		const letters = 950
		deadLetter(ctx, "why", make([]outbox.Event, letters)...)
		everything := ids(ctx, store.DeadLetterFilter{})
		backwards := slices.Clone(everything)
		slices.Reverse(backwards)
		requeued := make([][]int64, 4)
		var group sync.WaitGroup
		for i := range requeued {
			group.Go(func() {
				defer GinkgoRecover()
				var err error
				requeued[i], err = all(s.RequeueDeadLetters(ctx, [][]int64{everything, backwards}[i%2]))
				Expect(err).NotTo(HaveOccurred())
			})
		}
		group.Wait()
		union := slices.Concat(requeued...)
		slices.Sort(union)
		slices.Sort(everything)
		Expect(union).To(Equal(everything))
		var distinct int
		Expect(db.Get(&distinct, "SELECT count(DISTINCT event_id) FROM outbox_events")).To(Succeed())
		Expect(distinct).To(Equal(letters))
		Expect(count("outbox_events")).To(Equal(letters))
		Expect(count("outbox_dead_letters")).To(BeZero())
	})

	It("are requeued in transactions that succeed or fail as a unit", func(ctx SpecContext) {
		events := make([]outbox.Event, 250)
		events[170].EventType = "refused"
		deadLetter(ctx, "why", events...)
		db.MustExec("ALTER TABLE outbox_events ADD CONSTRAINT halfway CHECK (event_type != 'refused')")

		requeued, err := all(s.RequeueDeadLetters(ctx, ids(ctx, store.DeadLetterFilter{})))
		Expect(err).To(MatchError(ContainSubstring("halfway")))
		Expect(requeued).To(HaveLen(100), "the letters of the first transaction")
		Expect(count("outbox_events")).To(Equal(100))
		Expect(count("outbox_dead_letters")).To(Equal(150))

		db.MustExec("ALTER TABLE outbox_events DROP CONSTRAINT halfway")
		Expect(all(s.RequeueDeadLetters(ctx, ids(ctx, store.DeadLetterFilter{})))).To(HaveLen(150))
		var distinct int
		Expect(db.Get(&distinct, "SELECT count(DISTINCT event_id) FROM outbox_events")).To(Succeed())
		Expect(distinct).To(Equal(250))
		Expect(count("outbox_events")).To(Equal(250))
	})

	// batchRow is a row of outbox_batches.
	type batchRow struct {
		ID          uuid.UUID `db:"batch_id"`
		Token       string    `db:"token"`
		Destination *string   `db:"destination"`
		Events      int       `db:"event_count"`
		Bytes       int64     `db:"byte_count"`
		Attempts    int       `db:"attempts"`
		Due         bool      `db:"due"`
	}
	batches := func() (rows []batchRow) {
		GinkgoHelper()
		Expect(db.Select(&rows, `SELECT batch_id, token, destination, event_count, byte_count, attempts,
			next_attempt_at <= clock_timestamp() AS due FROM outbox_batches ORDER BY batch_id`)).To(Succeed())
		return rows
	}

	It("are requeued under the tokens of their batches, due at once, and are resolved before an insert", func(ctx SpecContext) {
		s.SetDestination("here")
		first := deadLetter(ctx, "why", make([]outbox.Event, 2)...)
		second := deadLetter(ctx, "why", make([]outbox.Event, 2)...)
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1, 3, 4}))).To(HaveLen(3))
		requeued := batches()
		Expect(requeued).To(HaveExactElements(
			And(HaveField("Token", first.String()), HaveField("Events", 1)),
			And(HaveField("Token", second.String()), HaveField("Events", 2))))
		for _, batch := range requeued {
			Expect(batch.Attempts).To(Equal(1))
			Expect(batch.Due).To(BeTrue())
			Expect(batch.Destination).To(HaveValue(Equal("here")))
			Expect(batch.ID.String()).NotTo(Equal(batch.Token))
		}
		Expect(all(s.RequeueDeadLetters(ctx, []int64{2}))).To(HaveLen(1), "the token has a batch already")
		Expect(batches()).To(HaveExactElements(append([]any{requeued[0], requeued[1]}, HaveField("Token", first.String()))...))

		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		defer lease.Release()
		Expect(lease.Attempts).To(Equal(2), "the attempt is not the first")
		Expect(lease.TokenAge()).To(BeNumerically(">=", 0))
		var events store.Events
		Expect(lease.Read(ctx, &events)).To(Succeed())
		Expect(events.ID).To(Equal([]int64{5}))
	})

	It("are requeued in batches within the limits", func(ctx SpecContext) {
		large := outbox.Event{EventContext: outboxtest.JSON(`"` + strings.Repeat("x", 20_000) + `"`)}
		token := deadLetter(ctx, "why", outbox.Event{}, outbox.Event{}, outbox.Event{}, outbox.Event{}, large, outbox.Event{})
		small := store.New(db, store.Options{MaxRows: 3, MaxBytes: 10_000})
		Expect(all(small.RequeueDeadLetters(ctx, []int64{6, 5, 4, 3, 2, 1}))).To(Equal([]int64{1, 2, 3, 4, 5, 6}))
		var events []int
		for _, batch := range batches() {
			Expect(batch.Token).To(Equal(token.String()))
			events = append(events, batch.Events)
		}
		Expect(events).To(Equal([]int{3, 1, 1, 1}))
		Expect(batches()[0].Bytes).To(Equal(int64(3 * 130)))
	})

	It("are requeued for the destination of their batch", func(ctx SpecContext) {
		s.SetDestination("there")
		deadLetter(ctx, "why", outbox.Event{})
		s.SetDestination("here")
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1}))).To(HaveLen(1))
		Expect(claimed(ctx, s)).To(BeFalse(), "only the other destination shows whether the event is present")
		Expect(s.CheckElsewhere(ctx)).To(MatchError(ContainSubstring("UPDATE outbox_batches SET destination = NULL WHERE destination = 'there'")))
		s.SetDestination("there")
		Expect(claimed(ctx, s)).To(BeTrue())
	})

	It("are claimed by a relay that has polled before they are requeued", func(ctx SpecContext) {
		deadLetter(ctx, "why", outbox.Event{})
		db.MustExec("UPDATE outbox_cursor SET last_batch_at = clock_timestamp() + interval '1 hour'") // the clock was set back
		Expect(s.Poll(ctx)).To(BeFalse())
		Expect(all(store.New(db, store.Options{}).RequeueDeadLetters(ctx, []int64{1}))).To(HaveLen(1))
		Expect(claimed(ctx, s)).To(BeTrue())
	})

	// requeueDuring requeues the first dead letter while a relay executes a statement. It
	// waits until the requeue waits for the relay's transaction, and then commits it.
	requeueDuring := func(ctx context.Context, statement string) {
		GinkgoHelper()
		relay := db.MustBegin()
		defer func() { _ = relay.Rollback() }()
		relay.MustExec(statement)
		requeued := make(chan error, 1)
		go func() {
			_, err := all(s.RequeueDeadLetters(ctx, []int64{1}))
			requeued <- err
		}()
		awaitLock(ctx, db)
		Expect(relay.Commit()).To(Succeed())
		Eventually(ctx, requeued).WithTimeout(time.Minute).Should(Receive(BeNil()))
	}

	It("wait for a cut, and get a younger batch", func(ctx SpecContext) {
		deadLetter(ctx, "why", outbox.Event{})
		requeueDuring(ctx, "UPDATE outbox_cursor SET cuts = cuts + 1, last_batch_at = clock_timestamp() + interval '1 hour'")
		seconds, _ := batches()[0].ID.Time().UnixTime()
		Expect(time.Unix(seconds, 0)).To(BeTemporally(">", time.Now().Add(50*time.Minute)))
	})

	It("are not cut again while they wait, and are counted once", func(ctx SpecContext) {
		deadLetter(ctx, "why", make([]outbox.Event, 3)...)
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1, 2, 3}))).To(HaveLen(3))
		publish(ctx, db, outbox.NewPublisher(outbox.PublisherOptions{}), outbox.Event{}, outbox.Event{})
		Expect(s.Stats(ctx)).To(And(HaveField("BacklogEvents", int64(5)), WithTransform(batchCount, Equal(int64(1)))))
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
		Expect(s.Stats(ctx)).To(And(HaveField("BacklogEvents", int64(5)), WithTransform(batchCount, Equal(int64(2)))))
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 0))
		Expect(s.Poll(ctx)).To(BeTrue())
		var low, high int64
		Expect(db.QueryRow("SELECT low_watermark, high_watermark FROM outbox_cursor").Scan(&low, &high)).To(Succeed())
		Expect(high).To(Equal(int64(8)))
		Expect(low).To(BeNumerically("<=", int64(3)))
	})

	It("stay dead letters while many batches wait", func(ctx SpecContext) {
		deadLetter(ctx, "why", outbox.Event{})
		fill := func(batches int) {
			db.MustExec(`INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token, failures)
				SELECT gen_random_uuid(), int8multirange(int8range(n, n + 1)), 1, 1, n::text, 1 FROM generate_series(1000, 999 + $1) AS n`, batches)
		}
		fill(1024)
		_, err := all(s.RequeueDeadLetters(ctx, []int64{1}))
		Expect(err).To(MatchError(ContainSubstring("1024 batches wait already")))
		Expect(count("outbox_dead_letters")).To(Equal(1))
		Expect(count("outbox_events")).To(BeZero())
		db.MustExec("DELETE FROM outbox_batches")
		fill(1023)
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1}))).To(HaveLen(1))
	})

	It("are requeued if the cursor is missing", func(ctx SpecContext) {
		deadLetter(ctx, "why", outbox.Event{})
		db.MustExec("DELETE FROM outbox_cursor")
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1}))).To(HaveLen(1))
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 0), "it writes the cursor again")
		Expect(claimed(ctx, s)).To(BeTrue())
	})

	It("do not hide from the first cut that another outbox has filled the tables", func(ctx SpecContext) {
		db.MustExec(`INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
			environment, event_context, metadata_version, published_at, batch_id, token, error)
			VALUES (1, gen_random_uuid(), 'a', now(), 'Test', '{}', 1, now(), gen_random_uuid(), 'of the batch', 'why')`)
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1}))).To(HaveLen(1))
		_, err := s.Cut(ctx, 0)
		Expect(err).To(MatchError(store.ErrHistoryChanged))
	})

	It("wait if PostgreSQL's history has changed in the meantime, because they may have been requeued before", func(ctx SpecContext) {
		deadLetter(ctx, "before", outbox.Event{})
		db.MustExec("UPDATE outbox_history SET timeline = '00000000'")
		_, err := s.Cut(ctx, 0)
		Expect(err).To(MatchError(store.ErrHistoryChanged))
		deadLetter(ctx, "after", outbox.Event{})

		Expect(all(s.RequeueDeadLetters(ctx, []int64{2}))).To(HaveLen(1))
		Expect(batches()).To(HaveExactElements(HaveField("Due", true)), "it was published in this history")
		Expect(all(s.RequeueDeadLetters(ctx, []int64{1}))).To(HaveLen(1))
		Expect(batches()).To(HaveExactElements(HaveField("Due", true), HaveField("Due", false)),
			"an insert of the lost history may still be in flight")
		publish(ctx, db, outbox.NewPublisher(outbox.PublisherOptions{}), outbox.Event{})
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
		Expect(batches()[2]).To(And(HaveField("Attempts", 0), HaveField("Due", true)), "other events are verified")
	})

	It("wait until a relay has recorded a change of history", func(ctx SpecContext) {
		deadLetter(ctx, "before", outbox.Event{})
		requeueDuring(ctx, "UPDATE outbox_history SET unverified_to = 1, recorded_by = pg_current_xact_id()::xid")
		Expect(batches()).To(HaveExactElements(And(HaveField("Attempts", 1), HaveField("Due", false))))
	})

	It("are deleted when they are discarded, and other dead letters stay", func(ctx SpecContext) {
		deadLetter(ctx, "why", make([]outbox.Event, 150)...)
		everything := ids(ctx, store.DeadLetterFilter{})
		Expect(all(s.DiscardDeadLetters(ctx, append(slices.Clone(everything[:120]), 999)))).To(Equal(everything[:120]))
		Expect(ids(ctx, store.DeadLetterFilter{})).To(Equal(everything[120:]))
		Expect(count("outbox_events")).To(BeZero())
		Expect(all(s.DiscardDeadLetters(ctx, everything[:120]))).To(BeEmpty())
	})

	It("are counted up to 10,000", func(ctx SpecContext) {
		deadLetter(ctx, "why", outbox.Event{})
		more := func(letters int) {
			db.MustExec(`INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
				environment, event_context, metadata_version, published_at, batch_id, token, error)
				SELECT outbox_event_id, event_id, event_type, event_date_time, environment, event_context, metadata_version,
				published_at, batch_id, token, error FROM outbox_dead_letters, generate_series(1, $1) WHERE id = 1`, letters)
		}
		more(9_998)
		Expect(s.Stats(ctx)).To(HaveField("DeadLetters", int64(9_999)))
		more(100)
		Expect(s.Stats(ctx)).To(HaveField("DeadLetters", int64(10_000)))
	})
})

// awaitLock waits until a session waits for a lock.
func awaitLock(ctx context.Context, db *sqlx.DB) {
	GinkgoHelper()
	Eventually(ctx, func(g Gomega) {
		var waiting int
		g.Expect(db.GetContext(ctx, &waiting, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`)).To(Succeed())
		g.Expect(waiting).To(Equal(1))
	}).WithTimeout(time.Minute).Should(Succeed())
}
