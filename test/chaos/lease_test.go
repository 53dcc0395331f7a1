package chaos_test

import (
	"context"
	"slices"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("A lease that PostgreSQL ends during an insert", func() {
	for _, protocol := range []string{"native", "http"} {
		It("stores each event once if the insert completes after another relay has delivered the batch: "+protocol, func(ctx SpecContext) {
			s := newSystem(ctx)
			way, orphaned := orphan(ctx, s, protocol, system.Events(perBatch)...)
			s.Relay(s.ClickHouseDSN(protocol), small...)
			s.AwaitEmpty(ctx)
			way.Release()
			awaitMessage(ctx, orphaned, "outbox unavailable") // its insert was acknowledged, but it cannot settle
			awaitReady(ctx, orphaned)
			expectOnce(ctx, s, outcome{Fault: "lease ended during an insert that completes later", Done: "after another relay's delivery, over " + protocol, Events: perBatch})
		})

		It("stores each event once if the insert completes between another relay's presence check and insert: "+protocol, func(ctx SpecContext) {
			s := newSystem(ctx)
			way, orphaned := orphan(ctx, s, protocol, system.Events(perBatch)...)
			other := s.LaunchRelay(s.ClickHouseDSN(protocol), slices.Concat(small, []string{"FAILPOINT=" + string(failpoint.ResolveChecked) + "=stop"})...)
			awaitMessage(ctx, other, "failpoint reached")
			way.Release()
			awaitArrivalOf(ctx, s, perBatch)
			other.Signal(syscall.SIGCONT)
			awaitReady(ctx, orphaned)
			expectOnce(ctx, s, outcome{Fault: "lease ended during an insert that completes later", Done: "before another relay's insert, over " + protocol, Events: perBatch})
		})
	}
})

// orphan starts an insert of the events and delays it on its way to ClickHouse. The relay of
// the insert has lost its lease and has not noticed it.
func orphan(ctx context.Context, s *system.System, protocol string, events ...outbox.Event) (way *faults.Proxy, relay *programs.Process) {
	GinkgoHelper()
	way, through := faults.StartProxyTo(s.ClickHouseDSN(protocol))
	// A second worker could claim the batch, and its insert would be delayed too.
	relay = s.Relay(through, slices.Concat(small, []string{"DIEHARD_RELAY_WORKERS=1"})...)
	way.HoldFrom(faults.Requests, map[string]string{"native": "INSERT INTO", "http": "INSERT+INTO"}[protocol])
	Expect(s.Publish(ctx, events...)).To(Succeed())
	Eventually(ctx, way.Held).WithTimeout(patience).ShouldNot(BeZero())
	var ended []bool
	Expect(s.Postgres.Select(&ended, `SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)
		WHERE datname = current_database() AND relation = 'outbox_batches'::regclass
			AND mode = 'RowShareLock' AND state = 'idle in transaction'`)).To(Succeed())
	Expect(ended).To(Equal([]bool{true}), "the session of the lease was ended")
	return way, relay
}

var _ = Describe("A relay that loses its network to PostgreSQL while it holds a lease", func() {
	It("is replaced by another relay, and is ready again when the network recovers", func(ctx SpecContext) {
		s := newSystem(ctx)
		network, through := faults.StartProxyTo(s.PostgresDSN)
		way, clickHouse := faults.StartProxyTo(s.ClickHouse.Native)
		env := slices.Concat(small, []string{"DIEHARD_RELAY_FLUSH_TIMEOUT=1s"})
		vanished := s.Relay(clickHouse, slices.Concat(env, []string{"DIEHARD_POSTGRES_DSN=" + through})...)
		way.HoldFrom(faults.Requests, "INSERT INTO")
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		Eventually(ctx, way.Held).WithTimeout(patience).ShouldNot(BeZero())
		network.Vanish()
		s.Relay(s.ClickHouse.Native, env...)
		awaitNotReady(ctx, vanished)
		s.AwaitEmpty(ctx) // PostgreSQL ends the lease when its session has been idle too long
		way.Release()
		network.Return()
		awaitReady(ctx, vanished)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		expectOnce(ctx, s, outcome{Fault: "relay loses its network while it holds a lease", Done: "between relay and PostgreSQL", Events: 2 * perBatch})
	})
})
