package chaos_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("A relay that is suspended", func() {
	for _, stop := range []struct {
		point  failpoint.Point
		unsent bool // starts with a batch that has a recorded attempt, but was not inserted
		holds  bool // keeps its batch until PostgreSQL ends the lease
	}{
		{point: failpoint.CutLocked},
		{point: failpoint.CutBeforeCommit},
		{point: failpoint.FlushRead, holds: true},
		{point: failpoint.FlushBegun, holds: true},
		{point: failpoint.FlushAcknowledged, holds: true},
		{point: failpoint.ResolveChecked, unsent: true, holds: true},
		{point: failpoint.SettleDeleted, holds: true},
	} {
		It(fmt.Sprintf("does not block the fleet, and does no harm when it is resumed, at %s", stop.point), func(ctx SpecContext) {
			s := newSystem(ctx)
			if stop.unsent {
				unsent(ctx, s)
			} else {
				Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			}
			env := slices.Concat(small, brisk)
			stopped := s.LaunchRelay(s.ClickHouse.Native, append(env, fmt.Sprintf("FAILPOINT=%s=stop", stop.point))...)
			awaitMessage(ctx, stopped, "failpoint reached")
			s.Relay(s.ClickHouse.Native, env...)
			if stop.holds {
				before, _ := s.Arrived(ctx, Default)
				Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
				awaitArrivalOf(ctx, s, before+perBatch)
				Eventually(ctx, func(g Gomega) {
					left, _, _ := s.Left(g)
					g.Expect(left).To(Equal(perBatch), "the held batch must still be in the outbox")
				}).WithTimeout(patience).WithPolling(10 * time.Millisecond).Should(Succeed())
			} else {
				Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			}
			s.AwaitEmpty(ctx)
			stopped.Signal(syscall.SIGCONT)
			awaitReady(ctx, stopped)
			Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			expectOnce(ctx, s, outcome{Fault: "relay suspended and resumed", Done: "at " + string(stop.point), Events: 3 * perBatch})
		})
	}
})

var _ = Describe("A fleet", func() {
	It("delivers each event once while relays join, leave and are killed at random", Label("long"), func(ctx SpecContext) {
		s := newSystem(ctx)
		stop := produce(ctx, s)
		var fleet []*programs.Process
		join := func() {
			fleet = append(fleet, s.LaunchRelay(s.ClickHouseDSN([]string{"native", "http"}[rand.IntN(2)]), slices.Concat(small, brisk)...)) //nolint:gosec // chance
		}
		for _, size := range []int{1, 2, 4, 8, 3} {
			for len(fleet) < size {
				join()
			}
			for len(fleet) > size {
				fleet[0].Stop()
				fleet = fleet[1:]
			}
			awaitArrival(ctx, s, 3*perBatch)
			victim := rand.IntN(len(fleet)) //nolint:gosec // chance
			fleet[victim].Kill()
			fleet = slices.Delete(fleet, victim, victim+1)
			join()
		}
		expectOnce(ctx, s, outcome{Fault: "relays join, leave and are killed", Done: "1, 2, 4, 8 and 3 relays", Events: stop()})
	})

	It("cuts batches of the same size with one relay and with eight", func(ctx SpecContext) {
		const total, maxRows = 20_000, 1000
		inserts := func(relays int) int {
			s := newSystem(ctx)
			for range total / maxRows {
				Expect(s.Publish(ctx, system.Events(maxRows)...)).To(Succeed())
			}
			for range relays {
				s.LaunchRelay(s.ClickHouse.Native, fmt.Sprint("DIEHARD_RELAY_BATCH_MAX_ROWS=", maxRows))
			}
			expectOnce(ctx, s, outcome{Fault: "none", Done: fmt.Sprintf("a fleet of %d", relays), Events: total})
			return parts(ctx, s)
		}
		Expect(inserts(1)).To(Equal(total / maxRows))
		Expect(inserts(8)).To(Equal(total / maxRows))
	})

	It("cuts no more often with eight relays than the linger allows", func(ctx SpecContext) {
		const linger = 200 * time.Millisecond
		s := newSystem(ctx)
		for range 8 {
			s.LaunchRelay(s.ClickHouse.Native, fmt.Sprint("DIEHARD_RELAY_LINGER=", linger))
		}
		stop := produce(ctx, s)
		awaitArrival(ctx, s, 1)
		var before, after struct {
			Cuts int       `db:"cuts"`
			At   time.Time `db:"last_cut_at"`
		}
		Expect(s.Postgres.Get(&before, "SELECT cuts, last_cut_at FROM outbox_cursor")).To(Succeed())
		awaitArrival(ctx, s, 2000)
		expectOnce(ctx, s, outcome{Fault: "none", Done: "8 relays, a thousand events a second", Events: stop()})
		Expect(s.Postgres.Get(&after, "SELECT cuts, last_cut_at FROM outbox_cursor")).To(Succeed())
		Expect(after.Cuts - before.Cuts).To(BeNumerically("<=", int(after.At.Sub(before.At)/linger)))
	})

	It("delivers events of a late commit", func(ctx SpecContext) {
		s := newSystem(ctx)
		late := s.Postgres.MustBegin()
		defer func() { _ = late.Rollback() }()
		Expect(s.PublishIn(ctx, late, system.Events(perBatch)...)).To(Succeed())
		s.Relay(s.ClickHouse.Native, small...)
		published := 0
		Eventually(ctx, func(g Gomega) { // until the ids are below the low watermark
			g.Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			published += perBatch
			var lowWatermark int
			g.Expect(s.Postgres.Get(&lowWatermark, "SELECT low_watermark FROM outbox_cursor")).To(Succeed())
			g.Expect(lowWatermark).To(BeNumerically(">", perBatch))
		}).WithTimeout(patience).Should(Succeed())
		Expect(late.Commit()).To(Succeed())
		expectOnce(ctx, s, outcome{Fault: "late commit", Done: "below the low watermark", Events: published + perBatch})
	})
})

