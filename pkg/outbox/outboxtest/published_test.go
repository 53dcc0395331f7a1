package outboxtest_test

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
)

const (
	traceparent      = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	otherTraceparent = "00-11111111111111111111111111111111-2222222222222222-00"
)

// pgxTx has the methods of a pgx.Tx.
type pgxTx struct{ tx *sql.Tx }

func (p pgxTx) QueryRow(ctx context.Context, query string, args ...any) *sql.Row {
	return p.tx.QueryRowContext(ctx, query, args...)
}

func (p pgxTx) Commit(context.Context) error { return p.tx.Commit() }

func newEvent(eventType string) outbox.Event {
	GinkgoHelper()
	event, err := outbox.NewEvent(outboxtest.JSON(`{"n": 1}`), outbox.WithType(eventType))
	Expect(err).NotTo(HaveOccurred())
	return event
}

var _ = Describe("Published", func() {
	var (
		db        *sqlx.DB
		publisher *outbox.Publisher
	)

	BeforeEach(func(ctx SpecContext) {
		db = testengines.OpenPostgres(suite.PostgresDSN(ctx), nil)
		publisher = outbox.NewPublisher(outbox.PublisherOptions{Environment: "Test"})
	})

	begin := func() *sqlx.Tx {
		GinkgoHelper()
		tx := db.MustBegin()
		DeferCleanup(func() { _ = tx.Rollback() }) // the transaction may have ended
		return tx
	}
	exec := func(tx *sqlx.Tx, statement string) {
		GinkgoHelper()
		_, err := tx.Exec(statement)
		Expect(err).NotTo(HaveOccurred())
	}
	publish := func(ctx context.Context, tx *sqlx.Tx, eventTypes ...string) {
		GinkgoHelper()
		for _, eventType := range eventTypes {
			Expect(publisher.Publish(ctx, tx, newEvent(eventType))).To(Succeed())
		}
	}
	published := func(ctx context.Context, tx *sqlx.Tx) []string {
		GinkgoHelper()
		events, err := outboxtest.Published(ctx, tx)
		Expect(err).NotTo(HaveOccurred())
		eventTypes := make([]string, len(events))
		for i, event := range events {
			eventTypes[i] = event.EventType
		}
		return eventTypes
	}

	DescribeTable("returns the events of the transaction as they were published",
		func(ctx SpecContext, published func(ctx context.Context, tx *sqlx.Tx) ([]outbox.Event, error)) {
			events := []outbox.Event{
				{
					EventID: uuid.New(), EventType: "order_placed", Environment: "Staging", MetadataVersion: 7,
					EventDateTime: time.Date(1900, 1, 1, 0, 0, 0, 1000, time.UTC),
					EventContext:  outboxtest.JSON(" { \"b\":1,\"a\" : [1.00, 1e3], \"b\":2, \"nul\":\"\\u0000\", \"quote\":\"\\\"\", \"emoji\":\"🧨\" }\n"),
					Traceparent:   outboxtest.Traceparent(traceparent),
				},
				{
					EventID: uuid.New(), EventType: "mail_sent", Environment: "Test", MetadataVersion: 0,
					EventDateTime: time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC), EventContext: outboxtest.JSON("null"),
				},
			}
			tx := begin()
			exec(tx, "SET LOCAL timezone = 'Asia/Kolkata'; SET LOCAL datestyle = 'German'")
			Expect(publisher.Publish(ctx, tx, events...)).To(Succeed())
			Expect(published(ctx, tx)).To(Equal(events))
		},
		Entry("from a *sqlx.Tx", func(ctx context.Context, tx *sqlx.Tx) ([]outbox.Event, error) {
			return outboxtest.Published(ctx, tx)
		}),
		Entry("from a *sql.Tx", func(ctx context.Context, tx *sqlx.Tx) ([]outbox.Event, error) {
			return outboxtest.Published(ctx, tx.Tx)
		}),
		Entry("from a type with the methods of a pgx.Tx", func(ctx context.Context, tx *sqlx.Tx) ([]outbox.Event, error) {
			return outboxtest.Published(ctx, outboxtest.Pgx(pgxTx{tx: tx.Tx}))
		}),
	)

	It("returns nothing if the transaction has not published", func(ctx SpecContext) {
		tx := begin()
		Expect(published(ctx, tx)).To(BeEmpty())
		exec(tx, "CREATE TABLE orders ()")
		Expect(published(ctx, tx)).To(BeEmpty())
	})

	It("leaves out the events of other transactions", func(ctx SpecContext) {
		before := begin()
		publish(ctx, before, "committed_before")
		Expect(before.Commit()).To(Succeed())

		tx, beside := begin(), begin()
		Expect(published(ctx, tx)).To(BeEmpty())
		publish(ctx, beside, "not_committed")
		publish(ctx, tx, "first")
		meanwhile := begin()
		publish(ctx, meanwhile, "committed_meanwhile")
		Expect(meanwhile.Commit()).To(Succeed())
		publish(ctx, tx, "second")
		Expect(published(ctx, tx)).To(Equal([]string{"first", "second"}))

		Expect(tx.Commit()).To(Succeed())
		Expect(published(ctx, begin())).To(BeEmpty())
		Expect(published(ctx, beside)).To(Equal([]string{"not_committed"}))
	})

	It("returns the events published within savepoints that were not rolled back", func(ctx SpecContext) {
		tx := begin()
		exec(tx, "SAVEPOINT released")
		publish(ctx, tx, "released")
		other := begin()
		publish(ctx, other, "committed_meanwhile")
		Expect(other.Commit()).To(Succeed())
		exec(tx, "SAVEPOINT nested")
		publish(ctx, tx, "nested")
		exec(tx, "RELEASE SAVEPOINT released; SAVEPOINT undone")
		publish(ctx, tx, "undone")
		exec(tx, "ROLLBACK TO SAVEPOINT undone")
		publish(ctx, tx, "after")
		exec(tx, "SAVEPOINT open")
		publish(ctx, tx, "open")
		Expect(published(ctx, tx)).To(Equal([]string{"released", "nested", "after", "open"}))
	})

	DescribeTable("finds the full id of a transaction",
		func(own, lowerBits, full int64) {
			var found int64
			Expect(db.Get(&found, outboxtest.FullXactID(own, lowerBits))).To(Succeed())
			Expect(found).To(Equal(full))
		},
		Entry("that is the current transaction", int64(5<<32+1000), int64(1000), int64(5<<32+1000)),
		Entry("that is later", int64(5<<32+1000), int64(1001), int64(5<<32+1001)),
		Entry("that is earlier", int64(5<<32+1000), int64(999), int64(5<<32+999)),
		Entry("that is earlier and in the previous epoch", int64(5<<32+1000), int64(1<<32-1), int64(5<<32-1)),
		Entry("that is later and in the next epoch", int64(5<<32-1), int64(3), int64(5<<32+3)),
		Entry("in the first epoch", int64(1000), int64(3), int64(3)),
		Entry("that would be before the first epoch", int64(1000), int64(1<<32-1), int64(0)),
	)

	It("reads from the schema of InSchema", func(ctx SpecContext) {
		const schema = `The "Shop"'s; DROP.Events 100%s?`
		db.MustExec("CREATE SCHEMA " + pq.QuoteIdentifier(schema))
		db.MustExec("ALTER TABLE outbox_events SET SCHEMA " + pq.QuoteIdentifier(schema))
		publisher = outbox.NewPublisher(outbox.PublisherOptions{Schema: schema})
		tx := begin()
		publish(ctx, tx, "first")
		events, err := outboxtest.Published(ctx, outboxtest.InSchema(tx, schema))
		Expect(err).NotTo(HaveOccurred())
		Expect(events).To(HaveLen(1))
		events, err = outboxtest.Published(ctx, outboxtest.InSchema(outboxtest.Pgx(pgxTx{tx: tx.Tx}), schema))
		Expect(err).NotTo(HaveOccurred())
		Expect(events).To(HaveLen(1))

		_, err = outboxtest.Published(ctx, tx)
		Expect(err).To(MatchError(ContainSubstring(`relation "outbox_events" does not exist`)))
	})

	It("refuses an invalid traceparent that satisfies the column's constraint", func(ctx SpecContext) {
		tx := begin()
		publish(ctx, tx, "first")
		exec(tx, fmt.Sprintf("INSERT INTO outbox_events (event_type, event_context, traceparent) VALUES ('by_sql', '1', 'ff%s')", traceparent[2:]))
		_, err := outboxtest.Published(ctx, tx)
		Expect(err).To(MatchError(And(ContainSubstring("event 1"), ContainSubstring("is not a W3C traceparent"))))
	})
})
