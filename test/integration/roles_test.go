package integration_test

import (
	"fmt"
	"os"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("The roles of deploy/postgres/roles.sql", func() {
	It("let each program do its work, and nothing else", func(ctx SpecContext) {
		source, err := os.ReadFile("../../deploy/postgres/roles.sql")
		Expect(err).NotTo(HaveOccurred())
		// Roles belong to the server, which other specs use.
		prefix := fmt.Sprintf("roles_%d_%d_", GinkgoParallelProcess(), time.Now().UnixNano())
		roles := strings.ReplaceAll(strings.ReplaceAll(string(source), "diehard_", prefix), prefix+"outbox_version", "diehard_outbox_version")
		for _, object := range []string{"users_version", "server'", "backlog_bytes'", "publish'"} {
			roles = strings.ReplaceAll(roles, prefix+object, "diehard_"+object)
		}
		s := system.New(suite.Prepared(), suite.EmptyPostgresDSN(ctx), suite.EmptyClickHouseDSNs(ctx))
		DeferCleanup(func(ctx SpecContext) {
			for _, role := range []string{"api", "relay", "operator", "publisher", "migrations"} {
				s.Postgres.MustExecContext(ctx, "DROP OWNED BY "+prefix+role+" CASCADE; DROP ROLE "+prefix+role)
			}
		})
		as := func(role string) []string {
			return []string{"DIEHARD_POSTGRES_DSN=" + withParameter(s.PostgresDSN, "role", prefix+role), "DIEHARD_CLICKHOUSE_DSN=" + s.ClickHouse.Native}
		}
		run := func(role, program string, args ...string) string {
			GinkgoHelper()
			p := programs.Run(suite.Prepared(), program, args, as(role)...)
			p.EndsWith(0)
			return string(p.Out.Contents())
		}
		s.Postgres.MustExecContext(ctx, roles)
		s.Postgres.MustExecContext(ctx, "ALTER DEFAULT PRIVILEGES FOR ROLE "+prefix+"migrations REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
		run("migrations", "relay", "migrate")
		run("migrations", "api", "migrate")
		s.Postgres.MustExecContext(ctx, roles)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "SYSTEM STOP MERGES event_log")
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_refunds CHECK event_type != 'refund_requested'")

		By("creating, changing and deleting a user, and publishing")
		api := s.API(as("api")...)
		relay := s.Relay(s.ClickHouse.Native, as("relay")...)
		id := system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		changed, err := system.Send(ctx, "PATCH", api.URL()+"/v1/users/"+id, map[string]string{"first_name": "Ada"},
			"Content-Type: application/merge-patch+json", "Idempotency-Key: k")
		Expect(err).NotTo(HaveOccurred())
		Expect(changed.Status).To(Equal(200), "%v", changed.Body)
		deleted, err := system.Send(ctx, "DELETE", api.URL()+"/v1/users/"+id, nil)
		Expect(err).NotTo(HaveOccurred())
		Expect(deleted.Status).To(Equal(204), "%v", deleted.Body)
		publisher := system.New(suite.Prepared(), withParameter(s.PostgresDSN, "role", prefix+"publisher"), s.ClickHouse)
		Expect(publisher.Publish(ctx, append(system.Events(4), system.Event(outbox.WithType("refund_requested")))...)).To(Succeed())
		publisher.Postgres.MustExecContext(ctx, "SELECT diehard_publish('thing_happened', '{}')")

		By("operating")
		Eventually(func(g Gomega) int { _, _, dead := s.Left(g); return dead }).WithTimeout(patience).Should(Equal(1))
		Expect(run("relay", "relay", "check")).NotTo(ContainSubstring("FAILED"))
		Expect(run("operator", "relay", "pause")).To(Equal("paused\n"))
		Expect(run("operator", "relay", "resume")).To(Equal("resumed\n"))
		run("operator", "relay", "batches", "list")
		Expect(run("operator", "relay", "dead-letters", "show", "1")).To(ContainSubstring("refund_requested"))
		Expect(run("operator", "relay", "dead-letters", "resume")).To(Equal("the fuse has not blown\n"))
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP CONSTRAINT no_refunds")
		Expect(run("operator", "relay", "dead-letters", "retry", "--all", "--yes")).To(ContainSubstring("1 dead letter retried"))
		s.ExpectDelivered(ctx, 9)
		Expect(run("operator", "relay", "status")).To(HavePrefix("Delivering: no event waits."))
		relay.Stop()
		Expect(relay.Messages()).NotTo(ContainElement(Or(Equal("relay missing from fleet"), Equal("housekeeping failed"))))

		By("trying what each role may not do")
		for role, statements := range map[string][]string{
			"api":       {"SELECT FROM outbox_events", "DELETE FROM outbox_events", "SELECT FROM outbox_batches", "SELECT FROM outbox_dead_letters", "CREATE TABLE public.t ()"},
			"publisher": {"SELECT FROM outbox_events", "INSERT INTO outbox_events (id, event_type, event_context) OVERRIDING SYSTEM VALUE VALUES (1, 'x', '{}')", "SELECT FROM users", "SELECT FROM outbox_dead_letters", "DELETE FROM outbox_events"},
			"relay":     {"SELECT FROM users", "SELECT FROM idempotency_keys", "INSERT INTO outbox_events (event_type, event_context) VALUES ('x', '{}')", "UPDATE outbox_pause SET paused_at = now()", "TRUNCATE outbox_events", "DROP TABLE outbox_events"},
			"operator":  {"SELECT FROM users", "DELETE FROM outbox_events", "DELETE FROM outbox_batches", "DELETE FROM outbox_audit", "UPDATE outbox_audit SET actor = 'x'", "TRUNCATE outbox_dead_letters"},
		} {
			db := testengines.OpenPostgres(withParameter(s.PostgresDSN, "role", prefix+role), nil)
			for _, statement := range statements {
				_, err := db.ExecContext(ctx, statement)
				Expect(err).To(MatchError(Or(ContainSubstring("permission denied"), ContainSubstring("must be owner"))), "%s: %s", role, statement)
			}
		}
	})
})
