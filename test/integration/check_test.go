package integration_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"github.com/onsi/gomega/gexec"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// result is a line of relay check --json.
type result struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy"`
}

// resultsOf parses the output of relay check --json.
func resultsOf(p *programs.Process) (results []result) {
	GinkgoHelper()
	for line := range strings.Lines(string(p.Out.Contents())) {
		decoder := json.NewDecoder(strings.NewReader(line))
		decoder.DisallowUnknownFields()
		var r result
		Expect(decoder.Decode(&r)).To(Succeed(), line)
		Expect(r.Name).NotTo(BeEmpty())
		results = append(results, r)
	}
	return results
}

// having returns the results with the status.
func having(results []result, status string) (some []result) {
	for _, r := range results {
		if r.Status == status {
			some = append(some, r)
		}
	}
	return some
}

func checkEnv(postgresDSN, clickHouseDSN string) []string {
	return []string{"DIEHARD_POSTGRES_DSN=" + postgresDSN, "DIEHARD_CLICKHOUSE_DSN=" + clickHouseDSN}
}

// changed returns the DSN with a change.
func changed(dsn string, change func(u *url.URL)) string {
	GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	change(u)
	return u.String()
}

func withHost(dsn, of string) string {
	GinkgoHelper()
	other, err := url.Parse(of)
	Expect(err).NotTo(HaveOccurred())
	return changed(dsn, func(u *url.URL) { u.Host = other.Host })
}

func withPassword(dsn, password string) string {
	GinkgoHelper()
	return changed(dsn, func(u *url.URL) { u.User = url.UserPassword(u.User.Username(), password) })
}

func withParameter(dsn, name, value string) string {
	GinkgoHelper()
	return changed(dsn, func(u *url.URL) {
		query := u.Query()
		query.Set(name, value)
		u.RawQuery = query.Encode()
	})
}

