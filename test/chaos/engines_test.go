package chaos_test

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// stage is a system on its own engines, on which users are created
// continuously.
type stage struct {
	*system.System
	own        *system.Private
	api, relay *programs.Process
	users      *clients
}

func newStage(ctx context.Context, p devstack.PostgresOptions) *stage {
	GinkgoHelper()
	own := system.StartPrivate(ctx, p, devstack.ClickHouseOptions{})
	st := &stage{own: own, System: system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)}
	st.api = st.API()
	st.relay = st.Relay(st.ClickHouse.Native, slices.Concat(small, brisk)...)
	st.users = createUsers(ctx, st.api, rate.Inf)
	awaitArrival(ctx, st.System, perBatch)
	return st
}

// sql runs a statement on ClickHouse.
func (st *stage) sql(ctx context.Context, statement string) {
	GinkgoHelper()
	testengines.Query(ctx, "clickhouse", st.ClickHouse.HTTP, statement)
}

// proceed expects that everything recovers without help.
func (st *stage) proceed(ctx context.Context, o outcome) {
	GinkgoHelper()
	awaitReady(ctx, st.api)
	awaitReady(ctx, st.relay)
	st.users.awaitMore(ctx, perBatch)
	st.users.expectEach(ctx, st.System, o)
}

var _ = Describe("PostgreSQL", func() {
	It("is killed under load and started again", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{})
		for range 3 {
			Expect(st.own.Postgres.Kill()).To(Succeed())
			st.users.awaitFailure(ctx)
			awaitNotReady(ctx, st.relay)
			awaitNotReady(ctx, st.api)
			awaitMessage(ctx, st.relay, "outbox unavailable")
			Expect(st.own.Postgres.Start(ctx)).To(Succeed())
			awaitReady(ctx, st.relay)
			st.users.awaitMore(ctx, perBatch)
		}
		st.proceed(ctx, outcome{Fault: "killed and started again, 3 times", Done: "PostgreSQL"})
	})

	It("ends every session repeatedly", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{})
		for range 10 {
			st.Postgres.MustExecContext(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE datname = current_database() AND pid != pg_backend_pid()`)
			st.users.awaitMore(ctx, perBatch/5)
		}
		st.proceed(ctx, outcome{Fault: "sessions ended, 10 times", Done: "PostgreSQL"})
	})

	It("is read-only for a while", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{})
		readOnly := func(value string) {
			st.Postgres.MustExecContext(ctx, "ALTER SYSTEM SET default_transaction_read_only = "+value)
			st.Postgres.MustExecContext(ctx, "SELECT pg_reload_conf()")
			st.Postgres.MustExecContext(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE application_name LIKE 'diehard-%' AND pid != pg_backend_pid()`)
		}
		readOnly("on")
		awaitNotReady(ctx, st.api)
		awaitNotReady(ctx, st.relay)
		st.users.awaitResponse(ctx, "503 unavailable")
		before, _ := st.users.counts()
		st.users.awaitResponse(ctx, "503 unavailable")
		after, _ := st.users.counts()
		Expect(after).To(Equal(before), "users created")
		readOnly("off")
		st.proceed(ctx, outcome{Fault: "read-only", Done: "PostgreSQL"})
	})

	It("has no connection left", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{Settings: map[string]string{"max_connections": "60"}})
		hog := testengines.OpenPostgres(st.PostgresDSN, nil)
		hog.SetMaxOpenConns(1000)
		var hogged []*sql.Conn
		one := func() error {
			conn, err := hog.Conn(ctx)
			if err == nil {
				hogged = append(hogged, conn)
			}
			return err
		}
		Expect(one()).To(Succeed())
		// The programs lose their connections and cannot get new ones.
		Eventually(ctx, func(g Gomega) {
			_, err := hogged[0].ExecContext(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'diehard-%'")
			g.Expect(err).NotTo(HaveOccurred())
			for err == nil {
				err = one()
			}
			var others int
			g.Expect(hogged[0].QueryRowContext(ctx, "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'diehard-%'").
				Scan(&others)).To(Succeed())
			g.Expect(others).To(BeZero())
		}).WithTimeout(patience).WithPolling(time.Millisecond).Should(Succeed())
		st.users.awaitFailure(ctx)
		for _, conn := range hogged {
			Expect(conn.Close()).To(Succeed())
		}
		Expect(hog.Close()).To(Succeed())
		st.proceed(ctx, outcome{Fault: "no free connection", Done: "PostgreSQL"})
	})
})

