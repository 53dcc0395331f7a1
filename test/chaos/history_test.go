package chaos_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

var _ = Describe("A restore of a dump on a new server", func() {
	DescribeTable("loses and doubles no event that the dump has", func(ctx SpecContext, restart bool) {
		own := system.StartPrivate(ctx, devstack.PostgresOptions{}, devstack.ClickHouseOptions{})
		s := system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)
		clients, through := faults.StartProxyTo(own.PostgresDSN)
		env := slices.Concat(small, brisk, []string{"DIEHARD_POSTGRES_DSN=" + through})
		relay := s.Relay(s.ClickHouse.Native, env...)

		By("dumping the outbox while events are delivered")
		stop := produce(ctx, s)
		awaitArrival(ctx, s, 500)
		var dump testengines.Rows
		Eventually(ctx, func() []string {
			dump = testengines.DumpTables(ctx, s.Postgres, allTables(ctx, s.Postgres)...)
			return dump["outbox_batches"]
		}).WithTimeout(patience).WithPolling(time.Millisecond).ShouldNot(BeEmpty())
		awaitArrival(ctx, s, 500)
		delivered := stop()
		s.AwaitEmpty(ctx)

		By("restoring the dump on a new server, with publishers at work")
		if restart {
			relay.Stop()
		}
		target := startEmpty(ctx, own, nil)
		dump.Restore(ctx, target.db)
		target.db.MustExecContext(ctx, "SELECT setval(pg_get_serial_sequence('outbox_events', 'id'), (SELECT max(id) FROM outbox_events))")
		after := system.New(suite.Prepared(), target.dsn, own.ClickHouseDSNs)
		stop = produce(ctx, after)
		Expect(own.Postgres.Kill()).To(Succeed())
		clients.Lead(hostOf(target.dsn))
		clients.Reset()
		if restart {
			relay = s.LaunchRelay(s.ClickHouse.Native, env...)
		}
		awaitMessage(ctx, relay, "resolving all batches")
		awaitReady(ctx, relay)
		expectOnce(ctx, after, outcome{Fault: "dump restored on a new server", Done: "PostgreSQL", Events: delivered + stop()})
	},
		Entry("if the relay keeps running", false),
		Entry("if the relay is restarted", true),
	)
})

var _ = Describe("A switchover by logical replication", func() {
	It("to a server that lacks cuts and settlements loses and doubles no event", func(ctx SpecContext) {
		own := system.StartPrivate(ctx, devstack.PostgresOptions{Settings: map[string]string{"wal_level": "logical"}}, devstack.ClickHouseOptions{})
		s := system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)
		s.Postgres.MustExecContext(ctx, "CREATE PUBLICATION everything FOR ALL TABLES")
		env := slices.Concat(small, brisk)
		relay := s.Relay(s.ClickHouse.Native, env...)
		stop := produce(ctx, s)
		awaitArrival(ctx, s, 500)

		By("subscribing while events are delivered")
		target := startEmpty(ctx, own, nil)
		replication, primary := faults.StartProxyTo(own.PostgresDSN)
		target.db.MustExecContext(ctx, fmt.Sprintf("CREATE SUBSCRIPTION from_blue CONNECTION %s PUBLICATION everything", pq.QuoteLiteral(primary)))
		after := system.New(suite.Prepared(), target.dsn, own.ClickHouseDSNs)
		Eventually(ctx, func(g Gomega) {
			var copying int
			g.Expect(target.db.GetContext(ctx, &copying, "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate != 'r'")).To(Succeed())
			g.Expect(copying).To(BeZero())
		}).WithTimeout(patience).Should(Succeed())
		next := after.LaunchRelay(s.ClickHouse.Native, env...)
		awaitArrival(ctx, s, 500)
		events := stop()
		s.AwaitEmpty(ctx)
		relay.Stop()

		By("replicating 300 more events, which are delivered after replication has stopped")
		Expect(s.Publish(ctx, system.Events(300)...)).To(Succeed())
		Eventually(ctx, func(g Gomega) {
			waiting, batches, _ := after.Left(g)
			g.Expect(waiting).To(Equal(300))
			g.Expect(batches).To(BeZero())
		}).WithTimeout(patience).Should(Succeed())
		awaitNotReady(ctx, next)
		replication.Down()
		relay = s.Relay(s.ClickHouse.Native, env...)
		s.AwaitEmpty(ctx)
		relay.Stop()

		By("switching over, with publishers at work")
		for _, statement := range []string{"DISABLE", "SET (slot_name = NONE)"} {
			target.db.MustExecContext(ctx, "ALTER SUBSCRIPTION from_blue "+statement)
		}
		stop = insist(ctx, after)
		target.db.MustExecContext(ctx, "DROP SUBSCRIPTION from_blue")
		awaitMessage(ctx, next, "resolving all batches")
		awaitReady(ctx, next)
		awaitArrival(ctx, after, 500)
		expectOnce(ctx, after, outcome{Fault: "logical switchover without 300 settlements", Done: "PostgreSQL", Events: events + 300 + stop()})
	})
})

// empty is a server with empty tables.
type empty struct {
	dsn string
	db  *sqlx.DB
}

// startEmpty starts another server with the password of the first. Its database diehard
// has the tables of a dump without data.
func startEmpty(ctx context.Context, own *system.Private, settings map[string]string) empty {
	GinkgoHelper()
	server, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Settings: settings})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(server.Stop()).To(Succeed()) })
	dsn, err := server.CreateDatabase(ctx, "diehard")
	Expect(err).NotTo(HaveOccurred())
	first, err := url.Parse(own.PostgresDSN)
	Expect(err).NotTo(HaveOccurred())
	password, _ := first.User.Password()
	testengines.Query(ctx, "postgres", dsn, "ALTER ROLE diehard PASSWORD "+pq.QuoteLiteral(password))
	first.Host = hostOf(dsn)
	db := testengines.OpenPostgres(first.String(), nil)
	Expect(testengines.Schema.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
	for _, table := range allTables(ctx, db) {
		db.MustExecContext(ctx, "TRUNCATE "+table)
	}
	return empty{first.String(), db}
}

func allTables(ctx context.Context, db *sqlx.DB) (tables []string) {
	GinkgoHelper()
	Expect(db.SelectContext(ctx, &tables, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).To(Succeed())
	return tables
}

// insist publishes events one after the other. It repeats an event that PostgreSQL
// refuses. The returned function stops it and returns the number of events.
func insist(ctx context.Context, s *system.System) (stop func() int) {
	var stopping atomic.Bool
	done := make(chan int)
	go func() {
		defer GinkgoRecover()
		published := 0
		for !stopping.Load() {
			event := system.Event()
			Eventually(ctx, func() error { return s.Publish(ctx, event) }).WithTimeout(patience).Should(Succeed())
			published++
		}
		done <- published
	}()
	return func() int {
		stopping.Store(true)
		return <-done
	}
}