var _ = Describe("relay check", func() {
	var s *system.System
	BeforeEach(func(ctx SpecContext) { s = newSystem(ctx) })

	const nowhere = "127.0.0.1:1"

	onPostgres := func(statement string) func(ctx context.Context) []string {
		return func(ctx context.Context) []string {
			s.Postgres.MustExecContext(ctx, statement)
			return checkEnv(s.PostgresDSN, s.ClickHouse.Native)
		}
	}
	onClickHouse := func(statements ...string) func(ctx context.Context) []string {
		return func(ctx context.Context) []string {
			for _, statement := range statements {
				testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, statement)
			}
			return checkEnv(s.PostgresDSN, s.ClickHouse.Native)
		}
	}
	// otherPostgres returns the environment with a changed DSN of PostgreSQL.
	otherPostgres := func(change func(dsn string) string) func(context.Context) []string {
		return func(context.Context) []string { return checkEnv(change(s.PostgresDSN), s.ClickHouse.Native) }
	}
	otherClickHouse := func(change func(native, http string) string) func(context.Context) []string {
		return func(context.Context) []string {
			return checkEnv(s.PostgresDSN, change(s.ClickHouse.Native, s.ClickHouse.HTTP))
		}
	}
	// asRole returns the environment of a role without some of the rights.
	asRole := func(revoke string) func(ctx context.Context) []string {
		return func(ctx context.Context) []string {
			role := fmt.Sprintf("checked_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
			s.Postgres.MustExecContext(ctx, "CREATE ROLE "+role)
			DeferCleanup(func(ctx SpecContext) { s.Postgres.MustExecContext(ctx, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
			s.Postgres.MustExecContext(ctx, fmt.Sprintf(`GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO %[1]s;
				GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO %[1]s`, role))
			s.Postgres.MustExecContext(ctx, revoke+" FROM "+role)
			return checkEnv(withParameter(s.PostgresDSN, "role", role), s.ClickHouse.Native)
		}
	}
	lost := func(dsn string) string {
		GinkgoHelper()
		proxy, through := faults.StartProxyTo(dsn)
		proxy.Vanish()
		return through
	}

	DescribeTable("names the problem and the remedy, and skips what depends on it:",
		func(ctx SpecContext, arrange func(ctx context.Context) []string, name, detail, remedy string, skipped int) {
			args := []string{"check", "--json", "--timeout=20s"}
			if strings.HasPrefix(detail, "^no response") {
				args[2] = "--timeout=3s"
			}
			p := programs.Run(suite.Prepared(), "relay", args, arrange(ctx)...)
			p.EndsWith(1)
			results := resultsOf(p)
			failed := having(results, "failed")
			Expect(failed).To(HaveLen(1))
			Expect(failed[0].Name).To(Equal(name))
			Expect(failed[0].Detail).To(MatchRegexp(detail))
			Expect(failed[0].Remedy).To(MatchRegexp(remedy))
			Expect(having(results, "skipped")).To(HaveLen(skipped), "%v", results)
			for _, r := range having(results, "skipped") {
				Expect(r.Detail).To(Equal(name + " has failed"))
			}
			Expect(string(p.Out.Contents())).NotTo(ContainSubstring("s3cret"))
			summary := "relay: 1 check failed"
			if skipped > 0 {
				summary += fmt.Sprintf(", %d skipped", skipped)
			}
			Expect(string(p.Err.Contents())).To(Equal(summary + "\n"))
		},
		Entry("PostgreSQL is down", otherPostgres(func(dsn string) string {
			return withPassword(changed(dsn, func(u *url.URL) { u.Host = nowhere }), "s3cret")
		}), "postgresql connection", "^postgresql at "+nowhere+": .*connection refused$", "^start PostgreSQL, or correct the host and the port in postgres.dsn$", 9),
		Entry("PostgreSQL refuses the password", otherPostgres(func(dsn string) string { return withPassword(dsn, "s3cret") }),
			"postgresql connection", "password authentication failed", "^correct the user and the password in postgres.dsn, or in postgres.password_file$", 9),
		Entry("the database is missing", otherPostgres(func(dsn string) string { return changed(dsn, func(u *url.URL) { u.Path = "/nowhere" }) }),
			"postgresql connection", `database "nowhere" does not exist`, "^correct the name of the database in postgres.dsn, or create the database", 9),
		Entry("PostgreSQL does not respond", otherPostgres(lost), "postgresql connection",
			"^no response from postgresql at 127.0.0.1:[0-9]+ within the time limit$", "^check the firewalls .*; --timeout allows a longer wait$", 9),
		Entry("PostgreSQL is read-only", otherPostgres(func(dsn string) string { return withParameter(dsn, "default_transaction_read_only", "on") }),
			"postgresql accepts writes", "it is a standby or read-only", "^connect to the primary$", 0),
		Entry("the schema is missing", func(ctx context.Context) []string {
			return checkEnv(suite.EmptyPostgresDSN(ctx), s.ClickHouse.Native)
		}, "postgresql schema", "^the tables for outbox do not exist, need version [1-9]", "^relay migrate$", 6),
		Entry("the schema is older", onPostgres("UPDATE diehard_outbox_version SET version_id = -1"),
			"postgresql schema", "^the tables for outbox are too old: found version -1, need version [1-9]", "^relay migrate$", 6),
		Entry("a right is missing", asRole("REVOKE DELETE ON outbox_events"), "postgresql rights",
			"lacks rights on outbox_events: DELETE$", `^GRANT DELETE ON outbox_events TO "checked_.*"$`, 0),
		Entry("a table is unlogged", onPostgres("ALTER TABLE outbox_batches SET UNLOGGED"), "postgresql tables",
			"^the table outbox_batches is unlogged: ", "^ALTER TABLE outbox_batches SET LOGGED$", 1),
		Entry("a batch waits for another destination", onPostgres(`INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, destination)
			VALUES (gen_random_uuid(), '{[1,8)}', 7, 1, 'token', 1, 'table elsewhere')`), "destination of waiting batches",
			"^1 batches with 7 events were attempted at another destination, table elsewhere", "UPDATE outbox_batches SET destination = NULL", 0),

		Entry("ClickHouse is down", otherClickHouse(func(native, _ string) string {
			return withPassword(changed(native, func(u *url.URL) { u.Host = nowhere }), "s3cret")
		}), "clickhouse connection", "^clickhouse at "+nowhere+" over the native protocol: .*connection refused$",
			"^start ClickHouse, or correct the host and the port in clickhouse.dsn$", 9),
		Entry("ClickHouse refuses the password", otherClickHouse(func(native, _ string) string { return withPassword(native, "wrong") }),
			"clickhouse connection", "clickhouse error 516, AUTHENTICATION_FAILED", "^correct the user and the password in clickhouse.dsn$", 9),
		Entry("ClickHouse does not respond over the native protocol", otherClickHouse(func(native, _ string) string { return lost(native) }),
			"clickhouse connection", "^no response from clickhouse at 127.0.0.1:[0-9]+ over the native protocol within the time limit$", "--timeout allows a longer wait$", 9),
		Entry("ClickHouse does not respond over HTTP", otherClickHouse(func(_, http string) string { return lost(http) }),
			"clickhouse connection", "^no response from clickhouse at 127.0.0.1:[0-9]+ over HTTP within the time limit$", "--timeout allows a longer wait$", 9),
		Entry("the port of HTTP is used for the native protocol", otherClickHouse(func(native, http string) string { return withParameter(withHost(native, http), "dial_timeout", "1s") }),
			"clickhouse connection", "^the clickhouse dsn requires the native protocol, and the port of .* speaks HTTP$", "^begin the dsn with http://, or change the port", 9),
		Entry("the port of the native protocol is used for HTTP", otherClickHouse(func(native, http string) string { return withHost(http, native) }),
			"clickhouse connection", "^the clickhouse dsn requires HTTP, and the port of .* speaks the native protocol$", "^begin the dsn with clickhouse://, or change the port", 9),
		Entry("the database is missing in ClickHouse", otherClickHouse(func(native, _ string) string { return changed(native, func(u *url.URL) { u.Path = "/nowhere" }) }),
			"clickhouse connection", "^the database of the clickhouse dsn does not exist$", "^CREATE DATABASE `nowhere`; then relay migrate$", 9),
		Entry("a proxy changes the settings of inserts", func(context.Context) []string {
			gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
			gateway.Impose("async_insert=1")
			return checkEnv(s.PostgresDSN, through)
		}, "clickhouse settings of inserts", `async_insert is "1"`, "^let the proxy in front of clickhouse pass all settings", 1),
		Entry("the table is missing", onClickHouse("DROP TABLE event_log"),
			"clickhouse table", "^the table `event_log` does not exist in clickhouse$", "^relay migrate$", 6),
		Entry("the engine is wrong", onClickHouse("DROP TABLE event_log", `CREATE TABLE event_log (event_id UUID, event_type String, event_date_time DateTime64(6),
			environment String, event_context String, metadata_version UInt64) ENGINE = Log`),
			"clickhouse engine", "^the engine of the table `event_log` is Log", "^RENAME TABLE `event_log` TO `event_log_old`; then relay migrate", 2),
		Entry("the table remembers no tokens", onClickHouse("ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 0"),
			"clickhouse settings of the table", "has non_replicated_deduplication_window off$", "MODIFY SETTING non_replicated_deduplication_window = 10000$", 0),
		Entry("the table does not sync inserts", onClickHouse("ALTER TABLE event_log MODIFY SETTING fsync_after_insert = 0"),
			"clickhouse settings of the table", "has fsync_after_insert off$", "MODIFY SETTING fsync_after_insert = 1$", 0),
		Entry("a column is too small", onClickHouse("ALTER TABLE event_log MODIFY COLUMN metadata_version UInt32"),
			"clickhouse columns", "keeps metadata_version as UInt32$", "MODIFY COLUMN metadata_version UInt64$", 2),
		Entry("the table accepts no inserts", onClickHouse("INSERT INTO event_log (event_id) VALUES (generateUUIDv4())",
			"ALTER TABLE event_log MODIFY SETTING parts_to_delay_insert = 0, parts_to_throw_insert = 1"),
			"clickhouse right to insert", "TOO_MANY_PARTS", "^find the cause in the log of ClickHouse$", 0),
	)

	It("reports all problems of both databases", func(ctx SpecContext) {
		env := asRole("REVOKE DELETE ON outbox_events, outbox_batches")(ctx)
		s.Postgres.MustExecContext(ctx, "ALTER TABLE outbox_fuse SET UNLOGGED")
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log MODIFY SETTING fsync_after_insert = 0, fsync_part_directory = 0")
		p := programs.Run(suite.Prepared(), "relay", []string{"check", "--json"}, env...)
		p.EndsWith(1)
		var names, remedies []string
		for _, r := range having(resultsOf(p), "failed") {
			names, remedies = append(names, r.Name), append(remedies, r.Remedy)
		}
		Expect(names).To(Equal([]string{"postgresql tables", "postgresql rights", "postgresql rights", "clickhouse settings of the table"}))
		Expect(remedies).To(HaveExactElements(
			Equal("ALTER TABLE outbox_fuse SET LOGGED"), HavePrefix("GRANT DELETE ON outbox_events"), HavePrefix("GRANT DELETE ON outbox_batches"),
			HaveSuffix("MODIFY SETTING fsync_after_insert = 1, fsync_part_directory = 1")))
	})

	It("warns of unsafe settings, of a newer schema and of a small window, and succeeds", func(ctx SpecContext) {
		s.Postgres.MustExecContext(ctx, "INSERT INTO diehard_outbox_version (version_id, is_applied) VALUES (20991231, true)")
		p := programs.Run(suite.Prepared(), "relay", []string{"check", "--json", "--relay-linger=1ms"}, checkEnv(s.PostgresDSN, s.ClickHouse.HTTP)...)
		p.Ended()
		warnings := having(resultsOf(p), "warning")
		Expect(warnings).To(ContainElements(
			And(HaveField("Name", "postgresql schema"), HaveField("Detail", HavePrefix("the tables for outbox have version 20991231"))),
			And(HaveField("Name", "postgresql durability"), HaveField("Remedy", "set fsync = on in postgresql.conf")), // the server of the suite is not durable
			And(HaveField("Name", "clickhouse settings of the table"), HaveField("Detail", ContainSubstring("can insert 60300 blocks")),
				HaveField("Remedy", HaveSuffix("MODIFY SETTING non_replicated_deduplication_window = 120600"))),
		))
		Expect(having(resultsOf(p), "failed")).To(BeEmpty())
	})

	It("prints a line for each check, with the servers that it has reached", func(ctx SpecContext) {
		p := programs.Run(suite.Prepared(), "relay", []string{"check"}, checkEnv(s.PostgresDSN, s.ClickHouse.HTTP)...)
		p.Ended()
		output := string(p.Out.Contents())
		Expect(output).To(MatchRegexp(`(?m)^ok       postgresql connection +PostgreSQL [0-9.]+ at .* without TLS, role .*, database spec_`))
		Expect(output).To(MatchRegexp(`(?m)^ok       clickhouse connection +ClickHouse [0-9.]+ at .* over HTTP, user .*, database spec_`))
		Expect(output).To(MatchRegexp(`(?m)^ok       clickhouse settings of the table +non_replicated_deduplication_window = 10000, fsync_after_insert = 1`))
		Expect(output).To(MatchRegexp(`(?m)^warning  postgresql durability .*\n         to fix it: set `))
		Expect(output).To(HaveSuffix(" with a warning\n"))
		Expect(p.Err.Contents()).To(BeEmpty())

		By("marking problems")
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "DROP TABLE event_log")
		p = programs.Run(suite.Prepared(), "relay", []string{"check"}, checkEnv(s.PostgresDSN, s.ClickHouse.HTTP)...)
		p.EndsWith(1)
		Expect(string(p.Out.Contents())).To(MatchRegexp("(?m)^FAILED   clickhouse table +the table `event_log` does not exist in clickhouse\n         to fix it: relay migrate\n"))
		Expect(string(p.Out.Contents())).To(MatchRegexp(`(?m)^skipped  clickhouse engine +clickhouse table has failed$`))
		Expect(string(p.Err.Contents())).To(Equal("relay: 1 check failed, 6 skipped\n"))
	})

	It("refuses an invalid time limit", func() {
		p := programs.Run(suite.Prepared(), "relay", []string{"check", "--timeout=0s"}, checkEnv(s.PostgresDSN, s.ClickHouse.HTTP)...)
		p.EndsWith(2)
		Expect(string(p.Err.Contents())).To(Equal("relay: --timeout is 0s, must be positive\n"))
	})

	Describe("--deep", func() {
		tables := func(ctx context.Context) (names []string) {
			GinkgoHelper()
			Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT groupArray(name) FROM (SELECT name FROM system.tables WHERE database = currentDatabase() ORDER BY name)", &names)).
				To(Succeed())
			return names
		}
		outbox := func(ctx context.Context) (rows string) {
			GinkgoHelper()
			Expect(s.Postgres.GetContext(ctx, &rows, `SELECT concat_ws(' ', (SELECT count(*) FROM outbox_events), (SELECT count(*) FROM outbox_batches),
				(SELECT outbox_history::text FROM outbox_history), (SELECT outbox_cursor::text FROM outbox_cursor))`)).To(Succeed())
			return rows
		}
		var before []string
		BeforeEach(func(ctx SpecContext) { before = tables(ctx) })

		It("tests ClickHouse, and leaves the event log and the outbox unchanged", func(ctx SpecContext) {
			Expect(s.Publish(ctx, system.Event())).To(Succeed())
			rows := outbox(ctx)
			p := programs.Run(suite.Prepared(), "relay", []string{"check", "--deep", "--json", "--timeout=1m"},
				append(checkEnv(s.PostgresDSN, s.ClickHouse.Native), "DIEHARD_RELAY_FLUSH_TIMEOUT=1m")...)
			Eventually(p.Session, 5*time.Minute).Should(gexec.Exit()) // a thousand parts, on any disk
			p.Ended()
			results := resultsOf(p)
			Expect(results).NotTo(ContainElement(HaveField("Status", BeElementOf("failed", "skipped"))))
			Expect(results).To(ContainElement(HaveField("Name", "a token is remembered for the whole deduplication window")))
			Expect(tables(ctx)).To(Equal(before))
			arrived, _ := s.Arrived(ctx, Default)
			Expect(arrived).To(BeZero())
			Expect(outbox(ctx)).To(Equal(rows))

			By("comparing the names with the documentation")
			page, err := os.ReadFile(filepath.Join(root, "docs", "check.md"))
			Expect(err).NotTo(HaveOccurred())
			for _, r := range results {
				Expect(string(page)).To(ContainSubstring("| "+r.Name+" |"), "docs/check.md")
			}
		})

		It("finds a destination that ignores tokens, and drops the table after an interruption", func(ctx SpecContext) {
			gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
			gateway.Impose("insert_deduplicate=0&deduplicate_insert=disable")
			p := programs.Run(suite.Prepared(), "relay", []string{"check", "--deep", "--timeout=1m"}, checkEnv(s.PostgresDSN, through)...)
			Eventually(p.Out, patience).Should(gbytes.Say("FAILED   a token prevents a second insert on every server, and another token does not\n" +
				"         after inserts under one token: the destination does not have the expected rows: 400 rows instead of 100\n" +
				"         to fix it: deliver no events to this destination"))
			p.Signal(syscall.SIGINT)
			p.EndsWith(1)
			output := string(p.Out.Contents())
			Expect(output).To(MatchRegexp(`(?m)^skipped  every server has the same destination +interrupted$`))
			Expect(output).To(MatchRegexp(`(?m)^skipped  a presence check finds exactly the events that are present: interrupted$`))
			Expect(output).To(MatchRegexp(`(?m)^ok       scratch table dropped +event_log_check_[a-z0-9]{8}$`))
			Expect(string(p.Err.Contents())).To(MatchRegexp(`^relay: interrupted: [1-9][0-9]* checks? failed, [1-9][0-9]* skipped\n$`))
			Eventually(ctx, tables).Should(Equal(before))
		})

		It("names the tables that it could not drop, and their statements", func(ctx SpecContext) {
			proxy, through := faults.StartProxyTo(s.ClickHouse.Native)
			p := programs.Run(suite.Prepared(), "relay", []string{"check", "--deep", "--timeout=10s"}, checkEnv(s.PostgresDSN, through)...)
			Eventually(p.Out, patience).Should(gbytes.Say("ok       scratch table "))
			proxy.Down()
			p.EndsWith(1)
			left := tables(ctx)
			Expect(left).To(HaveLen(len(before) + 2))
			var drops []string
			for _, table := range left {
				if strings.Contains(table, "_check_") {
					drops = append(drops, "DROP TABLE IF EXISTS `"+table+"`")
				}
			}
			Expect(string(p.Out.Contents())).To(ContainSubstring("the tables " + strings.Join(left[1:3], " and ") + " may still exist"))
			Expect(string(p.Out.Contents())).To(HaveSuffix("to fix it: " + strings.Join(drops, "; ") + "\n"))
			Expect(string(p.Out.Contents())).To(ContainSubstring("clickhouse does not respond"))
			for _, drop := range drops {
				testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, drop)
			}
			Expect(tables(ctx)).To(Equal(before))
		})
	})
})

var _ = DescribeTable("A program contains no test framework:", func(ctx SpecContext, program string) {
	list := exec.CommandContext(ctx, "go", "list", "-deps", "./cmd/"+program) //nolint:gosec // our own program
	list.Dir = root
	output, err := list.Output()
	Expect(err).NotTo(HaveOccurred())
	Expect(string(output)).To(ContainSubstring(modulePath + "/cmd/" + program))
	for _, framework := range []string{"onsi/ginkgo", "onsi/gomega", "stretchr/testify"} {
		Expect(string(output)).NotTo(ContainSubstring(framework))
	}
}, Entry("the api", "api"), Entry("the relay", "relay"))
