package integration_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// deadLetterEnv returns an environment with which a command reaches only PostgreSQL.
func deadLetterEnv(dsn string) []string {
	return []string{"DIEHARD_POSTGRES_DSN=" + dsn, "DIEHARD_CLICKHOUSE_DSN=clickhouse://127.0.0.1:1/nowhere"}
}

// insertDeadLetters inserts n dead letters with the ids 1 to n.
func insertDeadLetters(ctx context.Context, dsn string, n int) {
	GinkgoHelper()
	testengines.Query(ctx, "postgres", dsn, fmt.Sprintf(`INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type,
		event_date_time, environment, event_context, metadata_version, published_at, batch_id, token, error)
		SELECT n, ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, 'thing_happened', now(), 'Production',
		'{"secret": "payload"}', 1, now(), '00000000-0000-0000-0000-00000000000b', 'of the batch', E'wrong\n in \x1b[31mmany ways'
		FROM generate_series(1, %d) AS n ORDER BY n`, n))
}

var _ = Describe("Dead letters", func() {
	// run runs a subcommand and waits for its exit code.
	run := func(dsn string, code int, args ...string) *programs.Process {
		GinkgoHelper()
		p := programs.Run(suite.Prepared(), "relay", append([]string{"dead-letters"}, args...), deadLetterEnv(dsn)...)
		p.EndsWith(code)
		if code == 0 {
			Expect(string(p.Err.Contents())).To(BeEmpty())
		} else {
			Expect(string(p.Err.Contents())).To(MatchRegexp(`^relay: [^\n]+\n$`), "one line")
		}
		return p
	}

	lines := func(p *programs.Process) []string {
		return strings.Split(strings.TrimSuffix(string(p.Out.Contents()), "\n"), "\n")
	}

	// objects parses the output with --json.
	objects := func(p *programs.Process) (all []map[string]any) {
		GinkgoHelper()
		if len(p.Out.Contents()) == 0 {
			return nil
		}
		for _, line := range lines(p) {
			var object map[string]any
			Expect(json.Unmarshal([]byte(line), &object)).To(Succeed(), line)
			all = append(all, object)
		}
		return all
	}

	id := func(object map[string]any) string { return fmt.Sprint(object["id"]) }

	It("can be written again after an operator has mended the fuse", func(ctx SpecContext) {
		s := newSystem(ctx)
		Expect(lines(run(s.PostgresDSN, 0, "resume"))).To(Equal([]string{"the fuse has not blown"}))
		s.Postgres.MustExecContext(ctx, "UPDATE outbox_fuse SET blown_at = clock_timestamp()")
		Expect(lines(run(s.PostgresDSN, 0, "resume"))).To(Equal([]string{"fuse mended"}))
		var mended bool
		Expect(s.Postgres.Get(&mended, "SELECT blown_at IS NULL FROM outbox_fuse")).To(Succeed())
		Expect(mended).To(BeTrue())
	})

	It("hold the events that ClickHouse refuses, can be shown, and are delivered once after a retry", func(ctx SpecContext) {
		s := newSystem(ctx)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
			"ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
		const payload = `{"n" : 1.10, "name":"<Ada>" }`
		poison, err := outbox.NewEvent(json.RawMessage(payload), outbox.WithType("poison"))
		Expect(err).NotTo(HaveOccurred())
		hopeless := system.Event(outbox.WithType("poison"))
		relay := s.Relay(s.ClickHouse.Native)
		for _, bad := range []outbox.Event{poison, hopeless} { // one at a time, because batches may overtake each other
			Expect(s.Publish(ctx, system.Event(), bad)).To(Succeed())
			s.AwaitEmpty(ctx)
		}

		By("listing dead letters")
		listed := objects(run(s.PostgresDSN, 0, "list", "--json"))
		Expect(listed).To(HaveLen(2))
		Expect(listed[0]).To(HaveKeyWithValue("event_id", hopeless.EventID.String()), "the newest comes first")
		Expect(listed[1]).To(HaveKeyWithValue("event_id", poison.EventID.String()))
		Expect(listed[1]).To(HaveKeyWithValue("event_type", "poison"))
		Expect(listed[1]).To(HaveKeyWithValue("error", ContainSubstring("no_poison")))
		Expect(listed[1]).NotTo(HaveKey("event_context"))
		Expect(relay.Metric("diehard_relay_dead_letters")).To(Equal(2.0))

		By("showing a dead letter")
		shown := objects(run(s.PostgresDSN, 0, "show", id(listed[1]), "--json"))
		Expect(shown).To(HaveLen(1))
		Expect(shown[0]).To(HaveKeyWithValue("event_context", HaveKeyWithValue("name", "<Ada>")))
		Expect(shown[0]).To(HaveKeyWithValue("environment", "Test"))
		letter := run(s.PostgresDSN, 0, "show", id(listed[1])).Out.Contents()
		Expect(string(letter)).To(HaveSuffix("\n" + payload + "\n"))
		Expect(string(letter)).To(MatchRegexp(`(?m)^event_id +` + poison.EventID.String() + `$`))

		By("retrying while ClickHouse still refuses the event")
		retried := objects(run(s.PostgresDSN, 0, "retry", "--type=poison", "--yes", "--json"))
		Expect(retried).To(HaveLen(2))
		Expect(retried[0]).To(And(HaveKeyWithValue("result", "retried"), HaveKeyWithValue("event_id", poison.EventID.String())))
		s.AwaitEmpty(ctx)
		again := objects(run(s.PostgresDSN, 0, "list", "--json", "--event-id", poison.EventID.String()))
		Expect(again).To(HaveLen(1))
		Expect(id(again[0])).NotTo(Equal(id(listed[1])), "the event was dead-lettered again")

		By("retrying after the constraint is dropped")
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP CONSTRAINT no_poison")
		Expect(lines(run(s.PostgresDSN, 0, "retry", id(again[0]), "--yes"))).To(Equal([]string{
			"retried " + id(again[0]) + "  poison  " + poison.EventID.String(),
			"1 dead letter retried",
		}))
		s.AwaitEmpty(ctx)
		var rows uint64
		var context string
		Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT count(), any(event_context) FROM event_log WHERE event_id = '"+
			poison.EventID.String()+"'", &rows, &context)).To(Succeed())
		Expect(rows).To(Equal(uint64(1)))
		Expect(context).To(Equal(payload))

		By("discarding the last dead letter")
		last := objects(run(s.PostgresDSN, 0, "list", "--json"))
		Expect(last).To(HaveLen(1))
		Expect(lines(run(s.PostgresDSN, 0, "discard", "--all", "--yes"))).To(Equal([]string{
			"discarded " + id(last[0]) + "  poison  " + hopeless.EventID.String(),
			"1 dead letter discarded",
		}))
		s.ExpectDelivered(ctx, 3)
	})

	It("are listed as a table, in pages, without control characters", func(ctx SpecContext) {
		dsn := suite.PostgresDSN(ctx)
		Expect(lines(run(dsn, 0, "list"))).To(Equal([]string{"no dead letters"}))
		Expect(objects(run(dsn, 0, "list", "--json"))).To(BeEmpty())
		insertDeadLetters(ctx, dsn, 12)
		page := run(dsn, 0, "list", "--limit=2")
		Expect(lines(page)).To(HaveExactElements(
			MatchRegexp(`^ID  DEAD-LETTERED AT +EVENT TYPE +EVENT ID +ERROR$`),
			MatchRegexp(`^12  20[-0-9T:]+Z  thing_happened  00000000-0000-0000-0000-000000000012  wrong  in  \[31mmany ways$`),
			HavePrefix("11  "),
			Equal("10 more: list them with --before 11"),
		))
		Expect(string(page.Out.Contents())).NotTo(ContainSubstring("payload"))
		Expect(lines(run(dsn, 0, "list", "--before=3"))).To(HaveExactElements(
			HavePrefix("ID"), HavePrefix("2 "), HavePrefix("1 ")))

		cut := programs.Run(suite.Prepared(), "relay", []string{"dead-letters", "list", "--json", "--limit=10"}, deadLetterEnv(dsn)...)
		cut.Ended()
		Expect(objects(cut)).To(HaveLen(10))
		Expect(string(cut.Err.Contents())).To(Equal("2 more: list them with --before 3\n"))
	})

	It("are selected by filters", func(ctx SpecContext) {
		dsn := suite.PostgresDSN(ctx)
		insertDeadLetters(ctx, dsn, 5)
		db := testengines.OpenPostgres(dsn, nil)
		db.MustExec("UPDATE outbox_dead_letters SET event_type = 'b_thing' WHERE id = 1")
		db.MustExec("UPDATE outbox_dead_letters SET environment = 'Staging' WHERE id = 2")
		db.MustExec("UPDATE outbox_dead_letters SET batch_id = '00000000-0000-0000-0000-00000000000c' WHERE id = 3")
		db.MustExec("UPDATE outbox_dead_letters SET dead_lettered_at = now() - interval '2 days' WHERE id = 4")
		db.MustExec("UPDATE outbox_dead_letters SET error = 'too 100% large' WHERE id = 5")
		for _, expected := range []struct {
			args []string
			ids  []string
		}{
			{[]string{"--type", "b_thing"}, []string{"1"}},
			{[]string{"--environment", "Staging"}, []string{"2"}},
			{[]string{"--batch", "00000000-0000-0000-0000-00000000000c"}, []string{"3"}},
			{[]string{"--until", "24h"}, []string{"4"}},
			{[]string{"--since", "24h"}, []string{"5", "3", "2", "1"}},
			{[]string{"--since", "2001-01-01T00:00:00Z", "--until", "25h"}, []string{"4"}},
			{[]string{"--error", "100% l"}, []string{"5"}},
			{[]string{"--event-id", "00000000-0000-0000-0000-000000000002", "--event-id", "00000000-0000-0000-0000-000000000004"}, []string{"4", "2"}},
			{[]string{"--environment", "Production", "--type", "thing_happened", "--since", "1h"}, []string{"5", "3"}},
		} {
			var ids []string
			for _, object := range objects(run(dsn, 0, append([]string{"list", "--json"}, expected.args...)...)) {
				ids = append(ids, id(object))
			}
			Expect(ids).To(Equal(expected.ids), "%v", expected.args)
		}

		By("discarding and printing the letters that a filter selects")
		Expect(objects(run(dsn, 0, "discard", "--environment=Staging", "--yes", "--json"))).To(Equal([]map[string]any{{
			"id": 2.0, "event_type": "thing_happened", "event_id": "00000000-0000-0000-0000-000000000002", "result": "discarded",
		}}))
		Expect(lines(run(dsn, 0, "discard", "--environment=Staging", "--yes"))).To(Equal([]string{"0 dead letters discarded"}))
		var left []int
		Expect(db.Select(&left, "SELECT id FROM outbox_dead_letters ORDER BY id")).To(Succeed())
		Expect(left).To(Equal([]int{1, 3, 4, 5}))
	})

	DescribeTable("are unchanged by an invalid command line, which exits with 2 and one line",
		func(ctx SpecContext, args []string, line string) {
			dsn := suite.PostgresDSN(ctx)
			insertDeadLetters(ctx, dsn, 1)
			p := run(dsn, 2, args...)
			Expect(p.Out.Contents()).To(BeEmpty())
			Expect(string(p.Err.Contents())).To(Equal("relay: " + line + "\n"))
			Expect(objects(run(dsn, 0, "list", "--json"))).To(HaveLen(1))
		},
		Entry("no command", nil, "relay dead-letters requires a command; `relay dead-letters --help` lists the commands"),
		Entry("an unknown command", []string{"lst"}, "unknown command \"lst\"; `relay dead-letters --help` lists the commands"),
		Entry("no selection", []string{"retry", "--yes"}, "no dead letters selected to retry: pass ids, filters or --all"),
		Entry("no selection to discard", []string{"discard", "--yes"}, "no dead letters selected to discard: pass ids, filters or --all"),
		Entry("an empty filter, for example from an unset variable", []string{"discard", "--type=", "--yes"},
			`invalid argument "" for "--type" flag: must not be empty`),
		Entry("ids and filters", []string{"retry", "1", "--type=a", "--yes"}, "ids, filters and --all are mutually exclusive"),
		Entry("filters and all", []string{"retry", "--all", "--type=a", "--yes"}, "ids, filters and --all are mutually exclusive"),
		Entry("no confirmation and no terminal", []string{"discard", "1"},
			"stdin is not a terminal: add --yes to discard without confirmation"),
		Entry("no confirmation and no terminal, for retry", []string{"retry", "--all"},
			"stdin is not a terminal: add --yes to retry without confirmation"),
		Entry("an invalid id", []string{"discard", "one", "--yes"}, `invalid id "one": an id is a number, as list shows it`),
		Entry("no id to show", []string{"show"}, "show requires one id, got 0"),
		Entry("an invalid time", []string{"list", "--since=yesterday"},
			`invalid argument "yesterday" for "--since" flag: must be a time such as 2026-11-24T03:00:00Z or an age such as 24h`),
		Entry("an invalid event id", []string{"list", "--event-id=1"},
			`invalid argument "1" for "--event-id" flag: invalid UUID length: 1`),
		Entry("a limit out of bounds", []string{"list", "--limit=0"}, "--limit is 0, must be from 1 to 10000"),
	)

	It("are unchanged if one of the given ids is unknown", func(ctx SpecContext) {
		dsn := suite.PostgresDSN(ctx)
		insertDeadLetters(ctx, dsn, 2)
		for _, args := range [][]string{{"retry", "1", "7", "--yes"}, {"discard", "7", "2", "--yes"}, {"show", "7"}} {
			p := run(dsn, 1, args...)
			Expect(p.Out.Contents()).To(BeEmpty())
			Expect(string(p.Err.Contents())).To(Equal("relay: dead letter 7 not found\n"))
		}
		Expect(objects(run(dsn, 0, "list", "--json"))).To(HaveLen(2))
	})

	It("report partial progress after an error, and continue with the remaining dead letters", func(ctx SpecContext) {
		dsn := suite.PostgresDSN(ctx)
		insertDeadLetters(ctx, dsn, 250)
		db := testengines.OpenPostgres(dsn, nil)
		db.MustExec(`ALTER TABLE outbox_events ADD CONSTRAINT halfway
			CHECK (event_id != '00000000-0000-0000-0000-000000000170')`)
		p := run(dsn, 1, "retry", "--all", "--yes")
		Expect(lines(p)).To(HaveLen(100))
		Expect(string(p.Err.Contents())).To(HavePrefix("relay: retried 100 of 250 dead letters; run the command again for the rest: "))
		db.MustExec("ALTER TABLE outbox_events DROP CONSTRAINT halfway")
		Expect(lines(run(dsn, 0, "retry", "--all", "--yes"))).To(ContainElement("150 dead letters retried"))
		var events int
		Expect(db.Get(&events, "SELECT count(DISTINCT event_id) FROM outbox_events")).To(Succeed())
		Expect(events).To(Equal(250))
	})

	It("require a current schema and a running PostgreSQL", func(ctx SpecContext) {
		p := run(suite.EmptyPostgresDSN(ctx), 1, "list")
		Expect(string(p.Err.Contents())).To(MatchRegexp(
			"tables for outbox in postgresql are too old: found version 0, need version [1-9][0-9]*; run `relay migrate`\n"))
		p = run("postgres://diehard@127.0.0.1:1/diehard", 1, "list")
		Expect(string(p.Err.Contents())).To(ContainSubstring("connection refused"))
	})
})
