package integration_test

import (
	"fmt"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("The settings of PostgreSQL", func() {
	It("do not change the sessions of the programs", func(ctx SpecContext) {
		s := newSystem(ctx)
		for _, setting := range []string{
			"synchronous_commit = off", "default_transaction_isolation = serializable", "row_security = on",
			"idle_session_timeout = 1000", "statement_timeout = 1000", "default_transaction_deferrable = on",
		} {
			s.Postgres.MustExecContext(ctx, fmt.Sprintf(
				"DO $$ BEGIN EXECUTE format('ALTER DATABASE %%I SET %s', current_database()); END $$", setting))
		}
		s.Postgres.MustExecContext(ctx, `
			CREATE TABLE seen (settings text);
			CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
			BEGIN
			    INSERT INTO seen VALUES (concat_ws(' ', TG_TABLE_NAME, current_setting('synchronous_commit'),
			        current_setting('transaction_isolation'), current_setting('row_security'),
			        current_setting('idle_session_timeout')));
			    RETURN NULL;
			END $$;
			CREATE TRIGGER see AFTER INSERT ON users FOR EACH STATEMENT EXECUTE FUNCTION see();
			CREATE TRIGGER see AFTER INSERT ON outbox_batches FOR EACH STATEMENT EXECUTE FUNCTION see()`)
		api := s.API()
		relay := s.Relay(s.ClickHouse.Native)
		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		s.AwaitEmpty(ctx)
		var seen []string
		Expect(s.Postgres.SelectContext(ctx, &seen, "SELECT DISTINCT settings FROM seen ORDER BY settings")).To(Succeed())
		Expect(seen).To(Equal([]string{"outbox_batches on read committed off 0", "users on read committed off 0"}))
		for _, record := range relay.Log() {
			Expect(record).NotTo(HaveKeyWithValue("level", "ERROR"))
		}
	})

	DescribeTable("are refused in one line, if the encoding is not UTF8",
		func(ctx SpecContext, program, command string) {
			name := fmt.Sprintf("latin_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
			dsn := suite.EmptyPostgresDSN(ctx)
			testengines.Query(ctx, "postgres", dsn, "CREATE DATABASE "+name+" ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
			DeferCleanup(func(ctx SpecContext) { testengines.Query(ctx, "postgres", dsn, "DROP DATABASE "+name+" WITH (FORCE)") })
			path, query, _ := strings.Cut(dsn, "?")
			latin := path[:strings.LastIndex(path, "/")+1] + name + "?" + query
			p := programs.Run(suite.Prepared(), program, []string{command},
				"DIEHARD_POSTGRES_DSN="+latin, "DIEHARD_CLICKHOUSE_DSN="+suite.EmptyClickHouseDSNs(ctx).Native,
				"DIEHARD_API_AUTH=off", "DIEHARD_HTTP_DRAIN_DELAY=0s", "DIEHARD_HTTP_ADDR=127.0.0.1:0", "DIEHARD_ADMIN_ADDR=127.0.0.1:0")
			p.EndsWith(1)
			var errs []any
			for _, record := range p.Log() {
				if record["level"] == "ERROR" {
					errs = append(errs, record["err"])
				}
			}
			Expect(errs).To(HaveExactElements(HavePrefix("the database " + name + " has the encoding LATIN1 instead of UTF8; to fix it: ")))
		},
		Entry("by api migrate", "api", "migrate"),
		Entry("by relay migrate", "relay", "migrate"),
		Entry("by the API", "api", "serve"),
		Entry("by the relay", "relay", "run"),
	)
})
