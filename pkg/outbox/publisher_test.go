package outbox_test

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
)

type InvoicePaid struct {
	Note string `json:"note"`
}

type HTTPServerStarted struct{}

var _ = Describe("NewEvent", func() {
	DescribeTable("derives the event type from the Go type",
		func(payload any, eventType string) {
			event, err := outbox.NewEvent(payload)
			Expect(err).NotTo(HaveOccurred())
			Expect(event.EventType).To(Equal(eventType))
		},
		Entry("of a struct", InvoicePaid{}, "invoice_paid"),
		Entry("of a pointer", &InvoicePaid{}, "invoice_paid"),
		Entry("with an initialism", HTTPServerStarted{}, "http_server_started"),
	)

	It("takes the values that the options set", func() {
		happened := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
		event, err := outbox.NewEvent(map[string]int{"n": 1},
			outbox.WithType("counted"), outbox.WithTime(happened), outbox.WithMetadataVersion(7),
			outbox.WithTraceparent(outboxtest.Traceparent(traceparent)), outbox.WithEnvironment("Staging"))
		Expect(err).NotTo(HaveOccurred())
		Expect(event.EventType).To(Equal("counted"))
		Expect(event.EventDateTime).To(Equal(happened))
		Expect(event.MetadataVersion).To(Equal(int64(7)))
		Expect(event.Traceparent.String()).To(Equal(traceparent))
		Expect(event.Environment).To(Equal("Staging"))
		Expect(event.EventID.Version()).To(Equal(uuid.Version(7)))
	})

	It("does not escape characters for HTML", func() {
		event, err := outbox.NewEvent(InvoicePaid{Note: "a<b&c>"})
		Expect(err).NotTo(HaveOccurred())
		Expect(event.EventContext.String()).To(Equal(`{"note":"a<b&c>"}`))
	})

	It("takes raw JSON byte for byte", func() {
		raw := json.RawMessage("{ \"b\": 1.00,\t\"a\" : \"<\u2028\" }\n")
		event, err := outbox.NewEvent(raw, outbox.WithType("counted"))
		Expect(err).NotTo(HaveOccurred())
		Expect(event.EventContext.String()).To(Equal(string(raw)))
		event, err = outbox.NewEvent(outboxtest.JSON(string(raw)), outbox.WithType("counted"))
		Expect(err).NotTo(HaveOccurred())
		Expect(event.EventContext.String()).To(Equal(string(raw)))
	})

	It("refuses a payload without a type name, and a payload that is not JSON", func() {
		_, err := outbox.NewEvent(outboxtest.JSON(`{}`))
		Expect(err).To(MatchError(ContainSubstring("WithType")))
		_, err = outbox.NewEvent(map[string]int{})
		Expect(err).To(MatchError(ContainSubstring("WithType")))
		for _, payload := range []any{
			func() {}, json.RawMessage(`{"a":`), json.RawMessage("\"\xff\""), InvoiceRaw{Raw: json.RawMessage("\"\xff\"")},
		} {
			_, err = outbox.NewEvent(payload, outbox.WithType("counted"))
			Expect(err).To(MatchError(ContainSubstring("encode the event's context")))
		}
	})

	DescribeTable("takes the event type and the version from the payload's methods",
		func(payload any) {
			event, err := outbox.NewEvent(payload)
			Expect(err).NotTo(HaveOccurred())
			Expect(event.EventType).To(Equal("order_paid"))
			Expect(event.MetadataVersion).To(Equal(int64(4)))
		},
		Entry("of a value", renamed{}),
		Entry("of a pointer to it", &renamed{}),
		Entry("of a nil pointer to it", (*renamed)(nil)),
		Entry("of a value whose methods have pointer receivers", renamedByPointer{version: 4}),
		Entry("of a pointer whose methods have pointer receivers", &renamedByPointer{version: 4}),
	)

	It("lets options override the payload's methods", func() {
		event, err := outbox.NewEvent(renamed{}, outbox.WithType("counted"), outbox.WithMetadataVersion(9))
		Expect(err).NotTo(HaveOccurred())
		Expect(event.EventType).To(Equal("counted"))
		Expect(event.MetadataVersion).To(Equal(int64(9)))
	})
})

