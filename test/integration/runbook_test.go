package integration_test

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gexec"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var (
	relayCommand = regexp.MustCompile("(?m)(?:^|`)(relay [a-z][^`\n…]*)(?:$|`)")
	isClickHouse = regexp.MustCompile(`event_log|\bsystem\.|\borders`)
)

// runbook replaces the placeholders of the runbook's commands and statements.
var runbook = strings.NewReplacer("BATCH", "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c11", " ID", " 1", "pg_terminate_backend(8123)", "pg_terminate_backend(2147483647)")

var _ = Describe("The runbook", func() {
	var s *system.System

	BeforeEach(func(ctx SpecContext) { s = newSystem(ctx) })

	// execute executes the statements of the runbook that contain a text, in its database.
	execute := func(ctx SpecContext, text string) {
		GinkgoHelper()
		found := false
		for _, block := range sqlOf("runbook.md") {
			if !strings.Contains(block, text) {
				continue
			}
			found = true
			if strings.Contains(block, "system.row_policies") { // the user of the suites may not read it
				block = "SELECT formatQuery('" + strings.ReplaceAll(block, "'", "\\'") + "')"
			}
			if isClickHouse.MatchString(block) {
				testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, block)
				continue
			}
			_, err := s.Postgres.ExecContext(ctx, runbook.Replace(block))
			Expect(err).NotTo(HaveOccurred(), block)
		}
		Expect(found).To(BeTrue(), text)
	}

	It("has statements that the databases accept", func(ctx SpecContext) {
		for _, statement := range []string{
			"CREATE TABLE orders (event_id UUID, placed_at DateTime64(6, 'UTC'), order_id String) ENGINE = MergeTree ORDER BY event_id",
			"CREATE TABLE orders_by_day (day Date, orders UInt64) ENGINE = MergeTree ORDER BY day",
			`INSERT INTO event_log (event_id, event_type, event_date_time, environment, event_context)
				SELECT generateUUIDv4(), 'order_placed', toDateTime64('2026-11-24 03:13:00', 6), 'Local', '{"order_id":"42"}' FROM numbers(2)`,
			"INSERT INTO orders SELECT event_id, event_date_time, '42' FROM event_log LIMIT 1",
			"INSERT INTO orders_by_day VALUES ('2026-11-24', 1)",
		} {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, statement)
		}
		execute(ctx, "")

		var rows, orders int
		Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT (SELECT count() FROM orders), (SELECT sum(orders) FROM orders_by_day)", &rows, &orders)).To(Succeed())
		Expect(rows).To(Equal(2), "rows of the view with event ids")
		Expect(orders).To(Equal(2), "sum of the view without event ids")
	})

	It("has commands that the relay accepts", func(ctx SpecContext) {
		page, err := os.ReadFile("../../docs/runbook.md")
		Expect(err).NotTo(HaveOccurred())
		var commands []string
		for _, match := range relayCommand.FindAllStringSubmatch(string(page), -1) {
			commands = append(commands, runbook.Replace(match[1]))
		}
		slices.Sort(commands)
		commands = slices.Compact(commands)
		Expect(commands).To(ContainElements("relay status", "relay dead-letters retry --all --yes", "relay batches show 019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c11"))
		for _, command := range commands {
			args := strings.Fields(command)[1:]
			if slices.Contains(args, "retry") && slices.Contains(args, "dead-letters") {
				args = append(args, "--yes")
			}
			p := programs.Run(suite.Prepared(), "relay", args, "DIEHARD_POSTGRES_DSN="+s.PostgresDSN, "DIEHARD_CLICKHOUSE_DSN="+s.ClickHouse.Native)
			Eventually(ctx, p.Session).WithTimeout(patience).Should(gexec.Exit(), command)
			Expect(p.ExitCode()).To(BeElementOf(0, 1), "%s: %s", command, p.Err.Contents())
			p.EndsWith(p.ExitCode())
		}
	})

	It("delivers the other events of a batch that lacks an event", func(ctx SpecContext) {
		relay := s.Relay(s.ClickHouse.Native)
		Expect(s.Publish(ctx, system.Events(1)...)).To(Succeed())
		s.ExpectDelivered(ctx, 1)
		relay.Stop()
		Expect(s.Publish(ctx, system.Events(3)...)).To(Succeed())
		s.Postgres.MustExecContext(ctx, `INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token)
			SELECT gen_random_uuid(), range_agg(int8range(id, id, '[]')), count(*), 100, 'of the batch' FROM outbox_events;
			DELETE FROM outbox_events WHERE id = (SELECT min(id) + 1 FROM outbox_events);
			UPDATE outbox_history SET flush_timeout = '0', recorded_by = pg_current_xact_id()::xid`)
		flushTimeout := "DIEHARD_RELAY_FLUSH_TIMEOUT=3s"
		relay = s.Relay(s.ClickHouse.Native, flushTimeout)
		Eventually(ctx, relay.Messages).WithTimeout(patience).Should(ContainElement("events missing from outbox"))
		relay.Stop()

		execute(ctx, "DELETE FROM outbox_batches")
		relay = s.Relay(s.ClickHouse.Native, flushTimeout)
		s.ExpectDelivered(ctx, 3)
		relay.Stop()
	})
})

var _ = Describe("The dashboard and the alerts", func() {
	It("use metrics of libraries and a bucket that the programs have", func(ctx SpecContext) {
		s := newSystem(ctx)
		relay, api := s.Relay(s.ClickHouse.Native), s.API()
		exported := metrics(relay)
		Expect(exported).To(ContainSubstring(`diehard_relay_delivery_seconds_bucket{le="40.96"} `))
		dashboard, err := os.ReadFile("../../deploy/grafana/diehard.json")
		Expect(err).NotTo(HaveOccurred())
		Expect(json.Valid(dashboard)).To(BeTrue())
		names := regexp.MustCompile(`\b(?:go|process|promhttp)_[a-z_]+`).FindAllString(string(dashboard), -1)
		Expect(names).NotTo(BeEmpty())
		for _, name := range names {
			Expect(exported).To(ContainSubstring("\n"+name), name)
			Expect(metrics(api)).To(ContainSubstring("\n"+name), name)
		}
	})
})
