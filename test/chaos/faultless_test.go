package chaos_test

import (
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("Without faults, a relay", func() {
	It("sends one insert for each batch, and never checks presence", func(ctx SpecContext) {
		const batches = 20
		s := newSystem(ctx)
		gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
		relay := s.Relay(through, small...)
		checks := len(gateway.Statements())
		Expect(s.Publish(ctx, system.Events(batches*perBatch)...)).To(Succeed())
		expectOnce(ctx, s, outcome{Fault: "none", Done: "1 relay", Events: batches * perBatch})
		relay.AwaitMetric(`diehard_relay_batches_total{result="settled"}`, batches)

		inserts := 0
		for _, statement := range gateway.Statements()[checks:] {
			if strings.HasPrefix(statement, "INSERT INTO `event_log`") {
				inserts++
				continue
			}
			// A new connection may reach an upgraded server, so the relay reads its version,
			// its settings and its range of times.
			Expect(statement).To(Or(HavePrefix("SELECT displayName(), version()"), ContainSubstring("FROM system.settings"),
				ContainSubstring("toUnixTimestamp64Micro(toDateTime64('0001-01-01")))
		}
		Expect(inserts).To(Equal(batches))
	})
})
