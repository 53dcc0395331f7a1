package chaos_test

import (
	"io"
	"net/http"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("A relay whose events are stalled", Label("long"), func() {
	DescribeTable("names the session that has locked, with default settings, and continues after it:", func(ctx SpecContext, statement, reason string) {
		s := newSystem(ctx)
		session, err := testengines.OpenPostgres(s.PostgresDSN, map[string]string{"application_name": "psql of Ada"}).BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { _ = session.Rollback() })
		relay := s.Relay(s.ClickHouse.Native)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		s.AwaitEmpty(ctx)
		_, err = session.ExecContext(ctx, statement)
		Expect(err).NotTo(HaveOccurred())
		published := make(chan error, 1)
		go func() { published <- s.Publish(ctx, system.Events(perBatch)...) }() // may wait for the session
		Eventually(ctx, func(g Gomega) {
			response, err := http.Get(relay.AdminURL() + "/readyz")
			g.Expect(err).NotTo(HaveOccurred())
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(string(body)).To(And(ContainSubstring("stalled: "), ContainSubstring(reason), ContainSubstring("psql of Ada")))
		}).WithTimeout(patience).Should(Succeed())
		relay.AwaitMetric("diehard_relay_stalled", 1)
		Expect(relay.Messages()).To(ContainElement("delivery stalled"))
		Expect(session.Rollback()).To(Succeed())
		Eventually(ctx, published).WithTimeout(patience).Should(Receive(Succeed()))
		relay.AwaitMetric("diehard_relay_stalled", 0)
		s.ExpectDelivered(ctx, 2*perBatch)
		awaitReady(ctx, relay)
		Expect(relay.Messages()).To(ContainElement("delivery continues"))
	},
		Entry("the cursor", "SELECT FROM outbox_cursor FOR UPDATE", "has locked the row of outbox_cursor"),
		Entry("the table of events", "LOCK TABLE outbox_events", "holds the lock AccessExclusiveLock of outbox_events"),
	)
})
