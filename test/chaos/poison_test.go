package chaos_test

import (
	"context"
	"fmt"
	"math/bits"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("Events that ClickHouse refuses", func() {
	var s *system.System

	BeforeEach(func(ctx SpecContext) {
		s = newSystem(ctx)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
	})

	It("do not prevent the other 99,999 events of their batch from arriving within a few attempts", Label("long"), func(ctx SpecContext) {
		const total = 100_000
		publishWithPoison(ctx, s, total, 1)
		relay := s.Relay(s.ClickHouse.Native, fmt.Sprint("DIEHARD_RELAY_BATCH_MAX_ROWS=", total))
		expectOnce(ctx, s, outcome{Fault: "events that break a constraint", Done: "1 of a batch of 100,000", Events: total, Dead: 1})

		var letter struct {
			EventType string `db:"event_type"`
			EventID   string `db:"event_id"`
			Error     string `db:"error"`
		}
		Expect(s.Postgres.Get(&letter, "SELECT event_type, event_id, error FROM outbox_dead_letters")).To(Succeed())
		Expect(letter.EventType).To(Equal("poison"))
		Expect(letter.Error).To(ContainSubstring("no_poison"))
		var rows int
		Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT count() FROM event_log WHERE event_id = '"+letter.EventID+"'", &rows)).To(Succeed())
		Expect(rows).To(BeZero())

		// The relay sends the whole batch, and after the sample the other events in parts.
		sent, err := relay.Metric("diehard_relay_events_attempted_total")
		Expect(err).NotTo(HaveOccurred())
		Expect(sent).To(BeNumerically("<=", 3*total+2*bits.Len(total)))
	})

	It("do not delay younger events and cause bounded work, even hundreds of them at once", Label("long"), func(ctx SpecContext) {
		const total, bad, young = 8_000, 200, 1_000
		publishWithPoison(ctx, s, total, bad)
		relay := s.Relay(s.ClickHouse.Native, "DIEHARD_RELAY_WORKERS=8", "DIEHARD_RELAY_LINGER=1ms", "DIEHARD_RELAY_POLL_INTERVAL=100ms")
		dead := func(g Gomega) int {
			_, _, n := s.Left(g)
			return n
		}
		Eventually(ctx, func(g Gomega) { g.Expect(dead(g)).NotTo(BeZero()) }).WithTimeout(patience).Should(Succeed())
		events := make([]outbox.Event, young)
		for i := range events {
			events[i] = system.Event(outbox.WithType("young"))
		}
		Expect(s.Publish(ctx, events...)).To(Succeed())
		Eventually(ctx, func(g Gomega) {
			var there int
			g.Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT count() FROM event_log WHERE event_type = 'young'", &there)).To(Succeed())
			g.Expect(there).To(Equal(young))
		}).WithTimeout(patience).Should(Succeed())
		Expect(dead(Default)).To(BeNumerically("<", bad), "the young events must arrive before all refused events are dead letters")

		Eventually(ctx, func(g Gomega) { g.Expect(dead(g)).To(Equal(bad)) }).WithTimeout(5 * patience).Should(Succeed())
		expectOnce(ctx, s, outcome{
			Fault: "events that break a constraint", Done: "200 in a row among 9,000", Events: total + young, Dead: bad,
		})
		sent, err := relay.Metric("diehard_relay_events_attempted_total")
		Expect(err).NotTo(HaveOccurred())
		Expect(sent).To(BeNumerically("<=", total*(bits.Len(total)+1)+young))
	})
})

var _ = Describe("An event type whose inserts all fail", func() {
	It("does not stop the other type, and creates no more dead letters than the fuse allows", Label("long"), func(ctx SpecContext) {
		const total, fuse, young = 100_000, 20, 100
		s := newSystem(ctx)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
			"ALTER TABLE event_log ADD COLUMN amount UInt64 DEFAULT toUInt64(event_type = 'broken' ? '' : '1')")
		s.Postgres.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context)
			SELECT CASE n % 2 WHEN 0 THEN 'broken' ELSE 'thing_happened' END, json_build_object('n', n) FROM generate_series(1, $1::int) AS n`, total)
		s.Relay(s.ClickHouse.Native, "DIEHARD_RELAY_BATCH_MAX_ROWS=10000", "DIEHARD_RELAY_LINGER=1ms", "DIEHARD_RELAY_POLL_INTERVAL=100ms",
			"DIEHARD_RELAY_BACKOFF_MIN=10ms", "DIEHARD_RELAY_BACKOFF_MAX=1s",
			"DIEHARD_RELAY_DEAD_LETTER_AFTER=1s", fmt.Sprint("DIEHARD_RELAY_DEAD_LETTERS_PER_HOUR=", fuse))
		arrived := func(g Gomega, eventType string) (n int) {
			g.Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT count() FROM event_log WHERE event_type = '"+eventType+"'", &n)).To(Succeed())
			return n
		}
		for n := range young {
			Expect(s.Publish(ctx, system.Event(outbox.WithType("young")), system.Event(outbox.WithType("broken")))).To(Succeed())
			Eventually(ctx, func(g Gomega) { g.Expect(arrived(g, "young")).To(Equal(n + 1)) }).WithTimeout(patience).Should(Succeed())
		}
		Eventually(ctx, func(g Gomega) { g.Expect(arrived(g, "thing_happened")).To(Equal(total / 2)) }).WithTimeout(patience).Should(Succeed())
		_, batches, dead := s.Left(Default)
		Expect(dead).To(BeNumerically("<=", fuse))
		Expect(batches).To(BeNumerically("<", 100))

		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log MODIFY COLUMN amount UInt64 DEFAULT 1")
		expectOnce(ctx, s, outcome{
			Fault: "an event type that makes inserts fail", Done: "every second event of 100,000", Events: total + 2*young, Dead: dead,
		})
	})
})

var _ = Describe("A thousand events that make inserts fail", func() {
	It("do not delay younger events while they are isolated, and do not pile up batches", Label("long"), func(ctx SpecContext) {
		const total, every, young = 1_000_000, 1_000, 200
		s := newSystem(ctx)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
			"ALTER TABLE event_log ADD COLUMN amount UInt64 DEFAULT toUInt64(JSONExtractString(event_context, 'amount'))")
		s.Postgres.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context)
			SELECT 'thing_happened', json_build_object('amount', CASE n % $2::int WHEN 0 THEN '' ELSE '1' END) FROM generate_series(1, $1::int) AS n`, total, every)
		relay := s.Relay(s.ClickHouse.Native, "DIEHARD_RELAY_DEAD_LETTERS_PER_HOUR=100000", "DIEHARD_RELAY_POLL_INTERVAL=50ms")
		split := func(g Gomega) (n float64) {
			n, err := relay.Metric(`diehard_relay_batches_total{result="split"}`)
			g.Expect(err).NotTo(HaveOccurred())
			return n
		}
		Eventually(ctx, split).WithTimeout(patience).Should(BeNumerically(">", 0))
		var latencies []time.Duration
		most := 0
		for range young {
			event := system.Event(outbox.WithType("young"))
			event.EventContext = outboxtest.JSON(`{"amount":"1"}`)
			began := time.Now()
			Expect(s.Publish(ctx, event)).To(Succeed())
			Eventually(ctx, func(g Gomega) {
				var there int
				g.Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT count() FROM event_log WHERE event_id = '"+event.EventID.String()+"'", &there)).To(Succeed())
				g.Expect(there).To(Equal(1))
			}).WithTimeout(patience).Should(Succeed())
			latencies = append(latencies, time.Since(began))
			_, batches, _ := s.Left(Default)
			most = max(most, batches)
		}
		left, _, _ := s.Left(Default)
		slices.Sort(latencies)
		AddReportEntry("latency of young events", ReportEntryVisibilityAlways, fmt.Sprintf(
			"p50 %s, p99 %s, maximum %s; at most %d batches; %d of %d events left, %v splits",
			latencies[young/2], latencies[young*99/100], latencies[young-1], most, left, total, split(Default)))
		Expect(left).To(BeNumerically(">", 0), "the isolation has not ended")
		Expect(most).To(BeNumerically("<", 1000))
	})
})

// publishWithPoison publishes events in one transaction. ClickHouse refuses a number
// of consecutive events in the middle.
func publishWithPoison(ctx context.Context, s *system.System, total, bad int) {
	GinkgoHelper()
	s.Postgres.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context)
		SELECT CASE WHEN n > ($1::int - $2::int) / 2 AND n <= ($1::int + $2::int) / 2 THEN 'poison' ELSE 'thing_happened' END,
		       json_build_object('n', n)
		FROM generate_series(1, $1::int) AS n`, total, bad)
}
