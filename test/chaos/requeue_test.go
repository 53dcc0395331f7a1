package chaos_test

import (
	"context"
	"errors"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("Requeued dead letters", func() {
	// deadLetterBatch makes dead letters of all events of the only batch.
	deadLetterBatch := func(ctx context.Context, s *system.System) {
		GinkgoHelper()
		relay := store.New(testengines.OpenStore(s.PostgresDSN, store.Session(time.Minute)), store.Options{})
		var lease *store.Lease
		Eventually(ctx, func(g Gomega) {
			_, err := s.Postgres.ExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = '-infinity'")
			g.Expect(err).NotTo(HaveOccurred())
			lease, err = relay.Claim(ctx, 1<<40, true)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(lease).NotTo(BeNil())
		}).WithTimeout(patience).Should(Succeed())
		keys, err := lease.Keys(ctx)
		Expect(err).NotTo(HaveOccurred())
		var refused []store.Refused
		for _, id := range keys.ID {
			refused = append(refused, store.Refused{ID: id, Cause: errors.New("refused by the spec")})
		}
		Expect(lease.Shrink(ctx, store.Outcome{Refused: refused}, nil)).To(Succeed())
	}

	retry := func(s *system.System, ids ...string) {
		GinkgoHelper()
		programs.Run(suite.Prepared(), "relay", append([]string{"dead-letters", "retry", "--yes"}, ids...),
			"DIEHARD_POSTGRES_DSN="+s.PostgresDSN, "DIEHARD_CLICKHOUSE_DSN="+s.ClickHouse.Native).EndsWith(0)
	}

	for _, protocol := range []string{"native", "http"} {
		It("are not doubled by an insert of their batch that begins after they were delivered: "+protocol, func(ctx SpecContext) {
			s := newSystem(ctx)
			at := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
			way, orphaned := orphan(ctx, s, protocol, system.Event(outbox.WithTime(at)), system.Event(outbox.WithTime(at)),
				system.Event(outbox.WithTime(at.AddDate(0, 1, 0))))
			deadLetterBatch(ctx, s)
			retry(s, "1")
			other := s.Relay(s.ClickHouseDSN(protocol), small...)
			s.AwaitEmpty(ctx)
			rows, _ := s.Arrived(ctx, Default)
			Expect(rows).To(Equal(1))
			way.Release()
			awaitArrivalOf(ctx, s, 2) // ClickHouse has the token for the month of the first event only
			awaitMessage(ctx, orphaned, "outbox unavailable")

			retry(s, "2", "3")
			expectOnce(ctx, s, outcome{
				Fault: "insert begins after a dead letter of its batch was retried and delivered", Done: "over " + protocol, Events: 3,
			})
			renewed := slices.Concat(orphaned.Messages(), other.Messages())
			Expect(renewed).To(ContainElement("renewing insert token"), "ClickHouse has dropped the second event under the token")
		})
	}

	It("of one batch arrive once each, the second under a new token", func(ctx SpecContext) {
		s := newSystem(ctx)
		Expect(s.Publish(ctx, system.Events(2)...)).To(Succeed())
		unsentBatch := store.New(testengines.OpenStore(s.PostgresDSN, store.Session(time.Minute)), store.Options{})
		Expect(unsentBatch.Cut(ctx, 0)).To(HaveField("Events", 2))
		deadLetterBatch(ctx, s)
		retry(s, "1")
		retry(s, "2")
		relay := s.Relay(s.ClickHouse.Native, small...)
		expectOnce(ctx, s, outcome{Fault: "none", Done: "2 dead letters of one batch, retried one by one", Events: 2})
		awaitMessage(ctx, relay, "renewing insert token")
	})
})
