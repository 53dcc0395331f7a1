package chaos_test

import (
	"context"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/test/system"
)

// countedSQL counts the events of the outbox, and those of late commits. A late commit is
// below the high watermark, and no cut has put it into a batch yet.
const countedSQL = `
SELECT count(*) AS events,
       count(*) FILTER (WHERE id <= coalesce((SELECT high_watermark FROM outbox_cursor ORDER BY cuts DESC LIMIT 1), 0)
                          AND NOT coalesce((SELECT range_agg(event_ids) FROM outbox_batches) @> id, false)) AS late
FROM outbox_events`

type counted struct {
	Events int64 `db:"events"`
	Late   int64 `db:"late"`
}

// expectBacklog compares the relays' figure of the backlog with the number of events in the
// outbox, in one snapshot, so that relays and publishers may be at work. The figure does not
// include late commits that are not in a batch yet.
func expectBacklog(ctx context.Context, s *system.System) {
	GinkgoHelper()
	db := testengines.OpenStore(s.PostgresDSN, store.Session(30*time.Second))
	defer db.Close()
	db.SetMaxOpenConns(1) // all statements are in the transaction that the first one begins
	Eventually(ctx, func() error {
		_, err := db.ExecContext(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ")
		return err
	}).WithTimeout(patience).WithPolling(system.Polling).Should(Succeed())
	relay := store.New(db, store.Options{})
	figure := func() int64 {
		stats, err := relay.Stats(ctx)
		Expect(err).NotTo(HaveOccurred())
		return stats.BacklogEvents
	}
	figure() // asks for a count of a large backlog
	for more := true; more; {
		var err error
		more, err = relay.CountBacklog(ctx)
		Expect(err).NotTo(HaveOccurred())
	}
	var outbox counted
	Expect(db.GetContext(ctx, &outbox, countedSQL)).To(Succeed())
	Expect(figure()).To(isBacklog(outbox), "%+v", outbox)
}

// isBacklog accepts the exact number of events that are not late, or, from 10,000 events on,
// a number within 5 % of it.
func isBacklog(outbox counted) OmegaMatcher {
	expected := outbox.Events - outbox.Late
	if expected < 10_000 {
		return BeNumerically("==", expected)
	}
	return BeNumerically("~", expected, expected/20)
}

var _ = Describe("The backlog's figure of a relay", func() {
	It("is the number of waiting events, whatever has happened to their ids", func(ctx SpecContext) {
		s := newSystem(ctx)
		proxy, through := faults.StartProxyTo(s.ClickHouse.Native)
		relay := s.Relay(through, slices.Concat(small, brisk)...)
		late := s.Postgres.MustBegin()
		defer func() { _ = late.Rollback() }()
		Expect(s.PublishIn(ctx, late, system.Events(10)...)).To(Succeed())
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		s.AwaitEmpty(ctx)
		proxy.Lead("127.0.0.1:1")
		proxy.Reset()
		published := perBatch
		insert := func(n int) {
			GinkgoHelper()
			s.Postgres.MustExecContext(ctx, "INSERT INTO outbox_events (event_type, event_context) SELECT 'thing_happened', '{}' FROM generate_series(1, $1::int)", n)
			published += n
		}
		// expect compares the figure of the running relay, too. ClickHouse is dead, so the
		// number of events does not change.
		expect := func(lateCommits int64) {
			GinkgoHelper()
			expectBacklog(ctx, s)
			var outbox counted
			Expect(s.Postgres.GetContext(ctx, &outbox, countedSQL)).To(Succeed())
			Expect(outbox.Late).To(Equal(lateCommits))
			Eventually(ctx, relay.Metric).WithArguments("diehard_outbox_backlog_events").WithTimeout(patience).Should(isBacklog(outbox))
		}

		By("publishing while ClickHouse is dead")
		insert(10 * perBatch)
		awaitNotReady(ctx, relay)
		expect(0)

		By("committing late")
		Expect(late.Commit()).To(Succeed())
		published += 10
		expect(10)

		By("leaving gaps between the ids")
		for range 4 {
			s.Postgres.MustExecContext(ctx, "SELECT setval('outbox_events_id_seq', nextval('outbox_events_id_seq') + 100000)")
			insert(4_000)
		}
		expect(10)

		By("setting the cursor back")
		s.Postgres.MustExecContext(ctx, "UPDATE outbox_cursor SET low_watermark = 0, next_low_watermark = 0, high_watermark = 0")
		expect(0)

		proxy.Lead(hostOf(s.ClickHouse.Native))
		awaitReady(ctx, relay)
		expectOnce(ctx, s, outcome{Fault: "cursor set back while events wait", Done: "PostgreSQL, and ClickHouse is dead", Events: published})
	})
})
