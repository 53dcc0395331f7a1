package integration_test

import (
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("Publishing by SQL", func() {
	// Decoding and encoding again would change spaces, escapes, a duplicate key and
	// a number beyond a float64.
	const eventContext = "{ \"order\" : 1.000000000000000000001,\t\"text\":\"\\u0000 ü漢🧨 \\\\\", \"order\": 2 }\n" //nolint:gosmopolitan // characters of two, three and four bytes

	var s *system.System

	BeforeEach(func(ctx SpecContext) { s = newSystem(ctx) })

	DescribeTable("delivers the event once, with every column unchanged",
		func(ctx SpecContext, statement string) {
			s.Relay(s.ClickHouse.Native)
			s.Postgres.MustExec(statement, eventContext)
			s.ExpectDelivered(ctx, 1)

			var id, eventType, environment, delivered string
			var happened time.Time
			var version uint64
			Expect(testengines.Scan(ctx, s.ClickHouse.HTTP,
				"SELECT toString(event_id), event_type, event_date_time, environment, event_context, metadata_version FROM event_log",
				&id, &eventType, &happened, &environment, &delivered, &version)).To(Succeed())
			Expect(id).To(Equal("0199f2a1-6f0b-7c3e-8a51-2d1f0c9b7e64"))
			Expect(eventType).To(Equal("order_placed"))
			Expect(happened).To(BeTemporally("==", time.Date(2026, 1, 2, 3, 4, 5, 123_456_000, time.UTC)))
			Expect(environment).To(Equal("Staging"))
			Expect(delivered).To(Equal(eventContext))
			Expect(version).To(Equal(uint64(9_223_372_036_854_775_807)))
		},
		Entry("from a statement", `INSERT INTO outbox_events
			(event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent)
			VALUES ('0199f2a1-6f0b-7c3e-8a51-2d1f0c9b7e64', 'order_placed', '2026-01-02 05:04:05.123456+02', 'Staging', $1,
			        9223372036854775807, '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01')`),
		Entry("from the function", `SELECT diehard_publish('order_placed', $1,
			event_id => '0199f2a1-6f0b-7c3e-8a51-2d1f0c9b7e64', event_date_time => '2026-01-02 05:04:05.123456+02',
			environment => 'Staging', metadata_version => 9223372036854775807,
			traceparent => '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01')`),
	)

	It("reaches a relay that rarely polls, if a hint follows the commit", func(ctx SpecContext) {
		s.Relay(s.ClickHouse.Native, "DIEHARD_RELAY_POLL_INTERVAL=10m")
		for published := range 2 { // twice, because the relay may find the first event when it starts
			s.Postgres.MustExec(`SELECT diehard_publish('order_placed', '{}')`)
			s.Postgres.MustExec("NOTIFY diehard_outbox_events")
			s.ExpectDelivered(ctx, published+1)
		}
	})
})
