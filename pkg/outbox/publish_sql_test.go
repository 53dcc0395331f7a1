package outbox_test

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// A publisher in another language uses SQL only, so these specs also use SQL only.
var _ = Describe("Publishing by SQL", func() {
	var db *sqlx.DB

	BeforeEach(func(ctx SpecContext) { db = newDatabase(ctx) })

	rows := func() (all []storedEvent) {
		GinkgoHelper()
		Expect(db.Select(&all, `SELECT event_id, event_type, event_date_time, environment, event_context,
			metadata_version, traceparent, published_at FROM outbox_events ORDER BY id`)).To(Succeed())
		return all
	}

	refusal := func(err error) (constraint, message string) {
		GinkgoHelper()
		server, ok := errors.AsType[*pq.Error](err)
		Expect(ok).To(BeTrue(), "%v", err)
		return server.Constraint, server.Message
	}

	// ways are the statements that publish an event with only a type and a context.
	ways := []TableEntry{
		Entry("by the statement",
			`INSERT INTO outbox_events (event_type, event_context) VALUES ('order_placed', '{ "order_id":42}')`),
		Entry("by the function",
			`SELECT diehard_publish('order_placed', '{ "order_id":42}')`),
		Entry("by the function, with NULL for the other parameters",
			`SELECT diehard_publish('order_placed', '{ "order_id":42}', event_date_time => NULL, environment => NULL,
				metadata_version => NULL, traceparent => NULL, event_id => NULL)`),
	}

	DescribeTable("gives omitted columns their defaults",
		func(statement string) {
			var before, after time.Time
			Expect(db.Get(&before, "SELECT clock_timestamp()")).To(Succeed())
			db.MustExec(statement)
			db.MustExec(statement)
			Expect(db.Get(&after, "SELECT clock_timestamp()")).To(Succeed())

			published := rows()
			Expect(published).To(HaveLen(2))
			Expect(published[0].EventID).NotTo(Equal(published[1].EventID))
			for _, event := range published {
				Expect(event.EventID.Version()).To(Equal(uuid.Version(4)))
				Expect(event.EventType).To(Equal("order_placed"))
				Expect(event.EventContext).To(Equal(`{ "order_id":42}`))
				for _, t := range []time.Time{event.EventDateTime, event.PublishedAt} {
					Expect(t).To(And(BeTemporally(">=", before), BeTemporally("<=", after)))
				}
				Expect(event.Environment).To(Equal("Local"))
				Expect(event.MetadataVersion).To(Equal(int64(1)))
				Expect(event.Traceparent.Valid).To(BeFalse())
			}
		},
		ways,
	)

	DescribeTable("gives the event the environment that the deployment has set",
		func(statement string) {
			db.MustExec("ALTER TABLE outbox_events ALTER COLUMN environment SET DEFAULT 'Production'")
			db.MustExec(statement)
			Expect(rows()).To(ConsistOf(HaveField("Environment", "Production")))
		},
		ways,
	)

	DescribeTable("publishes nothing if the transaction is rolled back",
		func(statement string) {
			tx := db.MustBegin()
			tx.MustExec(statement)
			Expect(tx.Rollback()).To(Succeed())
			Expect(rows()).To(BeEmpty())
		},
		ways,
	)

	DescribeTable("takes every column from the caller, and the function returns the event's id",
		func(call string) {
			var id uuid.UUID
			Expect(db.Get(&id, call)).To(Succeed())
			Expect(id.String()).To(Equal("0199f2a1-6f0b-7c3e-8a51-2d1f0c9b7e64"))
			published := rows()
			Expect(published).To(HaveLen(1))
			event := published[0]
			Expect(event.EventID).To(Equal(id))
			Expect(event.EventType).To(Equal("order_placed"))
			Expect(event.EventContext).To(Equal("{ \"b\" : 1.00,\"a\":\"\\u0000\", \"b\":2 }"))
			Expect(event.EventDateTime).To(BeTemporally("==", time.Date(2026, 1, 2, 3, 4, 5, 123_456_000, time.UTC)))
			Expect(event.Environment).To(Equal("Staging"))
			Expect(event.MetadataVersion).To(Equal(int64(7)))
			Expect(event.Traceparent.String).To(Equal(traceparent))
		},
		Entry("in their order", `SELECT diehard_publish('order_placed', '{ "b" : 1.00,"a":"\u0000", "b":2 }',
			'2026-01-02 03:04:05.123456Z', 'Staging', 7, '`+traceparent+`', '0199f2a1-6f0b-7c3e-8a51-2d1f0c9b7e64')`),
		Entry("by their names", `SELECT diehard_publish(event_type => 'order_placed',
			event_id => '0199f2a1-6f0b-7c3e-8a51-2d1f0c9b7e64', traceparent => '`+traceparent+`', metadata_version => 7,
			environment => 'Staging', event_date_time => '2026-01-02 05:04:05.123456+02',
			event_context => '{ "b" : 1.00,"a":"\u0000", "b":2 }')`),
	)

	It("returns the id that the function has made", func() {
		var id uuid.UUID
		Expect(db.Get(&id, `SELECT diehard_publish('order_placed', '{}')`)).To(Succeed())
		Expect(rows()).To(ConsistOf(HaveField("EventID", id)))
	})

	It("publishes an event for each row of a query", func() {
		db.MustExec(`SELECT diehard_publish('order_placed', json_build_object('order_id', n)) FROM generate_series(1, 3) AS n`)
		Expect(rows()).To(HaveExactElements(
			HaveField("EventContext", `{"order_id" : 1}`),
			HaveField("EventContext", `{"order_id" : 2}`),
			HaveField("EventContext", `{"order_id" : 3}`),
		))
	})

	insert := func(e sqlEvent) error {
		_, err := db.Exec(fmt.Sprintf(`INSERT INTO outbox_events
			(event_type, event_context, event_date_time, environment, metadata_version, traceparent, event_id)
			VALUES (%s, %s, %s, %s, %s, %s, %s)`, e.expressions()...))
		return err
	}
	call := func(e sqlEvent) error {
		_, err := db.Exec(fmt.Sprintf("SELECT diehard_publish(%s, %s, %s, %s, %s, %s, %s)", e.expressions()...))
		return err
	}

	DescribeTable("refuses values that violate a constraint, and names the constraint",
		func(constraint string, bad sqlEvent) {
			for _, publish := range []func(sqlEvent) error{insert, call} {
				broken, message := refusal(publish(bad))
				Expect(broken).To(Equal(constraint))
				Expect(message).To(Equal(fmt.Sprintf(
					`new row for relation "outbox_events" violates check constraint %q`, constraint)))
			}
			Expect(rows()).To(BeEmpty())
		},
		Entry("an empty type", "event_type_is_snake_case", sqlEvent{eventType: `''`}),
		Entry("a type in camel case", "event_type_is_snake_case", sqlEvent{eventType: `'OrderPlaced'`}),
		Entry("a type with a line end", "event_type_is_snake_case", sqlEvent{eventType: `E'order_placed\n'`}),
		Entry("a type that begins with a digit", "event_type_is_snake_case", sqlEvent{eventType: `'1_order'`}),
		Entry("a long type", "event_type_is_snake_case", sqlEvent{eventType: `repeat('a', 129)`}),
		Entry("a time before year 1", "event_date_time_is_in_years_1_to_9999", sqlEvent{eventDateTime: `'0001-12-31 23:59:59Z BC'`}),
		Entry("a time after year 9999", "event_date_time_is_in_years_1_to_9999", sqlEvent{eventDateTime: `'10000-01-01 00:00:00Z'`}),
		Entry("the time infinity", "event_date_time_is_in_years_1_to_9999", sqlEvent{eventDateTime: `'infinity'`}),
		Entry("an empty environment", "environment_is_short", sqlEvent{environment: `''`}),
		Entry("a long environment", "environment_is_short", sqlEvent{environment: `repeat('ü', 65)`}),
		Entry("a negative version", "metadata_version_is_not_negative", sqlEvent{metadataVersion: `-1`}),
		Entry("an empty traceparent", "traceparent_is_w3c", sqlEvent{traceparent: `''`}),
		Entry("a traceparent in capitals", "traceparent_is_w3c", sqlEvent{traceparent: `upper('` + traceparent + `')`}),
		Entry("a traceparent with a line end", "traceparent_is_w3c", sqlEvent{traceparent: `E'` + traceparent + `\n'`}),
		Entry("a traceparent with a hyphen in the wrong place", "traceparent_is_w3c", sqlEvent{traceparent: `overlay('` + traceparent + `' PLACING '0-' FROM 3)`}),
		Entry("a traceparent with an additional hyphen", "traceparent_is_w3c", sqlEvent{traceparent: `overlay('` + traceparent + `' PLACING '-' FROM 5)`}),
		Entry("a traceparent that is not hexadecimal", "traceparent_is_w3c", sqlEvent{traceparent: `overlay('` + traceparent + `' PLACING 'g' FROM 5)`}),
		Entry("the nil id", "event_id_is_not_nil", sqlEvent{eventID: `'00000000-0000-0000-0000-000000000000'`}),
	)

	DescribeTable("refuses values that do not have the column's type",
		func(message string, bad sqlEvent) {
			for _, publish := range []func(sqlEvent) error{insert, call} {
				_, got := refusal(publish(bad))
				Expect(got).To(Equal(message))
			}
		},
		Entry("a context that is not JSON", "invalid input syntax for type json", sqlEvent{eventContext: `'{"order_id": }'`}),
		Entry("an id that is not a UUID", `invalid input syntax for type uuid: "42"`, sqlEvent{eventID: `'42'`}),
		Entry("a time that is not a timestamp", `invalid input syntax for type timestamp with time zone: "soon"`, sqlEvent{eventDateTime: `'soon'`}),
	)

	It("has no function for jsonb, because jsonb does not keep the context byte for byte", func() {
		_, message := refusal(call(sqlEvent{eventContext: `'{}'::jsonb`}))
		Expect(message).To(HavePrefix("function diehard_publish(unknown, jsonb, "))
		Expect(call(sqlEvent{eventContext: `'{}'::jsonb::json`})).To(Succeed())
	})

	DescribeTable("refuses NULL",
		func(column string, bad sqlEvent, publish ...func(sqlEvent) error) {
			for _, publish := range publish {
				_, message := refusal(publish(bad))
				Expect(message).To(Equal(fmt.Sprintf(
					`null value in column %q of relation "outbox_events" violates not-null constraint`, column)))
			}
		},
		Entry("as the type", "event_type", sqlEvent{eventType: `NULL`}, insert, call),
		Entry("as the context", "event_context", sqlEvent{eventContext: `NULL`}, insert, call),
		Entry("as the time, in the statement", "event_date_time", sqlEvent{eventDateTime: `NULL`}, insert),
		Entry("as the environment, in the statement", "environment", sqlEvent{environment: `NULL`}, insert),
		Entry("as the version, in the statement", "metadata_version", sqlEvent{metadataVersion: `NULL`}, insert),
		Entry("as the id, in the statement", "event_id", sqlEvent{eventID: `NULL`}, insert),
	)

	It("refuses an id of the row that the caller chooses", func() {
		_, err := db.Exec(`INSERT INTO outbox_events (id, event_type, event_context) VALUES (1, 'order_placed', '{}')`)
		_, message := refusal(err)
		Expect(message).To(Equal(`cannot insert a non-DEFAULT value into column "id"`))
	})

	// The spec evaluates the constraint's expression, because PostgreSQL would need
	// seconds for an event of this size.
	It("accepts a context of 128 MiB, but not a larger context", func() {
		var check string
		Expect(db.Get(&check, `SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint
			WHERE conrelid = 'outbox_events'::regclass AND conname = 'event_context_is_at_most_128_mib'`)).To(Succeed())
		var taken []bool
		Expect(db.Select(&taken, "SELECT "+check+" FROM unnest($1::int[]) AS context_bytes",
			pq.Array([]int{128 << 20, 128<<20 + 1}))).To(Succeed())
		Expect(taken).To(Equal([]bool{true, false}))
	})

	Context("as a role without other privileges", func() {
		var role string

		BeforeEach(func() {
			role = "publisher_" + uuid.NewString()
			db.MustExec("CREATE ROLE " + pq.QuoteIdentifier(role))
			DeferCleanup(func() {
				db.MustExec("DROP OWNED BY " + pq.QuoteIdentifier(role))
				db.MustExec("DROP ROLE " + pq.QuoteIdentifier(role))
			})
		})

		// as executes a statement with the role's privileges, with search_path = public.
		as := func(statement string) error {
			tx := db.MustBegin()
			defer func() { _ = tx.Rollback() }()
			tx.MustExec("SET LOCAL ROLE " + pq.QuoteIdentifier(role))
			tx.MustExec("SET LOCAL search_path = public")
			if _, err := tx.Exec(statement); err != nil {
				return err
			}
			return tx.Commit()
		}

		grantTo := func(schema string) {
			GinkgoHelper()
			db.MustExec(fmt.Sprintf(`GRANT INSERT (event_id, event_type, event_date_time, environment, event_context,
				metadata_version, traceparent) ON %s.outbox_events TO %s`, schema, pq.QuoteIdentifier(role)))
		}

		It("needs the INSERT privilege on the columns, for the statement and for the function", func() {
			for _, statement := range []string{
				`INSERT INTO outbox_events (event_type, event_context) VALUES ('order_placed', '{}')`,
				`SELECT diehard_publish('order_placed', '{}', environment => 'Staging')`,
				`SELECT diehard_publish('order_placed', '{}')`,
			} {
				Expect(as(statement)).To(MatchError(ContainSubstring("permission denied for table outbox_events")))
			}
			grantTo("public")
			Expect(as(`INSERT INTO outbox_events (event_type, event_context, event_date_time, environment,
				metadata_version, traceparent, event_id) VALUES ('order_placed', '{}', now(), 'Staging', 2, NULL, gen_random_uuid())`)).To(Succeed())
			Expect(as(`SELECT diehard_publish('order_placed', '{}', environment => 'Staging')`)).To(Succeed())
			Expect(as(`SELECT diehard_publish('order_placed', '{}')`)).To(Succeed())
			Expect(rows()).To(HaveLen(3))
		})

		DescribeTable("cannot",
			func(statement string) {
				grantTo("public")
				Expect(as(`INSERT INTO outbox_events (event_type, event_context) VALUES ('order_placed', '{}')`)).To(Succeed())
				Expect(as(statement)).To(MatchError(ContainSubstring("permission denied for table")))
				Expect(rows()).To(HaveLen(1))
			},
			Entry("read events", `SELECT event_id FROM outbox_events`),
			Entry("read the inserted row by RETURNING", `INSERT INTO outbox_events (event_type, event_context) VALUES ('order_placed', '{}') RETURNING event_id`),
			Entry("change events", `UPDATE outbox_events SET event_type = 'order_paid'`),
			Entry("delete events", `DELETE FROM outbox_events`),
			Entry("choose the row's id", `INSERT INTO outbox_events (id, event_type, event_context) OVERRIDING SYSTEM VALUE VALUES (7, 'order_placed', '{}')`),
			Entry("choose the time of publishing", `INSERT INTO outbox_events (event_type, event_context, published_at) VALUES ('order_placed', '{}', now())`),
			Entry("change the batches", `DELETE FROM outbox_batches`),
		)

		It("can call the function in any schema, with any search_path", func() {
			db.MustExec("CREATE SCHEMA diehard")
			db.MustExec("ALTER TABLE outbox_events SET SCHEMA diehard")
			db.MustExec("ALTER FUNCTION diehard_publish SET SCHEMA diehard")
			db.MustExec("CREATE TABLE public.outbox_events (LIKE diehard.outbox_events INCLUDING ALL)")
			db.MustExec("GRANT USAGE ON SCHEMA diehard TO " + pq.QuoteIdentifier(role))
			grantTo("diehard")
			grantTo("public")
			Expect(as(`SELECT diehard.diehard_publish('order_placed', '{}')`)).To(Succeed())
			var events int
			Expect(db.Get(&events, "SELECT count(*) FROM diehard.outbox_events")).To(Succeed())
			Expect(events).To(Equal(1))
		})
	})
})

// sqlEvent has an SQL expression for each column. An empty expression means a valid
// default.
type sqlEvent struct {
	eventType, eventContext, eventDateTime, environment, metadataVersion, traceparent, eventID string
}

func (e sqlEvent) expressions() []any {
	return []any{
		cmp.Or(e.eventType, `'order_placed'`), cmp.Or(e.eventContext, `'{}'`), cmp.Or(e.eventDateTime, `now()`),
		cmp.Or(e.environment, `'Test'`), cmp.Or(e.metadataVersion, `1`), cmp.Or(e.traceparent, `NULL`),
		cmp.Or(e.eventID, `gen_random_uuid()`),
	}
}
