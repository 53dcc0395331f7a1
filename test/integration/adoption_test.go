package integration_test

import (
	"net/url"
	"os/exec"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("In another application's database", func() {
	const schema = `The "Shop"'s events`

	var (
		s   *system.System
		env []string
	)

	BeforeEach(func(ctx SpecContext) {
		s = system.New(suite.Prepared(), suite.EmptyPostgresDSN(ctx), suite.EmptyClickHouseDSNs(ctx))
		s.Postgres.MustExecContext(ctx, "CREATE TABLE users (name text)")
		env = []string{
			"DIEHARD_POSTGRES_DSN=" + s.PostgresDSN, "DIEHARD_CLICKHOUSE_DSN=" + s.ClickHouse.Native,
			"DIEHARD_RELAY_BACKOFF_MIN=10ms", "DIEHARD_RELAY_BACKOFF_MAX=200ms",
		}
	})

	// inSchema returns a system that uses the tables of the schema.
	inSchema := func() *system.System {
		GinkgoHelper()
		dsn, err := url.Parse(s.PostgresDSN)
		Expect(err).NotTo(HaveOccurred())
		query := dsn.Query()
		query.Set("search_path", `"`+strings.ReplaceAll(schema, `"`, `""`)+`"`)
		dsn.RawQuery = query.Encode()
		return system.New(suite.Prepared(), dsn.String(), s.ClickHouse)
	}

	It("works with only the relay's tables if the application has a table users", func(ctx SpecContext) {
		programs.Run(suite.Prepared(), "relay", []string{"migrate"}, env...).Ended()
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "SYSTEM STOP MERGES event_log")
		programs.Serve(suite.Prepared(), "relay", env...).AwaitReady()
		Expect(s.Publish(ctx, system.Events(3)...)).To(Succeed())
		s.ExpectDelivered(ctx, 3)
	})

	It("works in its own schema, from the request to the requeued dead letter", func(ctx SpecContext) {
		env = append(env, "DIEHARD_POSTGRES_SCHEMA="+schema)
		for _, program := range []string{"relay", "api"} {
			programs.Run(suite.Prepared(), program, []string{"migrate"}, env...).Ended()
		}
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "SYSTEM STOP MERGES event_log")
		relay := programs.Serve(suite.Prepared(), "relay", env...)
		relay.AwaitReady()
		api := programs.Serve(suite.Prepared(), "api", env...)
		api.AwaitReady()
		own := inSchema()

		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		for range 2 {
			answer, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "grace@example.com"}, "Idempotency-Key: one")
			Expect(err).NotTo(HaveOccurred())
			Expect(answer.Status).To(Equal(201))
		}
		tx := s.Postgres.MustBeginTx(ctx, nil)
		publisher := outbox.NewPublisher(outbox.PublisherOptions{Schema: schema})
		Expect(publisher.Publish(ctx, tx, system.Events(2)...)).To(Succeed())
		Expect(tx.Commit()).To(Succeed())
		own.ExpectDelivered(ctx, 4)

		By("dead-lettering and requeueing an event that ClickHouse cannot store")
		own.Postgres.MustExecContext(ctx, "ALTER TABLE outbox_events DROP CONSTRAINT IF EXISTS event_date_time_is_in_years_1_to_9999")
		own.Postgres.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context, event_date_time)
			VALUES ('from_the_future', '{}', '12000-01-01 00:00:00+00')`)
		Eventually(ctx, func(g Gomega) {
			_, _, dead := own.Left(g)
			g.Expect(dead).To(Equal(1))
		}).WithTimeout(patience).Should(Succeed())
		own.Postgres.MustExecContext(ctx, "UPDATE outbox_dead_letters SET event_date_time = now()")
		programs.Run(suite.Prepared(), "relay", []string{"dead-letters", "retry", "--all", "--yes"}, env...).Ended()
		own.ExpectDelivered(ctx, 5)

		var tables []string
		Expect(s.Postgres.SelectContext(ctx, &tables, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).To(Succeed())
		Expect(tables).To(Equal([]string{"users"}))
	})

	It("accepts a schema that was created by hand from the output of --print", func(ctx SpecContext) {
		psql, err := exec.LookPath("psql")
		for part, dsn := range map[string]string{"postgres": s.PostgresDSN, "clickhouse": s.ClickHouse.HTTP} {
			printed := programs.Run(suite.Prepared(), "relay", []string{"migrate", "--print=" + part}, "DIEHARD_POSTGRES_SCHEMA="+schema)
			printed.Ended()
			sql := string(printed.Out.Contents())
			switch {
			case part == "clickhouse":
				testengines.Query(ctx, part, dsn, sql)
			case err == nil: // as a database administrator would
				cmd := exec.CommandContext(ctx, psql, "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--quiet", dsn) //nolint:gosec // the installed psql
				cmd.Stdin = strings.NewReader(sql)
				output, err := cmd.CombinedOutput()
				Expect(err).NotTo(HaveOccurred(), "%s", output)
			default:
				testengines.Query(ctx, part, dsn, sql)
			}
		}
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "SYSTEM STOP MERGES event_log")
		env = append(env, "DIEHARD_POSTGRES_SCHEMA="+schema)
		relay := programs.Serve(suite.Prepared(), "relay", env...)
		relay.AwaitReady()
		own := inSchema()
		Expect(own.Publish(ctx, system.Events(3)...)).To(Succeed())
		own.ExpectDelivered(ctx, 3)
		relay.Stop()
		migrated := programs.Run(suite.Prepared(), "relay", []string{"migrate"}, env...)
		migrated.Ended()
		Expect(migrated.Messages()).NotTo(ContainElement("postgresql migrated"))
	})

	DescribeTable("reports the allowed values of --print", func(program string, arguments []string, line string) {
		p := programs.Run(suite.Prepared(), program, append([]string{"migrate"}, arguments...))
		p.EndsWith(2)
		Expect(string(p.Err.Contents())).To(Equal(line + "\n"))
	},
		Entry("an unknown part", "relay", []string{"--print=mysql"}, `relay: --print is "mysql", must be one of postgres, clickhouse`),
		Entry("a part that the API does not have", "api", []string{"--print=clickhouse"}, `api: --print is "clickhouse", must be one of postgres`),
	)
})
