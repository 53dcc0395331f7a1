package integration_test

import (
	"fmt"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("Behind PgBouncer in transaction mode", func() {
	It("delivers every event once, also when relays are killed", func(ctx SpecContext) {
		s := newSystem(ctx)
		through := testengines.StartPgBouncer(ctx, s.PostgresDSN, 12)
		pooled := "DIEHARD_POSTGRES_DSN=" + through
		api := s.API(pooled)
		launch := func(env ...string) *programs.Process {
			GinkgoHelper()
			return s.Relay(s.ClickHouse.Native, append([]string{pooled, "DIEHARD_RELAY_BATCH_MAX_ROWS=50", "DIEHARD_RELAY_LINGER=1ms", "DIEHARD_RELAY_POLL_INTERVAL=200ms"}, env...)...)
		}
		relay, other := launch(), launch("DIEHARD_POSTGRES_LISTEN_DSN="+s.PostgresDSN)
		Expect(other.Metric("diehard_relay_listening")).To(Equal(1.0))
		Expect(relay.Metric("diehard_relay_listening")).To(Equal(0.0))
		Expect(relay.Messages()).To(ContainElement("postgresql notifications unavailable behind a pooler, polling"))
		Expect(other.Messages()).NotTo(ContainElement(ContainSubstring("behind a pooler")))

		const users, events, kills = 20, 300, 4
		for i := range users {
			system.Create(ctx, api, system.NewUser{Email: fmt.Sprintf("ada.%d@example.com", i)})
		}
		for range kills {
			Expect(s.Publish(ctx, system.Events(events)...)).To(Succeed())
			relay.Kill()
			relay = launch()
		}
		s.ExpectDelivered(ctx, users+kills*events)
		relay.Stop()
		other.Stop()
		api.Stop()

		By("leaving nothing in the sessions of the pooler")
		db := testengines.OpenPostgres(through, nil)
		for query, want := range map[string]string{
			"SHOW lock_timeout": "0", "SHOW idle_in_transaction_session_timeout": "0", "SHOW enable_seqscan": "on", "SHOW row_security": "on",
			"SELECT count(*) FROM pg_prepared_statements": "0", "SELECT count(*) FROM pg_listening_channels()": "0",
			"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'": "0",
		} {
			var found string
			Expect(db.GetContext(ctx, &found, query)).To(Succeed())
			Expect(found).To(Equal(want), query)
		}
	})

	It("is checked for the connections that the workers need", func(ctx SpecContext) {
		s := newSystem(ctx)
		check := func(code, size int, env ...string) string {
			GinkgoHelper()
			p := programs.Run(suite.Prepared(), "relay", []string{"check"}, append([]string{
				"DIEHARD_POSTGRES_DSN=" + testengines.StartPgBouncer(ctx, s.PostgresDSN, size), "DIEHARD_CLICKHOUSE_DSN=" + s.ClickHouse.Native,
			}, env...)...)
			p.EndsWith(code)
			return string(p.Out.Contents())
		}
		Expect(check(1, 3)).To(MatchRegexp(`FAILED +postgresql pooler +the pooler gives 3 connections to the server at a time, but this relay needs 4: one for each worker and two more`))
		Expect(check(0, 4)).To(MatchRegexp(`ok +postgresql pooler +shares sessions; 4 connections at a time; no notifications, because postgres\.listen_dsn is not set: the relay polls`))
		Expect(check(0, 5, "DIEHARD_RELAY_WORKERS=3", "DIEHARD_POSTGRES_LISTEN_DSN="+s.PostgresDSN)).To(MatchRegexp(`ok +postgresql pooler +shares sessions; 5 connections at a time; notifications by postgres\.listen_dsn`))
	})
})
