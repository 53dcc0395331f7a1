package chaos_test

import (
	"context"
	"slices"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/test/faults"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("A lease that PostgreSQL ends in the middle of an insert", func() {
	// orphan leaves an insert of a batch on its way to ClickHouse, whose relay
	// has lost the lease and does not know it yet.
	orphan := func(ctx context.Context, s *system.System) (way *faults.Proxy, relay *programs.Process) {
		GinkgoHelper()
		way, through := faults.StartProxyTo(s.ClickHouse.Native)
		relay = s.Relay(through, small...)
		way.Hold(faults.Requests, mostOfAnInsert)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		Eventually(ctx, way.Held).WithTimeout(patience).ShouldNot(BeZero())
		var ended []bool
		Expect(s.Postgres.Select(&ended, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name = 'diehard-relay' AND state = 'idle in transaction'`)).To(Succeed())
		Expect(ended).To(Equal([]bool{true}), "the session of the lease was ended")
		return way, relay
	}

	It("leaves each event once though the insert lands when another relay has delivered the batch", func(ctx SpecContext) {
		s := newSystem(ctx)
		way, orphaned := orphan(ctx, s)
		s.Relay(s.ClickHouse.Native, small...)
		s.AwaitEmpty(ctx)
		way.Release()
		awaitMessage(ctx, orphaned, "the outbox cannot be worked on") // it was answered, and cannot settle
		awaitReady(ctx, orphaned)
		expectOnce(ctx, s, outcome{Fault: "lease ended in an insert that lands later", Done: "after another relay's delivery", Events: perBatch})
	})

	It("leaves each event once though the insert lands between another relay's question and its insert", func(ctx SpecContext) {
		s := newSystem(ctx)
		way, orphaned := orphan(ctx, s)
		other := s.LaunchRelay(s.ClickHouse.HTTP, slices.Concat(small, []string{"FAILPOINT=" + string(failpoint.ResolveAsked) + "=stop"})...)
		awaitMessage(ctx, other, "failpoint reached")
		way.Release()
		awaitArrivalOf(ctx, s, perBatch)
		other.Signal(syscall.SIGCONT)
		awaitReady(ctx, orphaned)
		expectOnce(ctx, s, outcome{Fault: "lease ended in an insert that lands later", Done: "before another relay's insert", Events: perBatch})
	})
})