var _ = Describe("ClickHouse", func() {
	// Users are created while ClickHouse is broken.
	broken := func(ctx context.Context, st *stage) {
		GinkgoHelper()
		awaitNotReady(ctx, st.relay)
		st.relay.AwaitMetric("diehard_relay_circuit_open", 1)
		awaitMessage(ctx, st.relay, "circuit breaker open")
		_, before := st.users.counts()
		st.users.awaitMore(ctx, perBatch)
		_, after := st.users.counts()
		Expect(after).To(Equal(before), "failed requests")
		Expect(st.api.Ready()).To(Equal(200))
	}

	It("is killed during inserts and started again on its data", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{})
		for range 3 {
			Expect(st.own.ClickHouse.Kill()).To(Succeed())
			broken(ctx, st)
			Expect(st.own.ClickHouse.Start(ctx)).To(Succeed())
			awaitReady(ctx, st.relay)
			awaitArrival(ctx, st.System, perBatch)
		}
		st.proceed(ctx, outcome{Fault: "killed during inserts and started again, 3 times", Done: "ClickHouse"})
	})

	It("lacks its table for a while", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{})
		st.sql(ctx, "RENAME TABLE event_log TO elsewhere")
		broken(ctx, st)
		st.sql(ctx, "RENAME TABLE elsewhere TO event_log")
		st.proceed(ctx, outcome{Fault: "table missing", Done: "ClickHouse"})
	})

	It("has too many parts, and recovers when the limit is raised, as after merges", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{})
		st.sql(ctx, "ALTER TABLE event_log MODIFY SETTING parts_to_delay_insert = 0, parts_to_throw_insert = 2")
		broken(ctx, st)
		st.sql(ctx, "ALTER TABLE event_log MODIFY SETTING parts_to_throw_insert = 100000")
		st.proceed(ctx, outcome{Fault: "too many parts", Done: "ClickHouse"})
	})

	It("throws in a materialized view after the rows are in the table", func(ctx SpecContext) {
		st := newStage(ctx, devstack.PostgresOptions{})
		st.sql(ctx, "CREATE MATERIALIZED VIEW throws ENGINE = Null AS SELECT throwIf(rand() % 2 = 0) FROM event_log")
		awaitArrival(ctx, st.System, 5*perBatch)
		st.sql(ctx, "DROP VIEW throws")
		st.proceed(ctx, outcome{Fault: "materialized view throws after the rows are stored", Done: "ClickHouse"})
	})

	It("inserts one of two partitions, and then fails", func(ctx SpecContext) {
		s := newSystem(ctx)
		// The relay dies before its insert. The spec inserts the events of the first
		// partition under the batch's token, as a server that fails afterwards would.
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, `CREATE TABLE seen (month UInt32) ENGINE = MergeTree ORDER BY month`)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
			"ALTER TABLE event_log ADD CONSTRAINT february CHECK toYYYYMM(event_date_time) != 202602 OR sleepEachRow(0) = 0")
		var both []outbox.Event
		for month := range 2 {
			for range perBatch / 2 {
				both = append(both, system.Event(outbox.WithTime(time.Date(2026, time.Month(month+1), 10, 0, 0, 0, 0, time.UTC))))
			}
		}
		Expect(s.Publish(ctx, both...)).To(Succeed())
		die(s, "flush-read")
		insertUnderToken(ctx, s, perBatch/2) // the events of the first partition
		s.Relay(s.ClickHouse.Native, small...)
		expectOnce(ctx, s, outcome{Fault: "one of two partitions stored", Done: "ClickHouse", Events: perBatch})
	})

	It("accepts 101 months in one batch", func(ctx SpecContext) {
		s := newSystem(ctx)
		events := make([]outbox.Event, 101)
		for i := range events {
			events[i] = system.Event(outbox.WithTime(time.Date(2018, 1, 1, 0, 0, 0, 0, time.UTC).AddDate(0, i, 0)))
		}
		Expect(s.Publish(ctx, events...)).To(Succeed())
		relay := s.Relay(s.ClickHouse.Native)
		expectOnce(ctx, s, outcome{Fault: "101 months in one batch", Done: "ClickHouse", Events: len(events)})
		relay.AwaitMetric(`diehard_relay_batches_total{result="settled"}`, 1)
	})

	// If the server's settings change while a relay runs, the relay reports the
	// server's own error.
	DescribeTable("refuses the relay's inserts for a while", func(ctx SpecContext, fault, settings, said string) {
		s := newSystem(ctx)
		gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
		relay := s.Relay(through, slices.Concat(small, brisk)...)
		stop := produce(ctx, s)
		awaitArrival(ctx, s, perBatch)
		gateway.Impose(settings)
		awaitNotReady(ctx, relay)
		Eventually(ctx, errorsOf).WithArguments(relay).WithTimeout(patience).Should(ContainElement(ContainSubstring(said)))
		gateway.Impose("")
		awaitReady(ctx, relay)
		expectOnce(ctx, s, outcome{Fault: fault, Done: "ClickHouse, while a relay runs", Events: stop()})
	},
		Entry("because its user is read-only", "user is read-only", "readonly=1", "the user or the server is read-only"),
		Entry("because its user may only change settings", "user is read-only except for settings", "readonly=2", "read-only"),
		Entry("because memory is short", "memory limit", "max_memory_usage_for_user=1&max_untracked_memory=0", "short of memory"),
	)

	It("hides rows from the user's profile, and the relay finds them all the same", func(ctx SpecContext) {
		s := newSystem(ctx)
		unsent(ctx, s)
		insertUnderToken(ctx, s, perBatch)
		pushOut(ctx, s)
		s.Relay(s.ClickHouse.HTTP+"?additional_table_filters="+url.QueryEscape("{'event_log': 'metadata_version = 2'}"), small...)
		s.AwaitEmpty(ctx)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP PARTITION 200001")
		expectOnce(ctx, s, outcome{Fault: "rows are hidden", Done: "by the profile of the user", Events: perBatch})
	})

	It("hides rows by a row policy; the relay reports it and inserts no batch again", func(ctx SpecContext) {
		s := newSystem(ctx)
		unsent(ctx, s)
		insertUnderToken(ctx, s, perBatch)
		pushOut(ctx, s)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP PARTITION 200001")
		gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
		gateway.Impose("additional_table_filters=" + url.QueryEscape("{'event_log': 'metadata_version = 2'}"))
		relay := s.LaunchRelay(through, slices.Concat(small, brisk)...) // it may never be ready
		Eventually(ctx, errorsOf).WithArguments(relay).WithTimeout(patience).Should(ContainElement(ContainSubstring("CREATE ROW POLICY")))
		awaitNotReady(ctx, relay)
		relay.AwaitMetric("diehard_relay_blind", 1)
		Eventually(ctx, func(g Gomega) {
			var attempts int
			g.Expect(s.Postgres.Get(&attempts, "SELECT max(attempts) FROM outbox_batches")).To(Succeed())
			g.Expect(attempts).To(BeNumerically(">", 3))
		}).WithTimeout(patience).Should(Succeed())
		gateway.Impose("")
		awaitReady(ctx, relay)
		expectOnce(ctx, s, outcome{Fault: "rows are hidden", Done: "by a row policy", Events: perBatch})
	})

	It("refuses a relay whose DSN is read-only; the relay reports it and ends", func(ctx SpecContext) {
		s := newSystem(ctx)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		relay := s.LaunchRelay(s.ClickHouse.HTTP+"?readonly=2", small...)
		relay.EndsWith(1)
		Expect(errorsOf(relay)).To(ContainElement(ContainSubstring("the clickhouse dsn sets readonly")))
		s.Relay(s.ClickHouse.HTTP, small...)
		expectOnce(ctx, s, outcome{Fault: "DSN is read-only", Done: "ClickHouse", Events: perBatch})
	})

	It("refuses a relay with a wrong password", func(ctx SpecContext) {
		s := newSystem(ctx)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		relay := s.LaunchRelay(withPassword(s.ClickHouse.HTTP), small...)
		Eventually(ctx, errorsOf).WithArguments(relay).WithTimeout(patience).
			Should(ContainElement(ContainSubstring("the credentials are refused")))
		awaitNotReady(ctx, relay)
		relay.Stop()
		var attempts int
		Expect(s.Postgres.Get(&attempts, "SELECT coalesce(max(attempts), 0) FROM outbox_batches")).To(Succeed())
		Expect(attempts).To(BeZero(), "no attempt")
		s.Relay(s.ClickHouse.HTTP, small...)
		expectOnce(ctx, s, outcome{Fault: "wrong password", Done: "ClickHouse", Events: perBatch})
	})
})

// errorsOf returns the errors in the program's error records.
func errorsOf(p *programs.Process) (errs []string) {
	GinkgoHelper()
	for _, record := range p.Log() {
		if record["level"] == "ERROR" {
			errs = append(errs, fmt.Sprint(record["err"]))
		}
	}
	return errs
}

func withPassword(dsn string) string {
	GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	u.User = url.UserPassword("default", "wrong")
	return u.String()
}
