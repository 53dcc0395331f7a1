package relay_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"github.com/onsi/gomega/types"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/relay"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("The watchdog", func() {
	var (
		dsn        string
		db         *sqlx.DB
		target     testengines.ClickHouseDSNs
		clickHouse *observedSink
		registry   *prometheus.Registry
		log        *gbytes.Buffer
	)

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		db = testengines.OpenPostgres(dsn, nil)
		target = suite.ClickHouseDSNs(ctx)
		clickHouse = openSink(target.Native)
		registry = prometheus.NewRegistry()
		log = gbytes.NewBuffer()
	})

	newStore := func() *store.Store {
		return store.New(testengines.OpenStore(dsn, store.Session(30*time.Second)), store.Options{MaxRows: 10})
	}

	publish := func(n int) {
		GinkgoHelper()
		db.MustExec(`INSERT INTO outbox_events (event_type, event_context) SELECT 'thing_happened', '{}' FROM generate_series(1, $1::int)`, n)
	}

	// foreign returns a transaction of another application.
	foreign := func(ctx context.Context) *sqlx.Tx {
		GinkgoHelper()
		tx, err := testengines.OpenPostgres(dsn, map[string]string{"application_name": "psql of Ada"}).BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { _ = tx.Rollback() })
		return tx
	}

	pid := func(tx *sqlx.Tx) (pid int) {
		GinkgoHelper()
		Expect(tx.Get(&pid, "SELECT pg_backend_pid()")).To(Succeed())
		return pid
	}

	start := func(s *store.Store, change ...func(*relay.Options)) *runningRelay {
		GinkgoHelper()
		o := relay.Options{
			Store: s, Sink: clickHouse, Registry: registry, Log: slog.New(slog.NewTextHandler(log, nil)),
			Linger: time.Millisecond, PollInterval: 50 * time.Millisecond, FlushTimeout: 30 * time.Second,
			BackoffMin: 10 * time.Millisecond, BackoffMax: 100 * time.Millisecond,
		}
		for _, c := range change {
			c(&o)
		}
		ctx, cancel := context.WithCancel(context.Background())
		running := &runningRelay{Relay: relay.New(o), stop: cancel, ended: make(chan error, 1)}
		running.Watch(100*time.Millisecond, time.Second, 300*time.Millisecond)
		go func() {
			running.ended <- running.Run(ctx)
			close(running.ended)
		}()
		DeferCleanup(func(ctx SpecContext) {
			cancel()
			Eventually(ctx, running.ended).WithTimeout(patience).Should(BeClosed())
		})
		return running
	}

	failingMetric := func(value int) error {
		return testutil.GatherAndCompare(registry, strings.NewReader(fmt.Sprintf(`
# HELP diehard_relay_failing_batches Batches of the whole fleet whose data may have caused a failed attempt. They are retried.
# TYPE diehard_relay_failing_batches gauge
diehard_relay_failing_batches %d
`, value)), "diehard_relay_failing_batches")
	}

	// logged counts a message. On a busy machine, the delivery can also stall before and after
	// the stall that a spec causes.
	logged := func(message string) int { return strings.Count(string(log.Contents()), `msg="`+message+`"`) }

	// expectStalled waits until the relay says that the delivery is stalled, and why.
	expectStalled := func(ctx context.Context, running *runningRelay, why ...types.GomegaMatcher) {
		GinkgoHelper()
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).
			Should(MatchError(And(append(why, ContainSubstring("stalled: "))...)))
		Expect(stalledMetric(registry, 1)).To(Succeed())
		Expect(log).To(gbytes.Say(`level=ERROR msg="delivery stalled" err="stalled: `))
		Expect(logged("delivery stalled")).To(Equal(logged("delivery continues")+1), "each stall is logged once")
	}

	// expectAll waits until the relay has delivered everything.
	expectAll := func(ctx context.Context, running *runningRelay, n int) {
		GinkgoHelper()
		Eventually(ctx, func(g Gomega) {
			var events, rows int
			g.Expect(db.Get(&events, "SELECT count(*) FROM outbox_events")).To(Succeed())
			g.Expect(events).To(BeZero())
			g.Expect(testengines.Scan(ctx, target.HTTP, "SELECT count() FROM event_log", &rows)).To(Succeed())
			g.Expect(rows).To(Equal(n))
			g.Expect(running.Ready(ctx)).To(Succeed())
			g.Expect(stalledMetric(registry, 0)).To(Succeed())
		}).WithTimeout(patience).Should(Succeed(), func() string { return string(log.Contents()) })
	}

	// expectDelivered also expects that the relay has said that the delivery continues.
	expectDelivered := func(ctx context.Context, running *runningRelay, n int) {
		GinkgoHelper()
		expectAll(ctx, running, n)
		Expect(logged("delivery continues")).To(And(BeNumerically(">", 0), Equal(logged("delivery stalled"))), "each end of a stall is logged once")
	}

	DescribeTable("names the session that prevents the delivery",
		func(ctx SpecContext, statement string, batches int, why ...string) {
			s := newStore()
			publish(5)
			for range batches {
				Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
			}
			session := foreign(ctx)
			_, err := session.ExecContext(ctx, statement)
			Expect(err).NotTo(HaveOccurred())
			running := start(s)
			reasons := []types.GomegaMatcher{ContainSubstring(`session %d (application "psql of Ada", user `, pid(session)), ContainSubstring("idle in transaction")}
			for _, reason := range why {
				reasons = append(reasons, ContainSubstring(reason))
			}
			expectStalled(ctx, running, reasons...)
			Expect(session.Rollback()).To(Succeed())
			expectDelivered(ctx, running, 5)
		},
		Entry("the cursor is locked", "SELECT FROM outbox_cursor FOR UPDATE", 0,
			"event 1, published ", " is in no batch: ", "has locked the row of outbox_cursor", "batches: 0 delivering"),
		Entry("the cursor is updated", "UPDATE outbox_cursor SET low_watermark = 0", 0, "has locked the row of outbox_cursor"),
		Entry("a batch is locked", "SELECT FROM outbox_batches FOR UPDATE", 1,
			"batch ", " with 5 events, cut ", "waits for attempt 1: ", "has locked the row of the batch"),
		Entry("a batch is locked and waits for a time far ahead", "UPDATE outbox_batches SET next_attempt_at = 'infinity'", 1,
			"has locked the row of the batch"),
		Entry("outbox_events is locked", "LOCK TABLE outbox_events", 0,
			"the outbox cannot be read", "holds the lock AccessExclusiveLock of outbox_events"),
		Entry("outbox_batches is locked", "LOCK TABLE outbox_batches", 0, "holds the lock AccessExclusiveLock of outbox_batches"),
		Entry("outbox_cursor is locked", "LOCK TABLE outbox_cursor", 0, "holds the lock AccessExclusiveLock of outbox_cursor"),
		Entry("outbox_history is locked", "LOCK TABLE outbox_history", 0, "holds the lock AccessExclusiveLock of outbox_history"),
		Entry("an index of outbox_batches is built", "LOCK TABLE outbox_batches IN SHARE MODE", 0, "holds the lock ShareLock of outbox_batches"),
		Entry("an index of outbox_batches is built after a cut", "LOCK TABLE outbox_batches IN SHARE MODE", 1, "holds the lock ShareLock of outbox_batches"),
	)

	It("reports nothing while the fleet is paused", func(ctx SpecContext) {
		s := newStore()
		Expect(s.Pause(ctx, "alice@laptop")).To(BeTrue())
		running := start(s)
		Eventually(ctx, s.Paused).WithTimeout(patience).ShouldNot(BeNil())
		publish(1)
		published := time.Now()
		turned := func() float64 { // the watchdog's last turn, in seconds after the publishing
			return lastTurn(registry, "watch") - float64(published.UnixMilli())/1000
		}
		Eventually(ctx, turned).WithTimeout(patience).Should(BeNumerically(">", 2), "twice the patience")
		Expect(running.Ready(ctx)).To(Succeed())
		Expect(log).To(gbytes.Say(`level=WARN msg="fleet paused" since=\S+ by=alice@laptop`))
		Expect(string(log.Contents())).NotTo(ContainSubstring("stalled"))

		Expect(s.Resume(ctx, "alice@laptop")).To(BeTrue())
		expectAll(ctx, running, 1)
		Expect(log).To(gbytes.Say(`level=INFO msg="fleet resumed"`))
	})

	It("finds a late commit that no relay can cut", func(ctx SpecContext) {
		late, s := foreign(ctx), newStore()
		_, err := late.ExecContext(ctx, "INSERT INTO outbox_events (event_type, event_context) VALUES ('late', '{}')")
		Expect(err).NotTo(HaveOccurred())
		publish(5)
		running := start(s)
		Eventually(ctx, func(g Gomega) {
			var lowWatermark int
			publish(1) // the low watermark follows the cuts
			g.Expect(db.Get(&lowWatermark, "SELECT low_watermark FROM outbox_cursor")).To(Succeed())
			g.Expect(lowWatermark).To(BeNumerically(">", 1))
		}).WithTimeout(patience).Should(Succeed())
		Eventually(ctx, func(g Gomega) {
			var events int
			g.Expect(db.Get(&events, "SELECT count(*) FROM outbox_events")).To(Succeed())
			g.Expect(events).To(BeZero())
		}).WithTimeout(patience).Should(Succeed())
		session := foreign(ctx)
		_, err = session.ExecContext(ctx, "SELECT FROM outbox_cursor FOR UPDATE")
		Expect(err).NotTo(HaveOccurred())
		Expect(late.Commit()).To(Succeed())
		expectStalled(ctx, running, ContainSubstring("event 1, published "), ContainSubstring("has locked the row of outbox_cursor"))
		Expect(session.Rollback()).To(Succeed())
		var published int
		Expect(db.Get(&published, "SELECT last_value FROM outbox_events_id_seq")).To(Succeed())
		expectDelivered(ctx, running, published)
	})

	It("finds an event behind a requeued event, which is in a batch above the high watermark", func(ctx SpecContext) {
		publish(2)
		db.MustExec(`INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, failures, next_attempt_at)
			VALUES (gen_random_uuid(), '{[1,2)}', 1, 1, 'token', 1, 1, clock_timestamp() + interval '20 s')`)
		db.MustExec("UPDATE outbox_cursor SET cuts = 1")
		session := foreign(ctx)
		_, err := session.ExecContext(ctx, "SELECT FROM outbox_cursor FOR UPDATE")
		Expect(err).NotTo(HaveOccurred())
		running := start(newStore())
		expectStalled(ctx, running, ContainSubstring("event 2, published "), Not(ContainSubstring("event 1, ")))
		Expect(session.Rollback()).To(Succeed())
		db.MustExec("UPDATE outbox_batches SET next_attempt_at = '-infinity'")
		expectDelivered(ctx, running, 2)
	})

	It("names event types in quarantine and their errors", func(ctx SpecContext) {
		s := newStore()
		publish(5)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
		db.MustExec("UPDATE outbox_batches SET failures = 1, quarantined = true, next_attempt_at = clock_timestamp() + interval '20 minutes'")
		db.MustExec("INSERT INTO outbox_quarantine (event_type, error) VALUES ('thing_happened', 'clickhouse error 395')")
		running := start(s)
		expectStalled(ctx, running, ContainSubstring(
			"1 batches of quarantined event types: the sink takes no event of these types (thing_happened: clickhouse error 395)"))
		db.MustExec("DELETE FROM outbox_quarantine")
		db.MustExec("UPDATE outbox_batches SET quarantined = false, next_attempt_at = '-infinity'")
		expectDelivered(ctx, running, 5)
	})

	It("finds a stalled event whose time of publishing is in the future", func(ctx SpecContext) {
		db.MustExec(`INSERT INTO outbox_events (event_type, event_context, published_at)
			VALUES ('thing_happened', '{}', clock_timestamp() + interval '1 hour')`)
		session := foreign(ctx)
		_, err := session.ExecContext(ctx, "SELECT FROM outbox_cursor FOR UPDATE")
		Expect(err).NotTo(HaveOccurred())
		running := start(newStore())
		expectStalled(ctx, running, ContainSubstring("event 1, published just now, "))
		Expect(session.Rollback()).To(Succeed())
		expectDelivered(ctx, running, 1)
	})

	It("does not count an event that a worker inserts, but the locked batch behind it", func(ctx SpecContext) {
		s := newStore()
		publish(20)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 2))
		var batches []string
		Expect(db.Select(&batches, "SELECT batch_id FROM outbox_batches ORDER BY batch_id")).To(Succeed())
		release := clickHouse.hold()
		session := foreign(ctx)
		_, err := session.ExecContext(ctx, "SELECT FROM outbox_batches WHERE batch_id = $1 FOR UPDATE", batches[1])
		Expect(err).NotTo(HaveOccurred())
		running := start(s)
		expectStalled(ctx, running, ContainSubstring(batches[1]))

		By("waiting until the batch of the worker would be due, and for a later locked batch")
		Eventually(ctx, func(g Gomega) {
			var isDue bool
			g.Expect(db.Get(&isDue, "SELECT next_attempt_at < clock_timestamp() - interval '300 ms' FROM outbox_batches WHERE batch_id = $1", batches[0])).To(Succeed())
			g.Expect(isDue).To(BeTrue())
		}).WithTimeout(patience).Should(Succeed())
		publish(10)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
		_, err = session.ExecContext(ctx, "SELECT FROM outbox_batches ORDER BY batch_id DESC LIMIT 1 FOR UPDATE")
		Expect(err).NotTo(HaveOccurred())
		Expect(db.Select(&batches, "SELECT batch_id FROM outbox_batches ORDER BY batch_id")).To(Succeed())
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(MatchError(And(
			ContainSubstring(batches[1]), ContainSubstring(batches[2]), Not(ContainSubstring(batches[0])))))
		release()
		Expect(session.Rollback()).To(Succeed())
		expectDelivered(ctx, running, 30)
	})

	It("says that the sink is down", func(ctx SpecContext) {
		running := start(newStore())
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(Succeed())
		testengines.Query(ctx, "clickhouse", target.HTTP, "RENAME TABLE event_log TO elsewhere")
		publish(5)
		Eventually(ctx, func() error { return stalledMetric(registry, 1) }).WithTimeout(patience).Should(Succeed())
		Expect(log).To(gbytes.Say(`level=ERROR msg="circuit breaker open"`))
		Expect(running.Ready(ctx)).To(MatchError(And(HavePrefix("sink: "), Not(ContainSubstring("stalled: ")))))
		testengines.Query(ctx, "clickhouse", target.HTTP, "RENAME TABLE elsewhere TO event_log")
		expectAll(ctx, running, 5)
		Expect(string(log.Contents())).NotTo(ContainSubstring("delivery stalled"), "one record is enough")
	})

	It("says that PostgreSQL does not answer", func(ctx SpecContext) {
		proxy, through := faults.StartProxyTo(dsn)
		publish(5)
		running := start(store.New(testengines.OpenStore(through, store.Session(30*time.Second)), store.Options{}))
		expectAll(ctx, running, 5)
		proxy.Vanish()
		publish(5)
		// A worker or the watchdog notices it first.
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(MatchError(Or(
			ContainSubstring("the outbox cannot be read (postgresql has not answered in time)"), HavePrefix("postgresql: "))))
		Eventually(ctx, func() error { return stalledMetric(registry, 1) }).WithTimeout(patience).Should(Succeed())
		proxy.Return()
		expectAll(ctx, running, 10)
	})

	It("says that a subscription writes into the outbox", func(ctx SpecContext) {
		other := testengines.OpenPostgres(suite.PostgresDSN(ctx), nil)
		other.MustExec("CREATE PUBLICATION everything FOR ALL TABLES")
		var name string
		Expect(other.Get(&name, "SELECT current_database()")).To(Succeed())
		db.MustExec(fmt.Sprintf(`CREATE SUBSCRIPTION from_blue CONNECTION '%s' PUBLICATION everything
			WITH (create_slot = false, copy_data = false, slot_name = 'missing')`, suite.PostgresDSNOf(name)))
		drop := sync.OnceFunc(func() {
			db.MustExec("ALTER SUBSCRIPTION from_blue DISABLE")
			db.MustExec("ALTER SUBSCRIPTION from_blue SET (slot_name = NONE)")
			db.MustExec("DROP SUBSCRIPTION from_blue")
		})
		DeferCleanup(drop)
		publish(5)
		// After the subscription, an event waits for inserts of the other server.
		running := start(store.New(testengines.OpenStore(dsn, store.Session(30*time.Second)), store.Options{FlushTimeout: time.Second}))
		Eventually(stalledMetric).WithArguments(registry, 1).WithTimeout(patience).Should(Succeed())
		Expect(running.Ready(ctx)).To(MatchError(And(HavePrefix("postgresql: "), ContainSubstring("from_blue"), ContainSubstring("DROP SUBSCRIPTION"))))
		Expect(log).To(gbytes.Say(`level=ERROR msg="outbox unavailable" .*from_blue`))
		drop()
		expectAll(ctx, running, 5)
	})

	It("names the destination of a batch that was attempted elsewhere", func(ctx SpecContext) {
		s := newStore()
		publish(5)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
		db.MustExec("UPDATE outbox_batches SET attempts = 1, destination = 'a table that was lost'")
		running := start(s)
		expectStalled(ctx, running, ContainSubstring("its first attempt went to another destination, a table that was lost"),
			HavePrefix("1 batches with 5 events"))
		db.MustExec("UPDATE outbox_batches SET destination = NULL")
		expectDelivered(ctx, running, 5)
	})

	It("counts failing batches, and names the session that has locked one", func(ctx SpecContext) {
		s := newStore()
		publish(20)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 2))
		db.MustExec("UPDATE outbox_batches SET attempts = 3, failures = 3, last_error = 'clickhouse error 32'")
		session := foreign(ctx)
		_, err := session.ExecContext(ctx, "SELECT FROM outbox_batches FOR UPDATE")
		Expect(err).NotTo(HaveOccurred())
		running := start(s)
		expectStalled(ctx, running, ContainSubstring("waits for attempt 4, last error: clickhouse error 32: session "),
			ContainSubstring("batches: 0 delivering, 0 of them without an attempt, 2 failing"))
		Expect(failingMetric(2)).To(Succeed())
		Expect(session.Rollback()).To(Succeed())
		expectDelivered(ctx, running, 20)
		Expect(failingMetric(0)).To(Succeed())
	})

	It("warns of failing batches that wait for their only worker, without becoming not ready", func(ctx SpecContext) {
		s := newStore()
		publish(20)
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 2))
		db.MustExec("UPDATE outbox_batches SET attempts = 3, failures = 3, last_error = 'clickhouse error 32', created_at = created_at - interval '1 hour'")
		release := clickHouse.hold()
		running := start(s)
		Eventually(ctx, log).WithTimeout(patience).Should(gbytes.Say(
			`level=WARN msg="failing batches wait for a worker" failing=2 waiting=\d last_error="clickhouse error 32" hint="failing batches use one worker of each relay"`))
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(Succeed())
		release()
		Eventually(ctx, func() error { return failingMetric(0) }).WithTimeout(patience).Should(Succeed())
		Expect(strings.Count(string(log.Contents()), "failing batches wait for a worker")).To(Equal(1))
		Expect(string(log.Contents())).NotTo(ContainSubstring("delivery stalled"))
	})

	It("names a prepared transaction that has locked the cursor", func(ctx SpecContext) {
		own := testengines.StartPostgres(ctx, map[string]string{"max_prepared_transactions": "1"})
		dsn = own.DSN()
		db = testengines.OpenPostgres(dsn, nil)
		Expect(testengines.Schema.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
		publish(5)
		session := foreign(ctx)
		_, err := session.ExecContext(ctx, "SELECT FROM outbox_cursor FOR UPDATE")
		Expect(err).NotTo(HaveOccurred())
		_, err = session.ExecContext(ctx, "PREPARE TRANSACTION 'forgotten by Ada'")
		Expect(err).NotTo(HaveOccurred())
		running := start(newStore())
		expectStalled(ctx, running, ContainSubstring(`the prepared transaction "forgotten by Ada" has locked the row of outbox_cursor`))
		db.MustExec("ROLLBACK PREPARED 'forgotten by Ada'")
		expectDelivered(ctx, running, 5)
	})

	It("names both sessions if a lock waits for another session", func(ctx SpecContext) {
		publish(5)
		reader, migration := foreign(ctx), foreign(ctx)
		_, err := reader.ExecContext(ctx, "SELECT count(*) FROM outbox_events")
		Expect(err).NotTo(HaveOccurred())
		first, second := pid(reader), pid(migration)
		waits := make(chan error, 1)
		go func() {
			_, err := migration.ExecContext(ctx, "ALTER TABLE outbox_events ADD COLUMN more text")
			waits <- err
		}()
		running := start(newStore())
		expectStalled(ctx, running,
			ContainSubstring("session %d ", second), ContainSubstring("waits for the lock AccessExclusiveLock of outbox_events"),
			ContainSubstring("session %d ", first), ContainSubstring("blocks a session that needs a table of the outbox"))
		Expect(reader.Rollback()).To(Succeed())
		Eventually(ctx, waits).WithTimeout(patience).Should(Receive(Succeed()))
		Expect(migration.Rollback()).To(Succeed())
		expectDelivered(ctx, running, 5)
	})
})

// stalledMetric returns nil if diehard_relay_stalled has the value.
func stalledMetric(registry *prometheus.Registry, value int) error {
	return testutil.GatherAndCompare(registry, strings.NewReader(fmt.Sprintf(`
# HELP diehard_relay_stalled 1 if an event is old and no relay works on it: see /readyz.
# TYPE diehard_relay_stalled gauge
diehard_relay_stalled %d
`, value)), "diehard_relay_stalled")
}

// lastTurn returns the time of a loop's last turn, in seconds since 1970.
func lastTurn(registry *prometheus.Registry, loop string) float64 {
	GinkgoHelper()
	families, err := registry.Gather()
	Expect(err).NotTo(HaveOccurred())
	for _, family := range families {
		if family.GetName() != "diehard_relay_loop_last_turn_timestamp_seconds" {
			continue
		}
		for _, metric := range family.GetMetric() {
			if metric.GetLabel()[0].GetValue() == loop {
				return metric.GetGauge().GetValue()
			}
		}
	}
	return 0
}
