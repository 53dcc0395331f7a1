package chaos_test

import (
	"context"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("A table without a deduplication window", func() {
	spoil := func(ctx context.Context, s *system.System) {
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 0")
	}

	DescribeTable("prevents a relay from starting until the operator runs the statement in its log, over", func(ctx SpecContext, protocol string) {
		s := newSystem(ctx)
		spoil(ctx, s)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		refused := s.LaunchRelay(s.ClickHouseDSN(protocol), small...)
		refused.EndsWith(1)
		rows, _ := s.Arrived(ctx, Default)
		Expect(rows).To(BeZero())
		remedy := remedies(refused)
		Expect(remedy).To(HaveLen(1))
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, remedy[0])
		s.Relay(s.ClickHouseDSN(protocol), small...)
		expectOnce(ctx, s, outcome{Fault: "table without a deduplication window", Done: "a relay starts, over " + protocol, Events: perBatch})
	}, Entry(nil, "native"), Entry(nil, "http"))

	It("prevents a running relay from inserting after an outage until the operator runs the statement in its log", func(ctx SpecContext) {
		s := newSystem(ctx)
		proxy, dsn := faults.StartProxyTo(s.ClickHouse.Native)
		relay := s.Relay(dsn, small...)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		awaitArrivalOf(ctx, s, perBatch)
		s.AwaitEmpty(ctx)
		spoil(ctx, s)
		proxy.Down()
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		awaitNotReady(ctx, relay)
		proxy.Up()
		Eventually(ctx, func() []string { return remedies(relay) }).WithTimeout(patience).Should(HaveLen(1))
		awaitNotReady(ctx, relay)
		rows, _ := s.Arrived(ctx, Default)
		Expect(rows).To(Equal(perBatch))
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, remedies(relay)[0])
		awaitReady(ctx, relay)
		expectOnce(ctx, s, outcome{Fault: "table loses its deduplication window", Done: "a relay runs", Events: 2 * perBatch})
	})
})

// remedies returns the statements in the program's log that repair its table.
func remedies(p *programs.Process) (all []string) {
	GinkgoHelper()
	for _, record := range p.Log() {
		text, ok := record["err"].(string)
		if _, remedy, found := strings.Cut(text, "; to fix it: "); ok && found {
			all = append(all, remedy)
		}
	}
	return all
}