var _ = Describe("A claimed batch whose row is locked by another claim", func() {
	It("gets its first attempt when the other claim ends", func(ctx SpecContext) {
		s := newSystem(ctx)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		relay := s.LaunchRelay(s.ClickHouse.Native, slices.Concat(small, []string{fmt.Sprintf("FAILPOINT=%s=stop", failpoint.ClaimMarked)})...)
		awaitMessage(ctx, relay, "failpoint reached")
		// A claim excludes other claims for a second. The spec extends this time to
		// an hour, so that it does not depend on the machine's speed.
		s.Postgres.MustExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = now() + interval '1 hour'")
		other := s.Postgres.MustBegin()
		defer func() { _ = other.Rollback() }()
		other.MustExecContext(ctx, "SELECT FROM outbox_batches FOR UPDATE")
		relay.Signal(syscall.SIGCONT)
		Eventually(ctx, func(g Gomega) {
			var waiting int
			g.Expect(s.Postgres.Get(&waiting, `SELECT count(*) FROM pg_stat_activity
				WHERE datname = current_database() AND wait_event_type = 'Lock'`)).To(Succeed())
			g.Expect(waiting).To(Equal(1))
		}).WithTimeout(patience).Should(Succeed())
		Expect(other.Rollback()).To(Succeed())
		expectOnce(ctx, s, outcome{Fault: "none", Done: "two claims of one batch at once", Events: perBatch})
		relay.AwaitMetric(`diehard_relay_batches_total{result="settled"}`, 1)
	})
})

var _ = Describe("A batch whose attempt the deduplication window has forgotten", func() {
	for _, arrived := range []int{0, 7, perBatch} {
		It(fmt.Sprintf("is checked for presence, and only the absent events are inserted, if %d of its %d events are present", arrived, perBatch), func(ctx SpecContext) {
			s := newSystem(ctx)
			unsent(ctx, s)
			if arrived > 0 {
				insertUnderToken(ctx, s, arrived)
			}
			pushOut(ctx, s)
			s.Relay(s.ClickHouse.Native, small...)
			s.AwaitEmpty(ctx)
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP PARTITION 200001")
			expectOnce(ctx, s, outcome{Fault: "batch older than the deduplication window", Done: fmt.Sprintf("%d of %d events present", arrived, perBatch), Events: perBatch})
		})
	}
})

var _ = Describe("A relay that is suspended before its insert until ClickHouse has forgotten the token", func() {
	DescribeTable("inserts nothing when it continues", func(ctx SpecContext, point failpoint.Point, protocol string) {
		s := newSystem(ctx)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		env := slices.Concat(small, brisk)
		stopped := s.LaunchRelay(s.ClickHouseDSN(protocol), append(env, fmt.Sprintf("FAILPOINT=%s=stop", point))...)
		awaitMessage(ctx, stopped, "failpoint reached")
		s.Relay(s.ClickHouse.Native, env...)
		s.AwaitEmpty(ctx)
		pushOut(ctx, s)
		stopped.Signal(syscall.SIGCONT)
		awaitReady(ctx, stopped)
		stopped.Stop() // returns when the relay has ended its work
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP PARTITION 200001")
		expectOnce(ctx, s, outcome{Fault: "relay suspended until the deduplication window has passed", Done: fmt.Sprintf("at %s, over %s", point, protocol), Events: perBatch})
	},
		Entry("over the native protocol", failpoint.FlushRead, "native"),
		Entry("over the native protocol, during the statement", failpoint.FlushBegun, "native"),
		Entry("over HTTP", failpoint.FlushRead, "http"),
		Entry("over HTTP, during the statement", failpoint.FlushBegun, "http"),
	)
})

// pushOut inserts other blocks until ClickHouse has forgotten all earlier tokens. For this
// time it reduces the deduplication window to three blocks.
func pushOut(ctx context.Context, s *system.System) {
	GinkgoHelper()
	setWindow := func(blocks int) {
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
			fmt.Sprintf("ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = %d", blocks))
	}
	setWindow(3)
	defer setWindow(10_000)
	for n := range 4 {
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, fmt.Sprintf(`INSERT INTO event_log SETTINGS insert_deduplication_token = 'other-%d', async_insert = 0
			VALUES (generateUUIDv4(), 'other', '2000-01-01 00:00:00', 'Test', '{}', 1)`, n))
	}
}

// parts returns the number of parts, which is the number of inserts if no merge runs.
func parts(ctx context.Context, s *system.System) (n int) {
	GinkgoHelper()
	Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT count() FROM system.parts "+
		"WHERE database = currentDatabase() AND table = 'event_log' AND active", &n)).To(Succeed())
	return n
}