type InvoiceRaw struct {
	Raw json.RawMessage `json:"raw"`
}

type renamed struct{}

func (renamed) EventType() string   { return "order_paid" }
func (renamed) EventVersion() int64 { return 4 }

type renamedByPointer struct{ version int64 }

func (*renamedByPointer) EventType() string     { return "order_paid" }
func (r *renamedByPointer) EventVersion() int64 { return r.version }

var _ = DescribeTable("ParseJSON refuses",
	func(text, reason string) {
		_, err := outbox.ParseJSON([]byte(text))
		Expect(err).To(MatchError(reason))
	},
	Entry("nothing", "", "is not valid JSON"),
	Entry("an incomplete value", `{"a":`, "is not valid JSON"),
	Entry("two values", `1 2`, "is not valid JSON"),
	Entry("invalid UTF-8", "\"\xff\"", "is not valid UTF-8"),
	Entry("a NUL", "\"\x00\"", "is not valid JSON"),
)

var _ = Describe("ParseTraceparent", func() {
	DescribeTable("reads the fields of a trace context",
		func(text string, sampled bool) {
			parsed, err := outbox.ParseTraceparent(text)
			Expect(err).NotTo(HaveOccurred())
			Expect(parsed.TraceID()).To(Equal("4bf92f3577b34da6a3ce929d0e0e4736"))
			Expect(parsed.ParentID()).To(Equal("00f067aa0ba902b7"))
			Expect(parsed.Sampled()).To(Equal(sampled))
			Expect(parsed.IsZero()).To(BeFalse())
			Expect(parsed.String()).To(And(HavePrefix("00-4bf9"), HaveLen(55)))
		},
		Entry("of a sampled trace", traceparent, true),
		Entry("of a trace that is not sampled", strings.TrimSuffix(traceparent, "1")+"0", false),
		Entry("with only a different flag", strings.TrimSuffix(traceparent, "1")+"2", false),
		Entry("with all flags", strings.TrimSuffix(traceparent, "01")+"ff", true),
		Entry("of a later version", "01"+traceparent[2:], true),
		Entry("of a later version with further fields", "cc"+traceparent[2:]+"-more", true),
	)

	DescribeTable("refuses",
		func(text string) {
			parsed, err := outbox.ParseTraceparent(text)
			Expect(err).To(MatchError("is not a W3C traceparent"))
			Expect(parsed.IsZero()).To(BeTrue())
		},
		Entry("nothing", ""),
		Entry("an incomplete traceparent", traceparent[:54]),
		Entry("version 00 with a further field", traceparent+"-more"),
		Entry("a further field without a hyphen", "01"+traceparent[2:]+"more"),
		Entry("upper case", strings.ToUpper(traceparent)),
		Entry("a missing hyphen", strings.Replace(traceparent, "-", "0", 1)),
		Entry("the version ff", "ff"+traceparent[2:]),
		Entry("a trace id of zeros", "00-"+strings.Repeat("0", 32)+traceparent[35:]),
		Entry("a parent id of zeros", traceparent[:36]+strings.Repeat("0", 16)+traceparent[52:]),
		Entry("flags that are not hexadecimal", traceparent[:53]+"0g"),
		Entry("a letter of two bytes", "Ж"+traceparent[2:]),
	)

	It("has a zero value that is empty", func() {
		var none outbox.Traceparent
		Expect(none.IsZero()).To(BeTrue())
		Expect(none.String() + none.TraceID() + none.ParentID()).To(BeEmpty())
		Expect(none.Sampled()).To(BeFalse())
	})
})

const traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

// storedEvent has the columns of outbox_events that the specs read.
type storedEvent struct {
	EventID         uuid.UUID      `db:"event_id"`
	EventType       string         `db:"event_type"`
	EventDateTime   time.Time      `db:"event_date_time"`
	Environment     string         `db:"environment"`
	EventContext    string         `db:"event_context"`
	MetadataVersion int64          `db:"metadata_version"`
	Traceparent     sql.NullString `db:"traceparent"`
	PublishedAt     time.Time      `db:"published_at"`
	ContextBytes    int            `db:"context_bytes"`
}

