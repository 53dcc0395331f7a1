package outboxtest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
)

// recorder is a TestingT that keeps the failure message.
type recorder struct{ failure string }

func (r *recorder) Helper() {}

func (r *recorder) Fatalf(format string, args ...any) {
	r.failure = fmt.Sprintf(format, args...)
}

// differences returns the lines of the failure message that show a difference. It
// normalises spaces, because go-cmp varies them.
func differences(failure string) []string {
	var lines []string
	for line := range strings.Lines(failure) {
		if fields := strings.Fields(line); len(fields) > 0 && (fields[0] == "-" || fields[0] == "+") {
			lines = append(lines, strings.Join(fields, " "))
		}
	}
	return lines
}

// OrderPlaced is a payload.
type OrderPlaced struct {
	OrderID int64    `json:"order_id"`
	Items   []string `json:"items"`
}

var _ = Describe("A test of the published events", func() {
	var (
		tx        *sqlx.Tx
		happened  = time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
		order     = OrderPlaced{OrderID: 1<<53 + 1, Items: []string{"a", "b"}}
		placed    = outboxtest.Want{EventType: "order_placed", EventContext: order}
		counted   = outboxtest.Want{EventType: "counted"}
		published []outbox.Event
	)

	BeforeEach(func(ctx SpecContext) {
		tx = testengines.OpenPostgres(suite.LastingPostgresDSN(ctx), nil).MustBegin()
		DeferCleanup(func() { Expect(tx.Rollback()).To(Succeed()) })
		first, err := outbox.NewEvent(order, outbox.WithTime(happened), outbox.WithEnvironment("Staging"),
			outbox.WithMetadataVersion(2), outbox.WithTraceparent(outboxtest.Traceparent(traceparent)))
		Expect(err).NotTo(HaveOccurred())
		second, err := outbox.NewEvent(outboxtest.JSON(`{ "n": [ 1.50, 1e2, null ], "text": "1" }`), outbox.WithType("counted"))
		Expect(err).NotTo(HaveOccurred())
		published = []outbox.Event{first, second}
		Expect(outbox.NewPublisher(outbox.PublisherOptions{}).Publish(ctx, tx, published...)).To(Succeed())
	})

	required := func(ctx context.Context, want ...outboxtest.Want) string {
		t := &recorder{}
		outboxtest.RequirePublished(ctx, t, tx, want...)
		return t.failure
	}
	requiredNot := func(ctx context.Context, unwanted ...outboxtest.Want) string {
		t := &recorder{}
		outboxtest.RequireNotPublished(ctx, t, tx, unwanted...)
		return t.failure
	}

	It("accepts and returns the wanted events", func(ctx SpecContext) {
		events := outboxtest.RequirePublished(ctx, GinkgoT(), tx, placed, counted)
		Expect(events).To(HaveLen(2))
		Expect(events[0]).To(Equal(published[0]))
		Expect(events[1].EventID).To(Equal(published[1].EventID))
	})

	It("accepts an event with all the properties that are wanted", func(ctx SpecContext) {
		Expect(required(ctx, outboxtest.Want{
			EventType: "order_placed", EventContext: order, MetadataVersion: 2, Environment: "Staging",
			Traceparent: outboxtest.Traceparent(traceparent), EventDateTime: happened.Add(999).In(time.FixedZone("", 3600)),
		}, counted)).To(BeEmpty())
		Expect(required(ctx, outboxtest.Want{}, outboxtest.Want{Environment: "Local", MetadataVersion: 1})).To(BeEmpty())
	})

	DescribeTable("compares contexts as JSON values",
		func(ctx SpecContext, eventContext any, isEqual bool) {
			want := outboxtest.Want{EventContext: eventContext}
			if isEqual {
				Expect(required(ctx, placed, want)).To(BeEmpty())
				Expect(requiredNot(ctx, want)).To(ContainSubstring("unwanted"))
			} else {
				Expect(required(ctx, placed, want)).To(ContainSubstring("wanted"))
				Expect(requiredNot(ctx, want)).To(BeEmpty())
			}
		},
		Entry("with different spaces, order of keys and notation of numbers", `{"text":"1","n":[15e-1,100,null]}`, true),
		Entry("given as raw JSON", json.RawMessage(`{"text":"1","n":[1.5,100.0,null]}`), true),
		Entry("given as JSON", outboxtest.JSON(`{"text":"1","n":[1.5,100.0,null]}`), true),
		Entry("given as a value", map[string]any{"text": "1", "n": []any{1.5, 100, nil}}, true),
		Entry("with a different number", `{"text":"1","n":[1.5,101,null]}`, false),
		Entry("with a different fraction", `{"text":"1","n":[1.25,100,null]}`, false),
		Entry("with a number instead of a text", `{"text":1,"n":[1.5,100,null]}`, false),
		Entry("with a different order of an array", `{"text":"1","n":[100,1.5,null]}`, false),
		Entry("with an additional key", `{"text":"1","n":[1.5,100,null],"more":null}`, false),
		Entry("without a key", `{"text":"1"}`, false),
		Entry("that is null", `null`, false),
	)

	It("distinguishes integers that have the same float64", func(ctx SpecContext) {
		failure := required(ctx, outboxtest.Want{EventContext: OrderPlaced{OrderID: 1 << 53, Items: order.Items}}, counted)
		Expect(differences(failure)).To(Equal([]string{`- "order_id": int64(9007199254740992),`, `+ "order_id": int64(9007199254740993),`}))
	})

	DescribeTable("fails, and shows the difference, if",
		func(ctx SpecContext, lines []string, want ...outboxtest.Want) {
			failure := required(ctx, want...)
			Expect(failure).To(HavePrefix("outboxtest: the transaction has not published the wanted events (-want +published):\n"))
			Expect(differences(failure)).To(ContainElements(lines), failure)
		},
		Entry("a wanted event is missing", []string{`- {EventType: string("mail_sent")},`},
			placed, counted, outboxtest.Want{EventType: "mail_sent"}),
		Entry("an event is not wanted", []string{`+ EventType: string("counted"),`}, placed),
		Entry("no event is wanted", []string{`+ EventType: string("order_placed"),`, `+ EventType: string("counted"),`}),
		Entry("the order differs", []string{`- EventType: string("counted"),`, `+ EventType: string("counted"),`}, counted, placed),
		Entry("an event is wanted twice", []string{`- {EventType: string("counted")},`}, placed, counted, counted),
	)

	DescribeTable("shows only the difference if",
		func(ctx SpecContext, lines []string, want ...outboxtest.Want) {
			Expect(differences(required(ctx, want...))).To(Equal(lines))
		},
		Entry("the type differs", []string{`- EventType: string("order_paid"),`, `+ EventType: string("order_placed"),`},
			outboxtest.Want{EventType: "order_paid"}, counted),
		Entry("the context differs", []string{`- "order_id": int64(1),`, `+ "order_id": int64(9007199254740993),`},
			outboxtest.Want{EventType: "order_placed", EventContext: OrderPlaced{OrderID: 1, Items: order.Items}}, counted),
		Entry("the version differs", []string{`- MetadataVersion: int64(3),`, `+ MetadataVersion: int64(2),`},
			outboxtest.Want{EventType: "order_placed", MetadataVersion: 3}, counted),
		Entry("the environment differs", []string{`- Environment: string("Local"),`, `+ Environment: string("Staging"),`},
			outboxtest.Want{EventType: "order_placed", Environment: "Local"}, counted),
		Entry("the trace context differs", []string{`- "` + otherTraceparent[3:] + `",`, `+ "` + traceparent[3:] + `",`},
			outboxtest.Want{EventType: "order_placed", Traceparent: outboxtest.Traceparent(otherTraceparent)}, counted),
		Entry("the trace context is missing", []string{`- Traceparent: string("` + traceparent + `"),`, `+ Traceparent: nil,`},
			placed, outboxtest.Want{EventType: "counted", Traceparent: outboxtest.Traceparent(traceparent)}),
		Entry("the time differs", []string{`- EventDateTime: string("2026-01-02T03:04:05.000007Z"),`, `+ EventDateTime: string("2026-01-02T03:04:05.000006Z"),`},
			outboxtest.Want{EventType: "order_placed", EventDateTime: happened.Add(time.Microsecond)}, counted),
		Entry("an event before the other wanted events is missing", []string{`- {EventType: string("mail_sent")},`},
			outboxtest.Want{EventType: "mail_sent"}, placed, counted),
	)

	It("accepts that unwanted events were not published", func(ctx SpecContext) {
		Expect(requiredNot(ctx, outboxtest.Want{EventType: "order_paid"},
			outboxtest.Want{EventType: "order_placed", EventContext: `{}`},
			outboxtest.Want{EventType: "order_placed", EventContext: order, Environment: "Local"})).To(BeEmpty())
	})

	It("fails, and shows the events, if unwanted events were published", func(ctx SpecContext) {
		failure := requiredNot(ctx, outboxtest.Want{EventType: "order_paid"}, counted)
		Expect(failure).To(HavePrefix("outboxtest: the transaction has published unwanted events (+published):\n"))
		Expect(differences(failure)).To(ContainElement(`+ EventType: string("counted"),`))
		Expect(failure).NotTo(ContainSubstring("order_placed"))
		Expect(requiredNot(ctx)).To(And(ContainSubstring("counted"), ContainSubstring("order_placed")))
	})

	It("accepts that no event was published", func(ctx SpecContext) {
		Expect(tx.MustExec("DELETE FROM outbox_events").RowsAffected()).To(Equal(int64(2)))
		Expect(required(ctx)).To(BeEmpty())
		Expect(requiredNot(ctx)).To(BeEmpty())
	})

	DescribeTable("fails if the expectation is invalid",
		func(ctx SpecContext, eventContext any, reason string) {
			want := outboxtest.Want{EventContext: eventContext}
			Expect(required(ctx, placed, want)).To(And(ContainSubstring("Want 1: "), ContainSubstring(reason)))
			Expect(requiredNot(ctx, placed, want)).To(And(ContainSubstring("Want 1: "), ContainSubstring(reason)))
		},
		Entry("because its context is not JSON", `{"a":`, "is not valid JSON"),
		Entry("because its context cannot be encoded", func() {}, "unsupported type"),
		Entry("because its context is the zero value", outbox.JSON{}, "is empty"),
	)

	It("fails if the transaction has failed", func(ctx SpecContext) {
		_, err := tx.Exec("SELECT 1/0")
		Expect(err).To(HaveOccurred())
		Expect(required(ctx, placed, counted)).To(ContainSubstring("current transaction is aborted"))
		Expect(requiredNot(ctx)).To(ContainSubstring("current transaction is aborted"))
	})
})