var _ = Describe("Publisher", func() {
	var (
		db        *sqlx.DB
		publisher *outbox.Publisher
	)

	BeforeEach(func(ctx SpecContext) {
		db = newDatabase(ctx)
		publisher = outbox.NewPublisher(outbox.PublisherOptions{Environment: "Test", MaxEventBytes: 1 << 20})
	})

	count := func() (events int) {
		GinkgoHelper()
		Expect(db.Get(&events, "SELECT count(*) FROM outbox_events")).To(Succeed())
		return events
	}

	It("publishes if and only if the caller's transaction commits", func(ctx SpecContext) {
		event, err := outbox.NewEvent(InvoicePaid{Note: "thanks"})
		Expect(err).NotTo(HaveOccurred())

		rolledBack := db.MustBegin()
		Expect(publisher.Publish(ctx, rolledBack, event)).To(Succeed())
		Expect(rolledBack.Rollback()).To(Succeed())
		Expect(count()).To(BeZero())

		var committed *sql.Tx
		committed, err = db.BeginTx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		Expect(publisher.Publish(ctx, committed, event)).To(Succeed())
		Expect(committed.Commit()).To(Succeed())

		var row storedEvent
		Expect(db.Get(&row, `SELECT event_id, event_type, event_date_time, environment, event_context,
			metadata_version, traceparent, context_bytes FROM outbox_events`)).To(Succeed())
		Expect(row.EventID).To(Equal(event.EventID))
		Expect(row.EventType).To(Equal("invoice_paid"))
		Expect(row.EventDateTime).To(BeTemporally("==", event.EventDateTime.Truncate(time.Microsecond)))
		Expect(row.Environment).To(Equal("Test"))
		Expect(row.EventContext).To(Equal(`{"note":"thanks"}`))
		Expect(row.MetadataVersion).To(Equal(int64(1)))
		Expect(row.Traceparent.Valid).To(BeFalse())
		Expect(row.ContextBytes).To(Equal(len(`{"note":"thanks"}`)))
	})

	It("keeps the context byte for byte", func(ctx SpecContext) {
		context := `{ "b":1,"a" : [1.00, 1e3], "b":2, "nul":"\u0000", "emoji":"🧨" }`
		publish(ctx, db, publisher, outbox.Event{EventContext: outboxtest.JSON(context)})
		var stored string
		Expect(db.Get(&stored, "SELECT event_context FROM outbox_events")).To(Succeed())
		Expect(stored).To(Equal(context))
	})

	It("publishes more events than fit into the parameters of one statement", func(ctx SpecContext) {
		events := make([]outbox.Event, 12_345)
		publish(ctx, db, publisher, events...)
		Expect(count()).To(Equal(12_345))
	})

	DescribeTable("gives an event without an environment the column's default",
		func(ctx SpecContext, environments, expected []string) {
			db.MustExec("ALTER TABLE outbox_events ALTER COLUMN environment SET DEFAULT 'Deployed'")
			publisher = outbox.NewPublisher(outbox.PublisherOptions{})
			events := make([]outbox.Event, len(environments))
			for i, environment := range environments {
				events[i].Environment = environment
			}
			publish(ctx, db, publisher, events...)
			var stored []string
			Expect(db.Select(&stored, "SELECT environment FROM outbox_events ORDER BY id")).To(Succeed())
			Expect(stored).To(Equal(expected))
		},
		Entry("if it is the only event", []string{""}, []string{"Deployed"}),
		Entry("if other events have an environment", []string{"A", "", "B", ""}, []string{"A", "Deployed", "B", "Deployed"}),
	)

	DescribeTable("publishes into the schema of the options",
		func(ctx SpecContext, schema string) {
			db.MustExec("CREATE SCHEMA " + pq.QuoteIdentifier(schema))
			db.MustExec("ALTER TABLE outbox_events SET SCHEMA " + pq.QuoteIdentifier(schema))
			publisher = outbox.NewPublisher(outbox.PublisherOptions{Schema: schema})
			publish(ctx, db, publisher, outbox.Event{}, outbox.Event{Environment: "A"})
			publish(ctx, db, publisher, outbox.Event{Environment: "A"})
			var events int
			Expect(db.Get(&events, "SELECT count(*) FROM "+pq.QuoteIdentifier(schema)+".outbox_events")).To(Succeed())
			Expect(events).To(Equal(3))
		},
		Entry("with a plain name", "events"),
		Entry("with a name that needs quotes", `The "Shop"'s; DROP.Events`),
	)

	Describe("with rows of the caller's tables", func() {
		BeforeEach(func() { db.MustExec("CREATE TABLE things (id uuid PRIMARY KEY, name text UNIQUE)") })

		insert := func(name string, ids ...uuid.UUID) outbox.Insert {
			names := make([]string, len(ids))
			for i := range ids {
				names[i] = fmt.Sprint(name, i%2)
			}
			return outbox.Insert{
				SQL:    "INSERT INTO things SELECT * FROM unnest($1::uuid[], $2::text[]) ON CONFLICT (name) DO NOTHING RETURNING id",
				Args:   []any{pq.Array(ids), pq.Array(names)},
				RowIDs: ids,
			}
		}

		It("publishes the events of the inserted rows, in their order and byte for byte", func(ctx SpecContext) {
			ids := []uuid.UUID{uuid.New(), uuid.New(), uuid.New(), uuid.New()}
			events := []outbox.Event{
				{EventContext: outboxtest.JSON(`{ "b":1,"a" : [1.00, 1e3], "nul":"\u0000", "quote":"\"\\\"", "emoji":"🧨" }`), Environment: "Production"},
				{
					EventType: "second_thing", MetadataVersion: 3, EventDateTime: time.Date(1900, 1, 1, 0, 0, 0, 1000, time.UTC),
					Traceparent: outboxtest.Traceparent(traceparent), EventContext: outboxtest.JSON(`"NULL"`),
				},
				{EventType: "not_published"},
				{EventType: "not_published"},
			}
			for i := range events {
				events[i] = complete(events[i])
			}
			tx := db.MustBegin()
			Expect(publisher.PublishInserted(ctx, tx, insert("a", ids...), events...)).To(ConsistOf(ids[0], ids[1]))
			Expect(tx.Commit()).To(Succeed())

			var rows []storedEvent
			Expect(db.Select(&rows, `SELECT event_id, event_type, event_date_time, environment, event_context,
				metadata_version, traceparent FROM outbox_events ORDER BY id`)).To(Succeed())
			Expect(rows).To(HaveLen(2))
			for i, row := range rows {
				Expect(row.EventID).To(Equal(events[i].EventID))
				Expect(row.EventType).To(Equal(events[i].EventType))
				Expect(row.EventDateTime).To(BeTemporally("==", events[i].EventDateTime))
				Expect(row.EventContext).To(Equal(events[i].EventContext.String()))
				Expect(row.MetadataVersion).To(Equal(events[i].MetadataVersion))
			}
			Expect(rows[0].Environment).To(Equal("Production"))
			Expect(rows[1].Environment).To(Equal("Test"))
			Expect(rows[0].Traceparent.Valid).To(BeFalse())
			Expect(rows[1].Traceparent.String).To(Equal(traceparent))
		})

		It("inserts additional rows for the inserted rows, or nothing", func(ctx SpecContext) {
			db.MustExec("CREATE TABLE notes (id uuid PRIMARY KEY)")
			noted := func(ids ...uuid.UUID) outbox.Insert {
				i := insert("a", ids...)
				i.SQL = strings.Replace(i.SQL, "ON CONFLICT (name)", "ON CONFLICT", 1)
				i.Additional = "INSERT INTO notes SELECT unnest($1::uuid[]) INTERSECT SELECT id FROM inserted"
				return i
			}
			ids := []uuid.UUID{uuid.New(), uuid.New(), uuid.New()}
			events := []outbox.Event{complete(outbox.Event{}), complete(outbox.Event{}), complete(outbox.Event{})}
			Expect(publisher.PublishInserted(ctx, db, noted(ids...), events...)).To(ConsistOf(ids[0], ids[1]))
			var notes []uuid.UUID
			Expect(db.Select(&notes, "SELECT id FROM notes")).To(Succeed())
			Expect(notes).To(ConsistOf(ids[0], ids[1]))

			db.MustExec("DELETE FROM things") // the notes exist, so the additional rows conflict
			_, err := publisher.PublishInserted(ctx, db, noted(ids[0]), events[:1]...)
			Expect(err).To(HaveOccurred())
			var things, published int
			Expect(db.QueryRow("SELECT (SELECT count(*) FROM things), (SELECT count(*) FROM outbox_events)").Scan(&things, &published)).To(Succeed())
			Expect([]int{things, published}).To(Equal([]int{0, 2}))
		})

		It("gives an event without an environment the column's default", func(ctx SpecContext) {
			db.MustExec("ALTER TABLE outbox_events ALTER COLUMN environment SET DEFAULT 'Deployed'")
			publisher = outbox.NewPublisher(outbox.PublisherOptions{})
			ids := []uuid.UUID{uuid.New(), uuid.New(), uuid.New(), uuid.New()}
			Expect(publisher.PublishInserted(ctx, db, insert("a", ids[0], ids[1]),
				complete(outbox.Event{Environment: "A"}), complete(outbox.Event{}))).To(HaveLen(2))
			Expect(publisher.PublishInserted(ctx, db, insert("b", ids[2], ids[3]),
				complete(outbox.Event{}), complete(outbox.Event{}))).To(HaveLen(2))
			var stored []string
			Expect(db.Select(&stored, "SELECT environment FROM outbox_events ORDER BY environment")).To(Succeed())
			Expect(stored).To(Equal([]string{"A", "Deployed", "Deployed", "Deployed"}))
		})

		It("inserts nothing if the transaction is rolled back, or an event breaks a rule", func(ctx SpecContext) {
			tx := db.MustBegin()
			_, err := publisher.PublishInserted(ctx, tx, insert("a", uuid.New()), complete(outbox.Event{}))
			Expect(err).NotTo(HaveOccurred())
			Expect(tx.Rollback()).To(Succeed())
			_, err = publisher.PublishInserted(ctx, db, insert("a", uuid.New()), complete(outbox.Event{EventType: "A"}))
			_, ok := errors.AsType[*outbox.ValidationError](err)
			Expect(ok).To(BeTrue(), "%v", err)
			var things int
			Expect(db.Get(&things, "SELECT count(*) FROM things")).To(Succeed())
			Expect(things + count()).To(BeZero())
		})
	})

	DescribeTable("refuses an event that breaks a rule, and writes nothing",
		func(ctx SpecContext, field string, spoil func(*outbox.Event)) {
			good, bad := complete(outbox.Event{}), complete(outbox.Event{})
			spoil(&bad)
			tx := db.MustBegin()
			defer func() { Expect(tx.Commit()).To(Succeed()); Expect(count()).To(BeZero()) }()
			err := publisher.Publish(ctx, tx, good, bad)
			invalid, ok := errors.AsType[*outbox.ValidationError](err)
			Expect(ok).To(BeTrue(), "%v", err)
			Expect(invalid.Index).To(Equal(1))
			Expect(invalid.Field).To(Equal(field))
		},
		Entry("no id", "event_id", func(e *outbox.Event) { e.EventID = uuid.Nil }),
		Entry("no type", "event_type", func(e *outbox.Event) { e.EventType = "" }),
		Entry("a type that is not snake_case", "event_type", func(e *outbox.Event) { e.EventType = "UserCreated" }),
		Entry("a type with a line end", "event_type", func(e *outbox.Event) { e.EventType = "user_created\n" }),
		Entry("a long type", "event_type", func(e *outbox.Event) { e.EventType = strings.Repeat("a", 129) }),
		Entry("a time before 1900", "event_date_time", func(e *outbox.Event) { e.EventDateTime = time.Date(1899, 12, 31, 0, 0, 0, 0, time.UTC) }),
		Entry("a time after 2299", "event_date_time", func(e *outbox.Event) { e.EventDateTime = time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC) }),
		Entry("no time", "event_date_time", func(e *outbox.Event) { e.EventDateTime = time.Time{} }),
		Entry("a NUL in the environment", "environment", func(e *outbox.Event) { e.Environment = "a\x00" }),
		Entry("a negative version", "metadata_version", func(e *outbox.Event) { e.MetadataVersion = -1 }),
		Entry("no context", "event_context", func(e *outbox.Event) { e.EventContext = outbox.JSON{} }),
		Entry("a context over the limit", "event_context", func(e *outbox.Event) {
			e.EventContext = outboxtest.JSON(`"` + strings.Repeat("a", 1<<20) + `"`)
		}),
	)
})
