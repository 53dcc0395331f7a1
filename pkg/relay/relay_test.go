package relay_test

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/getsentry/sentry-go"
	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	. "github.com/onsi/gomega/gstruct"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/otlptest"
	"github.com/diehard-outbox/diehard/internal/sentrytest"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
	"github.com/diehard-outbox/diehard/pkg/relay"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

// patience bounds the wait for an effect.
const patience = 2 * time.Minute

var _ = Describe("Relay", func() {
	var (
		dsn        string
		db         *sqlx.DB
		s          *store.Store
		target     testengines.ClickHouseDSNs
		clickHouse *observedSink
		publisher  *outbox.Publisher
		registry   *prometheus.Registry
		log        *gbytes.Buffer
		relays     []*runningRelay
		watch      func(*relay.Relay) // sets the watchdog's times, if not nil
	)

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		db = testengines.OpenStore(dsn, store.Session(30*time.Second))
		s = store.New(db, store.Options{})
		target = suite.ClickHouseDSNs(ctx)
		clickHouse = openSink(target.Native)
		publisher = outbox.NewPublisher(outbox.PublisherOptions{Environment: "Test"})
		registry = prometheus.NewRegistry()
		log = gbytes.NewBuffer()
		relays, watch = nil, nil
	})

	publish := func(ctx context.Context, events ...outbox.Event) []outbox.Event {
		GinkgoHelper()
		for i := range events {
			if events[i].EventID == uuid.Nil {
				events[i].EventID = uuid.New()
			}
			if events[i].EventType == "" {
				events[i].EventType = "thing_happened"
			}
			if events[i].EventDateTime.IsZero() {
				events[i].EventDateTime = time.Date(2026, 3, 1, 12, 0, 0, 123_456_000, time.UTC)
			}
			if events[i].EventContext.Len() == 0 {
				events[i].EventContext = outboxtest.JSON(`{}`)
			}
		}
		tx := db.MustBegin()
		defer func() { _ = tx.Rollback() }()
		Expect(publisher.Publish(ctx, tx, events...)).To(Succeed())
		Expect(tx.Commit()).To(Succeed())
		return events
	}

	publishMany := func(ctx context.Context, n int) []outbox.Event {
		GinkgoHelper()
		return publish(ctx, make([]outbox.Event, n)...)
	}

	// start runs a relay for the rest of the spec.
	start := func(change ...func(*relay.Options)) *runningRelay {
		GinkgoHelper()
		o := relay.Options{
			Store: s, Sink: clickHouse, Registry: registry,
			Log:          slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
			Linger:       time.Millisecond,
			PollInterval: 50 * time.Millisecond,
			FlushTimeout: 30 * time.Second,
			BackoffMin:   10 * time.Millisecond,
			BackoffMax:   100 * time.Millisecond,
		}
		for _, c := range change {
			c(&o)
		}
		ctx, cancel := context.WithCancel(context.Background())
		running := &runningRelay{Relay: relay.New(o), stop: cancel, ended: make(chan error, 1)}
		relays = append(relays, running)
		if watch != nil {
			watch(running.Relay)
		}
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

	waiting := func(g Gomega) (events, batches int) {
		g.Expect(db.Get(&events, "SELECT count(*) FROM outbox_events")).To(Succeed())
		g.Expect(db.Get(&batches, "SELECT count(*) FROM outbox_batches")).To(Succeed())
		return events, batches
	}

	// expectOnce waits until the outbox is empty and no relay has a batch. Then it checks
	// that the sink has exactly n events, each once. A relay updates its metrics and logs
	// only after the commit that empties the outbox.
	expectOnce := func(ctx context.Context, n int) {
		GinkgoHelper()
		Eventually(ctx, func(g Gomega) {
			events, batches := waiting(g)
			g.Expect(events + batches).To(BeZero())
		}).WithTimeout(patience).Should(Succeed(), func() string { return string(log.Contents()) })
		for _, running := range relays {
			Eventually(ctx, running.Idle).WithTimeout(patience).Should(BeTrue())
		}
		var rows, distinct int
		Expect(testengines.Scan(ctx, target.HTTP, "SELECT count(), uniqExact(event_id) FROM event_log WHERE event_type != 'foreign'", &rows, &distinct)).To(Succeed())
		Expect(rows).To(Equal(n))
		Expect(distinct).To(Equal(n))
	}

	batchAttempts := func(g Gomega) (attempts []int) {
		g.Expect(db.Select(&attempts, "SELECT attempts FROM outbox_batches")).To(Succeed())
		return attempts
	}

	// allowAnyTime makes the outbox accept times that the sink cannot store.
	allowAnyTime := func() {
		db.MustExec("ALTER TABLE outbox_events DROP CONSTRAINT IF EXISTS event_date_time_is_in_years_1_to_9999")
	}

	deadLetters := func() (causes []string) {
		GinkgoHelper()
		Expect(db.Select(&causes, "SELECT error FROM outbox_dead_letters ORDER BY id")).To(Succeed())
		return causes
	}

	// batches returns the value of diehard_relay_batches_total.
	batches := func(result string) int {
		GinkgoHelper()
		families, err := registry.Gather()
		Expect(err).NotTo(HaveOccurred())
		for _, family := range families {
			for _, metric := range family.GetMetric() {
				if family.GetName() == "diehard_relay_batches_total" && metric.GetLabel()[0].GetValue() == result {
					return int(metric.GetCounter().GetValue())
				}
			}
		}
		Fail("no batches with the result " + result)
		return 0
	}

	// claimAndDie acts as a worker that is killed. It claims and reads a batch, calls
	// during, and then loses the lease. during performs the worker's calls of the sink.
	claimAndDie := func(ctx context.Context, during func(lease *store.Lease, events *sink.Events)) {
		GinkgoHelper()
		_, err := s.Cut(ctx, 0)
		Expect(err).NotTo(HaveOccurred())
		lease, err := s.Claim(ctx, 1<<40, true)
		Expect(err).NotTo(HaveOccurred())
		Expect(lease).NotTo(BeNil())
		defer lease.Release()
		var events store.Events
		Expect(lease.Read(ctx, &events)).To(Succeed())
		during(lease, &events.Events)
	}

	insert := func(ctx context.Context, token string, events *sink.Events) {
		GinkgoHelper()
		Expect(clickHouse.Insert(ctx, sink.Batch{Token: token, Events: events})).To(Succeed())
	}

	Describe("without faults", func() {
		It("delivers an event with every column as it was published", func(ctx SpecContext) {
			start()
			event := publish(ctx, outbox.Event{
				EventType: "user_created", MetadataVersion: 3,
				EventContext: outboxtest.JSON(`{"name": "Zoë \u0000 \"🧨\""}`),
			})[0]
			expectOnce(ctx, 1)
			var (
				id, eventType, environment, eventContext string
				happened                                 time.Time
				version                                  uint64
			)
			Expect(testengines.Scan(ctx, target.Native, `SELECT toString(event_id), event_type, event_date_time, environment,
				event_context, metadata_version FROM event_log`,
				&id, &eventType, &happened, &environment, &eventContext, &version)).To(Succeed())
			Expect(id).To(Equal(event.EventID.String()))
			Expect(eventType).To(Equal("user_created"))
			Expect(happened).To(BeTemporally("==", event.EventDateTime))
			Expect(environment).To(Equal("Test"))
			Expect(eventContext).To(Equal(event.EventContext.String()))
			Expect(version).To(Equal(uint64(3)))
		})

		It("delivers many batches with several workers, without a query to the sink", func(ctx SpecContext) {
			s = store.New(db, store.Options{MaxRows: 100})
			publishMany(ctx, 5_000)
			start(func(o *relay.Options) { o.Workers = 4 })
			expectOnce(ctx, 5_000)
			Expect(batches("settled")).To(Equal(50))
			Expect(clickHouse.queries.Load()).To(BeZero())
		})

		It("is woken by a notification", func(ctx SpecContext) {
			published := make(chan struct{}, 1)
			start(func(o *relay.Options) { o.Published = published; o.PollInterval = time.Hour })
			publishMany(ctx, 1)
			published <- struct{}{}
			expectOnce(ctx, 1) // the first poll may have found this event
			for n := range 3 {
				publishMany(ctx, 1)
				published <- struct{}{}
				expectOnce(ctx, 2+n)
			}
		})

		It("finds events by polling", func(ctx SpecContext) {
			start()
			for n := range 3 {
				publishMany(ctx, 1)
				expectOnce(ctx, 1+n)
			}
		})

		It("claims a batch that another relay has cut without a notification, at its next cut", func(ctx SpecContext) {
			published := make(chan struct{})
			start(func(o *relay.Options) { o.PollInterval, o.Published = time.Hour, published })
			publishMany(ctx, 1)
			Eventually(ctx, published).WithTimeout(patience).Should(BeSent(struct{}{}))
			expectOnce(ctx, 1)

			other, n := store.New(db, store.Options{}), 1
			Eventually(ctx, func(g Gomega) { // the relay may still cut after the first event
				publishMany(ctx, 1)
				n++
				g.Expect(other.Cut(ctx, 0)).To(HaveField("Batches", 1))
			}).WithTimeout(patience).Should(Succeed())
			publishMany(ctx, 1)
			Eventually(ctx, published).WithTimeout(patience).Should(BeSent(struct{}{}))
			expectOnce(ctx, n+1)
		})

		// awaitCut waits until the relay has tried to cut the events that wait now. The
		// relay receives the second signal only after a cut that began after the first
		// signal.
		awaitCut := func(ctx context.Context, published chan<- struct{}) {
			GinkgoHelper()
			for range 2 {
				Eventually(ctx, published).WithTimeout(patience).Should(BeSent(struct{}{}))
			}
		}

		It("puts events that are published while its workers are busy into one batch", func(ctx SpecContext) {
			release, published := clickHouse.hold(), make(chan struct{})
			start(func(o *relay.Options) { o.Workers, o.Published = 1, published })
			publishMany(ctx, 1)
			Eventually(ctx, clickHouse.inserted.Load).WithTimeout(patience).Should(Equal(int64(1)))
			awaitCut(ctx, published) // a cut may have begun while the worker was free
			publishMany(ctx, 1)
			awaitCut(ctx, published)
			publishMany(ctx, 1)
			release()
			expectOnce(ctx, 3)
			Expect(batches("settled")).To(Equal(2))
		})

		It("starts no overlapping insert before the duration of the last batch has passed", func(ctx SpecContext) {
			release, published := clickHouse.hold(), make(chan struct{})
			running := start(func(o *relay.Options) { o.Workers, o.Published = 3, published })
			publishMany(ctx, 1)
			Eventually(ctx, clickHouse.inserted.Load).WithTimeout(patience).Should(Equal(int64(1)))
			publishMany(ctx, 1) // the relay knows no duration yet
			Eventually(ctx, clickHouse.inserted.Load).WithTimeout(patience).Should(Equal(int64(2)))

			running.SetTook(time.Hour)
			awaitCut(ctx, published) // a cut may have begun before SetTook
			publishMany(ctx, 1)
			awaitCut(ctx, published)
			publishMany(ctx, 1)
			release()
			expectOnce(ctx, 4)
			Expect(batches("settled")).To(Equal(3))
			Expect(running.Took()).To(And(BeNumerically(">", 0), BeNumerically("<", time.Hour)))
		})

		It("delivers an event that is larger than MaxBytes", func(ctx SpecContext) {
			large := outboxtest.JSON(`"` + strings.Repeat("x", 1<<20) + `"`)
			s = store.New(db, store.Options{MaxBytes: 64 << 10})
			publish(ctx, outbox.Event{}, outbox.Event{EventContext: large}, outbox.Event{})
			start(func(o *relay.Options) { o.MaxBytes = 64 << 10; o.Workers = 3 })
			expectOnce(ctx, 3)
		})

		It("reports itself to the fleet, and leaves it", func(ctx SpecContext) {
			member := store.Member{ID: uuid.New(), Host: "here", PID: 7, Version: "v1", Settings: store.MemberSettings{"relay.linger": "1ms"}}
			running := start(func(o *relay.Options) { o.Member = member })
			fleet := func() ([]store.Member, error) { return s.Fleet(ctx) }
			Eventually(fleet).WithTimeout(patience).Should(HaveExactElements(And(HaveField("ID", member.ID), HaveField("Host", "here"),
				HaveField("Settings", member.Settings), HaveField("State", And(HaveField("Circuit", "closed"), HaveField("Ready", ""), HaveField("Workers", 2))))))
			running.stop()
			Eventually(ctx, running.ended).WithTimeout(patience).Should(Receive(BeNil()))
			Expect(fleet()).To(BeEmpty())
		})

		It("does the housekeeping of the fleet", func(ctx SpecContext) {
			db.MustExecContext(ctx, "INSERT INTO outbox_audit (actor, action, at) VALUES ('alice', 'pause', now() - interval '2 hours'), ('alice', 'resume', now())")
			db.MustExecContext(ctx, `INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
				environment, event_context, metadata_version, published_at, batch_id, token, error, dead_lettered_at)
				VALUES (1, gen_random_uuid(), 'a', now(), 'Local', '{}', 1, now(), gen_random_uuid(), 't', 'why', now() - interval '2 hours')`)
			db.MustExecContext(ctx, "INSERT INTO outbox_housekeeping (task, last_success_at) VALUES ('vacuum', now())") // by another relay
			start(func(o *relay.Options) { o.AuditRetention, o.DeadLetterRetention = time.Hour, time.Hour })
			Eventually(func() (map[store.Task]time.Time, error) { return s.TaskSuccesses(ctx) }).WithTimeout(patience).
				Should(And(HaveKey(store.TaskAudit), HaveKey(store.TaskDeadLetters)))
			var left []string
			Expect(db.SelectContext(ctx, &left, "SELECT action FROM outbox_audit UNION ALL SELECT event_type FROM outbox_dead_letters")).To(Succeed())
			Expect(left).To(Equal([]string{"resume"}))
			Expect(log).To(gbytes.Say(`level=WARN msg="old dead letters deleted" dead_letters=1 older_than=1h0m0s`))
			Expect(testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP diehard_relay_housekeeping_deleted_rows_total Rows that this relay has deleted because they were older than their retention.
# TYPE diehard_relay_housekeeping_deleted_rows_total counter
diehard_relay_housekeeping_deleted_rows_total{task="audit"} 1
diehard_relay_housekeeping_deleted_rows_total{task="dead_letters"} 1
`), "diehard_relay_housekeeping_deleted_rows_total")).To(Succeed())
			Expect(testutil.GatherAndCount(registry, "diehard_relay_housekeeping_last_success_timestamp_seconds")).
				To(Equal(2), "of the tasks that are on")
		})

		It("exports its metrics", func(ctx SpecContext) {
			start()
			publishMany(ctx, 7)
			expectOnce(ctx, 7)
			Expect(testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP diehard_outbox_backlog_events Events in the outbox. If 10,000 or more are not in a batch yet, an estimate, which is within 5 % after 30 seconds.
# TYPE diehard_outbox_backlog_events gauge
diehard_outbox_backlog_events 0
# HELP diehard_relay_circuit_open 1 if the circuit breaker is not closed: this relay inserts nothing because the sink fails.
# TYPE diehard_relay_circuit_open gauge
diehard_relay_circuit_open 0
# HELP diehard_relay_events_attempted_total Events in all inserts, including failed inserts. The excess over delivered events is the cost of faults and refused events.
# TYPE diehard_relay_events_attempted_total counter
diehard_relay_events_attempted_total 7
# HELP diehard_relay_events_total Events that left the outbox, by result: delivered, dead_lettered.
# TYPE diehard_relay_events_total counter
diehard_relay_events_total{result="dead_lettered"} 0
diehard_relay_events_total{result="delivered"} 7
`), "diehard_outbox_backlog_events", "diehard_relay_circuit_open", "diehard_relay_events_attempted_total", "diehard_relay_events_total")).To(Succeed())
		})
	})

	Describe("after a worker has died", func() {
		It("inserts a batch that is absent", func(ctx SpecContext) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(*store.Lease, *sink.Events) {})
			start()
			expectOnce(ctx, 10)
			Expect(batches("resolved")).To(Equal(1))
		})

		It("settles a batch that is present, without an insert", func(ctx SpecContext) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) {
				// The spec uses a different token, so that a second insert would double
				// every row.
				insert(ctx, "another-"+lease.Token, events)
			})
			start()
			expectOnce(ctx, 10)
			Expect(batches("resolved")).To(Equal(1))
		})

		It("inserts only the absent events of a batch", func(ctx SpecContext) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) {
				insert(ctx, lease.Token, first(events, 4))
			})
			start()
			expectOnce(ctx, 10)
			Expect(batches("split")).To(Equal(1))
		})

		It("renews the token of a batch if the sink knows the token without the rows", func(ctx SpecContext) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(lease *store.Lease, _ *sink.Events) {
				// After an insert of other rows under the token, the sink knows the
				// token.
				other := &sink.Events{MetadataVersion: []uint64{1}}
				other.EventID = []uuid.UUID{uuid.New()}
				other.EventType.Append([]byte("foreign"))
				other.EventDateTime = []int64{time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC).UnixMicro()}
				other.Environment.Append([]byte("Test"))
				other.EventContext.Append([]byte("{}"))
				insert(ctx, lease.Token, other)
			})
			start()
			expectOnce(ctx, 10)
			Expect(batches("token_renewed")).To(Equal(1))
		})

		It("waits while the dead worker's insert is still in flight", func(ctx SpecContext) {
			publishMany(ctx, 3)
			// The insert takes as long as its view sleeps.
			testengines.Query(ctx, "clickhouse", target.HTTP, `CREATE MATERIALIZED VIEW slow ENGINE = Null AS
				SELECT event_id FROM event_log WHERE NOT ignore(sleepEachRow(1))`)
			inserted, token := make(chan error, 1), ""
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) {
				token = lease.Token
				go func() {
					inserted <- clickHouse.Insert(ctx, sink.Batch{Token: lease.Token, Events: events})
				}()
				Eventually(ctx, clickHouse.InFlight).WithArguments(ctx, lease.Token).WithTimeout(patience).Should(BeTrue())
			})
			start()
			expectOnce(ctx, 3)
			Expect(clickHouse.InFlight(ctx, token)).To(BeFalse(), "the relay settled before the insert had ended")
			Eventually(ctx, inserted).WithTimeout(patience).Should(Receive(Not(HaveOccurred())))
			Expect(batches("resolved")).To(Equal(1))
		})

		It("resolves events that were cut under an earlier history of PostgreSQL", func(ctx SpecContext) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, lease.Token, events) })
			// The failover lost the cut: the events are not in a batch.
			db.MustExec("DELETE FROM outbox_batches")
			db.MustExec("UPDATE outbox_cursor SET low_watermark = 0, next_low_watermark = 0, high_watermark = 0")
			db.MustExec("UPDATE outbox_history SET timeline = '00000000'")
			s = store.New(db, store.Options{FlushTimeout: time.Second})
			start()
			expectOnce(ctx, 10)
			Expect(log).To(gbytes.Say("resolving all batches"))
		})

		It("delivers after all tables that coordinate relays were emptied", func(ctx SpecContext) {
			s = store.New(db, store.Options{FlushTimeout: time.Second})
			running := start()
			publishMany(ctx, 10)
			expectOnce(ctx, 10)
			db.MustExec("TRUNCATE outbox_cursor")
			publishMany(ctx, 10)
			expectOnce(ctx, 20)
			db.MustExec("TRUNCATE outbox_cursor, outbox_history")
			publishMany(ctx, 10)
			expectOnce(ctx, 30)
			Expect(running.Ready(ctx)).To(Succeed())
		})

		It("pauses after each change of history", func(ctx SpecContext) {
			db.MustExec(`CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.timeline := ''; RETURN NEW; END $$`)
			db.MustExec("CREATE TRIGGER forget BEFORE INSERT OR UPDATE ON outbox_history FOR EACH ROW EXECUTE FUNCTION forget()")
			db.MustExec("UPDATE outbox_history SET timeline = ''")
			publishMany(ctx, 1)
			start(func(o *relay.Options) { o.BackoffMin, o.BackoffMax = time.Hour, time.Hour })
			changes := func() int { return strings.Count(string(log.Contents()), "resolving all batches") }
			Eventually(ctx, changes).WithTimeout(patience).Should(Equal(1))
			Consistently(ctx, changes).Should(Equal(1))
		})

		It("pauses after each error of PostgreSQL", func(ctx SpecContext) {
			db.MustExec(`CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$`)
			db.MustExec("CREATE TRIGGER refuse BEFORE DELETE ON outbox_events FOR EACH ROW EXECUTE FUNCTION refuse()")
			s = store.New(db, store.Options{MaxRows: 1})
			publishMany(ctx, 4)
			start(func(o *relay.Options) { o.Workers, o.BackoffMin, o.BackoffMax = 1, time.Hour, time.Hour })
			attempts := func(g Gomega) {
				var attempts int
				g.Expect(db.Get(&attempts, "SELECT coalesce(sum(attempts), 0) FROM outbox_batches")).To(Succeed())
				g.Expect(attempts).To(Equal(1))
			}
			Eventually(ctx, attempts).WithTimeout(patience).Should(Succeed())
			Consistently(ctx, attempts).Should(Succeed())
		})

		It("waits for an insert of an earlier history whose token is lost", func(ctx SpecContext) {
			publishMany(ctx, 3)
			// The constraint sleeps before the rows are stored.
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT slow CHECK NOT ignore(sleepEachRow(1))")
			inserted := make(chan error, 1)
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) {
				go func() { inserted <- clickHouse.Insert(ctx, sink.Batch{Token: lease.Token, Events: events}) }()
				Eventually(ctx, clickHouse.InFlight).WithArguments(ctx, lease.Token).WithTimeout(patience).Should(BeTrue())
			})
			db.MustExec("DELETE FROM outbox_batches")
			db.MustExec("UPDATE outbox_cursor SET low_watermark = 0, next_low_watermark = 0, high_watermark = 0")
			db.MustExec("UPDATE outbox_history SET timeline = '00000000'")
			s = store.New(db, store.Options{FlushTimeout: 3 * time.Second})
			start()
			Eventually(ctx, inserted).WithTimeout(patience).Should(Receive(Succeed()))
			expectOnce(ctx, 3)
			Expect(batches("resolved")).To(Equal(1))
		})

		It("logs an error and delivers other batches if an event of a batch was deleted", func(ctx SpecContext) {
			events := publishMany(ctx, 10)
			_, err := s.Cut(ctx, 0)
			Expect(err).NotTo(HaveOccurred())
			db.MustExec("DELETE FROM outbox_events WHERE event_id = $1", events[4].EventID)
			running := start()
			publishMany(ctx, 5)
			Eventually(ctx, func(g Gomega) {
				var cause string
				g.Expect(db.Get(&cause, "SELECT last_error FROM outbox_batches")).To(Succeed())
				g.Expect(cause).To(ContainSubstring("found 9 of 10"))
				var rows int
				g.Expect(testengines.Scan(ctx, target.HTTP, "SELECT count() FROM event_log", &rows)).To(Succeed())
				g.Expect(rows).To(Equal(5))
			}).WithTimeout(patience).Should(Succeed())
			Expect(log).To(gbytes.Say("level=ERROR .*events missing from outbox"))
			Expect(running.Ready(ctx)).To(Succeed())
		})
	})

	Describe("with events that the sink refuses", func() {
		It("dead-letters an event whose time is outside the sink's range, and delivers the other events once", func(ctx SpecContext) {
			publishMany(ctx, 50)
			allowAnyTime()
			db.MustExec(`INSERT INTO outbox_events (event_type, event_context, event_date_time)
				VALUES ('from_the_future', '{}', '12000-01-01 00:00:00+00')`)
			publishMany(ctx, 50)
			start()
			expectOnce(ctx, 100)
			Expect(deadLetters()).To(ConsistOf(ContainSubstring("12000")))
		})

		It("splits a batch down to the events that break a constraint of the table", func(ctx SpecContext) {
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
			publishMany(ctx, 30)
			publish(ctx, outbox.Event{EventType: "poison"})
			publishMany(ctx, 30)
			publish(ctx, outbox.Event{EventType: "poison"})
			start()
			expectOnce(ctx, 60)
			Expect(deadLetters()).To(HaveLen(2))
			Expect(deadLetters()).To(HaveEach(ContainSubstring("no_poison")))
		})
	})

	Describe("with Sentry on", func() {
		var (
			reported *sentrytest.Listener
			flush    func()
		)

		startSentry := func(tracesSampleRate float64) {
			GinkgoHelper()
			reported = sentrytest.Start()
			// Sentry's hub is global. The next spec gets the earlier client back.
			hub := sentry.CurrentHub()
			hub.PushScope()
			var err error
			flush, err = telemetry.StartSentry(telemetry.SentryOptions{DSN: reported.DSN(), TracesSampleRate: tracesSampleRate})
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(func() {
				hub.Client().Close()
				hub.PopScope()
			})
		}

		named := func(name string) (transactions []sentrytest.Event) {
			for _, transaction := range reported.Transactions() {
				if transaction.Transaction == name {
					transactions = append(transactions, transaction)
				}
			}
			return transactions
		}

		// expectDeliveries stops the relay and checks that the relay has reported its
		// batches and n deliveries.
		expectDeliveries := func(ctx context.Context, running *runningRelay, n int) []sentrytest.Event {
			GinkgoHelper()
			running.stop()
			Eventually(ctx, running.ended).WithTimeout(patience).Should(BeClosed())
			flush()
			// Sentry's flush waits for a few seconds only. Transactions may arrive later.
			Eventually(ctx, named).WithArguments("relay batch").WithTimeout(patience).ShouldNot(BeEmpty())
			Eventually(ctx, named).WithArguments("deliver").WithTimeout(patience).Should(HaveLen(n))
			return named("deliver")
		}

		It("reports the delivery in the trace of the request, with the time of publishing as its start", func(ctx SpecContext) {
			startSentry(1)
			published := time.Now().Add(-time.Hour)
			db.MustExec("ALTER TABLE outbox_events ALTER COLUMN published_at SET DEFAULT now() - interval '1 hour'")
			publish(ctx,
				outbox.Event{},
				outbox.Event{EventType: "user_created", Traceparent: traceparent(1, "01")},
				outbox.Event{EventType: "user_greeted", Traceparent: traceparent(1, "01")},
				outbox.Event{EventType: "user_created", Traceparent: traceparent(1, "01")})
			_, err := s.Cut(ctx, 0)
			Expect(err).NotTo(HaveOccurred())
			var batch string
			Expect(db.Get(&batch, "SELECT batch_id FROM outbox_batches")).To(Succeed())
			running := start()
			expectOnce(ctx, 4)
			delivery := expectDeliveries(ctx, running, 1)[0]
			Expect(delivery.TransactionInfo.Source).To(Equal("task"))
			Expect(delivery.StartTimestamp).To(BeTemporally("~", published, time.Minute))
			Expect(delivery.Timestamp).To(BeTemporally("~", time.Now(), time.Minute))
			trace := delivery.Contexts.Trace
			Expect(traceparent(1, "01").String()).To(Equal("00-" + trace.TraceID + "-" + trace.ParentSpanID + "-01"))
			Expect(trace.Op).To(Equal("queue.process"))
			Expect(trace.Status).To(Equal("ok"))
			Expect(trace.Data).To(MatchAllKeys(Keys{
				"batch_id":                          Equal(batch),
				"events":                            BeEquivalentTo(3),
				"event_types":                       HaveExactElements("user_created", "user_greeted"),
				"attempt":                           BeEquivalentTo(1),
				"messaging.destination.name":        Equal("outbox_events"),
				"messaging.message.receive.latency": BeNumerically("~", time.Hour.Milliseconds(), time.Minute.Milliseconds()),
			}))
		})

		It("reports no delivery of a trace that is not sampled", func(ctx SpecContext) {
			startSentry(1)
			publish(ctx, outbox.Event{}, outbox.Event{Traceparent: traceparent(1, "00")}, outbox.Event{Traceparent: traceparent(2, "02")})
			sampled := traceparent(3, "01").String()
			// Rows that are older than the constraint may contain such values.
			db.MustExec("ALTER TABLE outbox_events DROP CONSTRAINT traceparent_is_w3c")
			for _, nonsense := range []string{
				"01", sampled + "-more", strings.ToUpper(sampled), strings.Replace(sampled, "-", "0", 1),
				"00-" + strings.Repeat("0", 32) + "-b7ad6b7169203331-01", sampled[:len(sampled)-1] + "g", "Ж" + sampled[2:],
			} {
				db.MustExec("INSERT INTO outbox_events (event_type, event_context, traceparent) VALUES ('by_sql', '{}', $1)", nonsense)
			}
			running := start()
			expectOnce(ctx, 10)
			expectDeliveries(ctx, running, 0)
		})

		It("reports a batch in at most 100 traces", func(ctx SpecContext) {
			startSentry(1)
			var events []outbox.Event
			for trace := range 103 {
				events = append(events, outbox.Event{Traceparent: traceparent(trace+1, "01")})
			}
			// The last two events belong to the first and to the hundredth trace.
			publish(ctx, append(events, events[0], events[99])...)
			running := start()
			expectOnce(ctx, 105)
			shown := map[string]any{}
			for _, delivery := range expectDeliveries(ctx, running, 100) {
				trace := delivery.Contexts.Trace
				shown["00-"+trace.TraceID+"-"+trace.ParentSpanID+"-01"] = trace.Data["events"]
			}
			for i, event := range events[:100] {
				want := 1
				if i == 0 || i == 99 {
					want = 2
				}
				Expect(shown).To(HaveKeyWithValue(event.Traceparent.String(), BeEquivalentTo(want)))
			}
		})

		DescribeTable("reports each event once after an earlier attempt",
			func(ctx SpecContext, arrived, attempts int) {
				startSentry(1)
				var events []outbox.Event
				for trace := range 10 {
					events = append(events, outbox.Event{Traceparent: traceparent(trace+1, "01")})
				}
				publish(ctx, events...)
				claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) {
					if arrived > 0 {
						insert(ctx, lease.Token, first(events, arrived))
					}
				})
				running := start()
				expectOnce(ctx, 10)
				shown, byAttempt := map[string]struct{}{}, map[any]int{}
				for _, delivery := range expectDeliveries(ctx, running, 10) {
					trace := delivery.Contexts.Trace
					byAttempt[trace.Data["attempt"]]++
					shown[trace.TraceID] = struct{}{}
				}
				Expect(shown).To(HaveLen(10))
				Expect(byAttempt).To(HaveLen(attempts))
			},
			Entry("whose events are all absent", 0, 1),
			Entry("whose events are all present", 10, 1),
			Entry("whose events are partly present", 4, 2),
		)

		It("reports no transaction at a sample rate of 0", func(ctx SpecContext) {
			startSentry(0)
			publish(ctx, outbox.Event{Traceparent: traceparent(1, "01")})
			running := start()
			expectOnce(ctx, 1)
			running.stop()
			Eventually(ctx, running.ended).WithTimeout(patience).Should(BeClosed())
			flush()
			Expect(reported.Transactions()).To(BeEmpty())
		})
	})

	Describe("with spans", func() {
		var (
			collector *otlptest.Collector
			running   *runningRelay
			flush     func()
		)

		// startTraced starts a relay that exports its spans to the collector.
		startTraced := func(ctx context.Context) {
			GinkgoHelper()
			collector = otlptest.Start()
			GinkgoT().Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL())
			tracer, stop, err := telemetry.StartTraces(ctx, telemetry.TracesOptions{Service: "diehard-relay", Log: slog.New(slog.DiscardHandler)})
			Expect(err).NotTo(HaveOccurred())
			flush = stop
			running = start(func(o *relay.Options) {
				o.Tracer, o.SinkAttributes = tracer, clickHouse.Attributes()
			})
		}

		// spans stops the relay and returns its spans in the order of their start.
		spans := func(ctx context.Context) []otlptest.Span {
			GinkgoHelper()
			running.stop()
			Eventually(ctx, running.ended).WithTimeout(patience).Should(BeClosed())
			flush()
			all := collector.Spans()
			slices.SortFunc(all, func(a, b otlptest.Span) int { return cmp.Compare(a.GetStartTimeUnixNano(), b.GetStartTimeUnixNano()) })
			return all
		}

		named := func(all []otlptest.Span, name string) otlptest.Span {
			GinkgoHelper()
			i := slices.IndexFunc(all, func(s otlptest.Span) bool { return s.GetName() == name })
			Expect(i).NotTo(BeNumerically("<", 0), "%s", name)
			return all[i]
		}

		names := func(all []otlptest.Span) (names []string) {
			for _, span := range all {
				names = append(names, span.GetName())
			}
			return names
		}

		It("records a delivery, with links to the sampled requests of its events", func(ctx SpecContext) {
			startTraced(ctx)
			publish(ctx, outbox.Event{}, outbox.Event{Traceparent: traceparent(1, "00")}, outbox.Event{Traceparent: traceparent(2, "01")},
				outbox.Event{Traceparent: traceparent(3, "01")}, outbox.Event{Traceparent: traceparent(2, "01")})
			expectOnce(ctx, 5)
			all := spans(ctx)
			Expect(names(all)).To(Equal([]string{"cut outbox_events", "deliver outbox_events", "flush event_log", "settle outbox_events"}))
			cut, deliver, insert, settle := all[0], all[1], all[2], all[3]
			Expect(cut.Attributes).To(And(HaveKeyWithValue("db.system.name", "postgresql"), HaveKeyWithValue("diehard.events", int64(5))))
			Expect(deliver.GetKind()).To(Equal(otlp.Span_SPAN_KIND_CONSUMER))
			Expect(deliver.Attributes).To(MatchAllKeys(Keys{
				"messaging.system": Equal("diehard"), "messaging.destination.name": Equal("outbox_events"),
				"messaging.operation.type": Equal("process"), "messaging.operation.name": Equal("deliver"),
				"messaging.batch.message_count": Equal(int64(5)), "diehard.batch.id": MatchRegexp("^[0-9a-f-]{36}$"),
				"diehard.batch.attempt": Equal(int64(1)), "diehard.batch.result": Equal("settled"),
			}))
			Expect(insert.GetKind()).To(Equal(otlp.Span_SPAN_KIND_CLIENT))
			Expect(insert.Attributes).To(MatchAllKeys(Keys{
				"db.system.name": Equal("clickhouse"), "db.namespace": Not(BeEmpty()), "db.collection.name": Equal("event_log"),
				"db.operation.name": Equal("INSERT"), "db.operation.batch.size": Equal(int64(5)),
				"server.address": Equal("127.0.0.1"), "server.port": BeNumerically(">", 0),
			}))
			Expect(settle.Attributes).To(And(HaveKeyWithValue("db.system.name", "postgresql"), HaveKeyWithValue("db.operation.batch.size", int64(5))))
			for _, step := range []otlptest.Span{insert, settle} {
				Expect(step.Trace).To(Equal(deliver.Trace))
				Expect(step.Parent).To(Equal(deliver.ID))
			}
			Expect(deliver.Trace).NotTo(Equal(cut.Trace))
			requests := []string{traceparent(2, "01").TraceID(), traceparent(3, "01").TraceID()}
			Expect(deliver.Links).To(Equal(requests))
			Expect(insert.Links).To(Equal(requests))
			Expect(hex.EncodeToString(insert.GetLinks()[0].GetSpanId())).To(Equal(traceparent(2, "01").ParentID()))
		})

		It("links an insert to at most 100 requests", func(ctx SpecContext) {
			startTraced(ctx)
			var events []outbox.Event
			for trace := range 103 {
				events = append(events, outbox.Event{Traceparent: traceparent(trace+1, "01")})
			}
			publish(ctx, events...)
			expectOnce(ctx, 103)
			links := named(spans(ctx), "flush event_log").Links
			Expect(links).To(HaveLen(100))
			Expect(links[99]).To(Equal(traceparent(100, "01").TraceID()))
		})

		It("records that it resolves an earlier attempt", func(ctx SpecContext) {
			publish(ctx, outbox.Event{Traceparent: traceparent(1, "01")}, outbox.Event{})
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, lease.Token, events) })
			startTraced(ctx)
			expectOnce(ctx, 2)
			all := spans(ctx)
			Expect(names(all)).To(Equal([]string{"deliver outbox_events", "resolve event_log", "settle outbox_events"}))
			Expect(all[0].Links).To(Equal([]string{traceparent(1, "01").TraceID()}))
			Expect(all[1].Attributes).To(And(HaveKeyWithValue("db.system.name", "clickhouse"),
				HaveKeyWithValue("diehard.events.present", int64(2)), HaveKeyWithValue("diehard.events.absent", int64(0))))
		})

		It("records the class of an error, without its text", func(ctx SpecContext) {
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
			startTraced(ctx)
			publish(ctx, outbox.Event{EventType: "poison"})
			Eventually(ctx, deadLetters).WithTimeout(patience).Should(HaveLen(1))
			failed := named(spans(ctx), "flush event_log")
			Expect(failed.GetStatus().GetCode()).To(Equal(otlp.Status_STATUS_CODE_ERROR))
			Expect(failed.GetStatus().GetMessage()).To(BeEmpty())
			Expect(failed.GetEvents()).To(BeEmpty())
			Expect(failed.Attributes).To(HaveKeyWithValue("error.type", "permanent"))
		})
	})

	Describe("in the log", func() {
		It("names the first traces of dead letters, sampled or not", func(ctx SpecContext) {
			var ids []string
			for trace := range 12 {
				given := traceparent(trace+1, "00")
				ids = append(ids, given.TraceID())
				allowAnyTime()
				db.MustExec(`INSERT INTO outbox_events (event_type, event_context, event_date_time, traceparent)
					VALUES ('from_the_future', '{}', '12000-01-01 00:00:00+00', $1), ('of_today', '{}', DEFAULT, $2)`,
					given.String(), traceparent(trace+101, "01").String())
			}
			start()
			expectOnce(ctx, 12)
			Expect(log).To(gbytes.Say(`events dead-lettered.* trace_ids="\[` + strings.Join(ids[:10], " ") + `\]" dead_lettered=12 `))
		})

		It("names the traces of a batch that is split, and of the event that caused the split", func(ctx SpecContext) {
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
			bad, good := traceparent(1, "01"), traceparent(2, "01")
			publish(ctx, outbox.Event{EventType: "poison", Traceparent: bad}, outbox.Event{Traceparent: good}, outbox.Event{Traceparent: good})
			start()
			expectOnce(ctx, 2)
			badID, goodID := bad.TraceID(), good.TraceID()
			Expect(log).To(gbytes.Say(`splitting failed batch.* trace_ids="\[` + badID + " " + goodID + `\]"`))
			Expect(log).To(gbytes.Say(`events dead-lettered.* trace_ids=\[` + badID + `\]`))
		})

		It("names no trace for an event without a traceparent", func(ctx SpecContext) {
			allowAnyTime()
			db.MustExec(`INSERT INTO outbox_events (event_type, event_context, event_date_time)
				VALUES ('from_the_future', '{}', '12000-01-01 00:00:00+00')`)
			start()
			expectOnce(ctx, 0)
			Expect(log).To(gbytes.Say("events dead-lettered"))
			Expect(string(log.Contents())).NotTo(ContainSubstring("trace_id"))
		})
	})

	Describe("with events whose data make inserts fail", func() {
		quick := func(o *relay.Options) { o.DeadLetterAttempts, o.DeadLetterAfter = 3, time.Millisecond }
		amounts := func(n int, bad map[int]string) []outbox.Event {
			events := make([]outbox.Event, n)
			for i := range events {
				amount := "1"
				if text, isBad := bad[i]; isBad {
					amount = text
				}
				events[i].EventContext = outboxtest.JSON(`{"amount":"` + amount + `"}`)
			}
			return events
		}
		// The default of the column fails for texts that are not numbers.
		addAmount := func(ctx context.Context) {
			GinkgoHelper()
			testengines.Query(ctx, "clickhouse", target.HTTP,
				"ALTER TABLE event_log ADD COLUMN amount UInt64 DEFAULT toUInt64(JSONExtractString(event_context, 'amount'))")
		}

		It("dead-letters the event with the empty text, and delivers the other 999", func(ctx SpecContext) {
			addAmount(ctx)
			publish(ctx, amounts(1000, map[int]string{700: ""})...)
			running := start(quick)
			expectOnce(ctx, 999)
			Expect(deadLetters()).To(ConsistOf(ContainSubstring("ATTEMPT_TO_READ_AFTER_EOF")))
			Expect(running.Ready(ctx)).To(Succeed())
		})

		It("dead-letters 2 events of 60 in several partitions", func(ctx SpecContext) {
			addAmount(ctx)
			bad := map[int]string{}
			for i := range 2 {
				bad[i*20] = "abc"
			}
			events := amounts(60, bad)
			for i := range events {
				events[i].EventDateTime = time.Date(2026, time.Month(1+i%3), 1, 0, 0, 0, 0, time.UTC)
			}
			publish(ctx, events...)
			start(quick)
			expectOnce(ctx, 58)
			Expect(deadLetters()).To(HaveLen(2))
			Expect(deadLetters()).To(HaveEach(ContainSubstring("clickhouse error 6")))
		})

		It("delivers the events of other types, and keeps those of a type that always fails", func(ctx SpecContext) {
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT broken CHECK throwIf(event_type = 'broken') = 0")
			const each = 100
			s = store.New(db, store.Options{MaxDelay: time.Second})
			events := make([]outbox.Event, 2*each)
			for i := range each {
				events[2*i].EventType = "broken"
			}
			publish(ctx, events...)
			running := start(quick, func(o *relay.Options) { o.DeadLetterAfter = 10 * time.Minute })
			Eventually(ctx, func(g Gomega) {
				left, _ := waiting(g)
				g.Expect(left).To(Equal(each))
			}).WithTimeout(patience).Should(Succeed())
			Eventually(ctx, s.Quarantine).WithTimeout(patience).Should(Equal([]string{"broken"}))
			Expect(deadLetters()).To(BeEmpty(), "the sink takes no event of the type, so no event is the cause")
			Expect(running.Ready(ctx)).To(Succeed())

			By("publishing events of both types continually")
			failed := strings.Count(string(log.Contents()), "msg=\"batch failed\"")
			for round := range 10 {
				publish(ctx, outbox.Event{EventType: "broken"}, outbox.Event{})
				Eventually(ctx, func(g Gomega) {
					left, _ := waiting(g)
					g.Expect(left).To(Equal(each + round + 1))
				}).WithTimeout(patience).Should(Succeed())
			}
			Expect(strings.Count(string(log.Contents()), "msg=\"batch failed\"")).To(Equal(failed), "no other event was in a failed batch")
			_, batches := waiting(Default)
			Expect(batches).To(BeNumerically("<", 20))

			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log DROP CONSTRAINT broken")
			expectOnce(ctx, 2*each+20)
			Expect(s.Quarantine()).To(BeEmpty())
		})

		It("parts a batch that is too large for a query, and cuts smaller batches from then on", func(ctx SpecContext) {
			clickHouse = openSink(target.Native + "?max_memory_usage=20000000")
			s = store.New(db, store.Options{MaxBytes: 64 << 20})
			large := func(n int) []outbox.Event {
				events := make([]outbox.Event, n)
				for i := range events {
					events[i].EventContext = outboxtest.JSON(`{"text":"` + strings.Repeat("x", 300) + `"}`)
				}
				return events
			}
			publish(ctx, large(40_000)...)
			start(quick)
			expectOnce(ctx, 40_000)
			Expect(deadLetters()).To(BeEmpty())
			Expect(log).To(gbytes.Say("limiting size of batches"))

			failed := strings.Count(string(log.Contents()), "MEMORY_LIMIT_EXCEEDED")
			publish(ctx, large(40_000)...)
			expectOnce(ctx, 80_000)
			Expect(strings.Count(string(log.Contents()), "MEMORY_LIMIT_EXCEEDED")).To(Equal(failed))
		})

		It("dead-letters an event that is alone in its batch and of its type", func(ctx SpecContext) {
			addAmount(ctx)
			publish(ctx, amounts(1, map[int]string{0: "abc"})...)
			start(quick)
			expectOnce(ctx, 0)
			Expect(deadLetters()).To(HaveLen(1))
		})

		It("stops dead-lettering when the fuse blows, until an operator mends it", func(ctx SpecContext) {
			s = store.New(db, store.Options{MaxDeadLetters: 1})
			addAmount(ctx)
			publish(ctx, amounts(30, map[int]string{1: "a", 20: "b"})...)
			running := start(quick)
			Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(MatchError(ContainSubstring("relay dead-letters resume")))
			Eventually(ctx, func(g Gomega) {
				left, _ := waiting(g)
				g.Expect(left).To(Equal(1))
			}).WithTimeout(patience).Should(Succeed(), "the other events arrive")
			Expect(deadLetters()).To(HaveLen(1))
			Expect(log).To(gbytes.Say("fuse of dead letters blown"))
			Expect(testutil.GatherAndCount(registry, "diehard_relay_fuse_blown")).To(Equal(1))

			Expect(s.MendFuse(ctx, "an operator")).To(BeTrue())
			expectOnce(ctx, 28)
			Expect(deadLetters()).To(HaveLen(2))
			Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(Succeed())
		})
	})

	It("isolates many refused events with bounded work, without delaying other events", func(ctx SpecContext) {
		const total, bad = 16, 8
		s = store.New(db, store.Options{MaxRows: total}) // a relay whose worker is busy cuts full batches only
		testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
		published := make([]outbox.Event, total)
		for i := range published {
			if i%2 == 0 {
				published[i].EventType = "poison"
			}
		}
		publish(ctx, published...)
		isolated, lettersBefore := 0, 0
		clickHouse.before = func(events *sink.Events) { // only one worker calls it
			defer GinkgoRecover()
			switch {
			case slices.Contains(events.EventType.Values, "later"):
				lettersBefore = len(deadLetters())
			case events.Len() == 1 && events.EventType.At(0) == "poison":
				if isolated++; isolated != 2 { // the first refused event is a dead letter then
					return
				}
				later := make([]outbox.Event, total)
				for i := range later {
					later[i].EventType = "later"
				}
				publish(ctx, later...)
				Eventually(ctx, func(g Gomega) {
					var cut bool
					g.Expect(db.Get(&cut, "SELECT EXISTS (SELECT FROM outbox_batches WHERE event_ids @> (SELECT max(id) FROM outbox_events))")).To(Succeed())
					g.Expect(cut).To(BeTrue())
				}).WithTimeout(patience).Should(Succeed())
			}
		}
		start(func(o *relay.Options) { o.Workers = 1 })

		expectOnce(ctx, total-bad+total)
		Expect(lettersBefore).To(And(BeNumerically(">", 0), BeNumerically("<", bad)), "dead letters before the later events")
		Expect(deadLetters()).To(HaveLen(bad))
		Expect(clickHouse.inserted.Load()).To(BeNumerically("<=", total*(bits.Len(total)+1)+total), "events in inserts")
	})

	It("delivers other events while one worker retries hundreds of failing batches", func(ctx SpecContext) {
		const bad, good = 300, 5
		testengines.Query(ctx, "clickhouse", target.HTTP,
			"ALTER TABLE event_log ADD COLUMN amount UInt64 DEFAULT toUInt64(JSONExtractString(event_context, 'amount'))")
		failing := make([]outbox.Event, bad)
		for i := range failing {
			failing[i] = outbox.Event{EventType: "failing", EventContext: outboxtest.JSON(`{"amount":""}`)}
		}
		publish(ctx, failing...)
		_, err := s.Cut(ctx, 0)
		Expect(err).NotTo(HaveOccurred())
		db.MustExec("DELETE FROM outbox_batches")
		db.MustExec(`INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, failures, last_error)
			SELECT gen_random_uuid(), int8multirange(int8range(id, id + 1)), 1, 1, id::text, 1, 1, 'failed' FROM outbox_events`)
		var inserting, most, inserts atomic.Int32
		clickHouse.before = func(events *sink.Events) {
			if events.EventType.At(0) == "failing" {
				inserts.Add(1)
				most.Store(max(most.Load(), inserting.Add(1)))
			}
		}
		clickHouse.after = func(events *sink.Events) {
			if events.EventType.At(0) == "failing" {
				inserting.Add(-1)
			}
		}
		running := start(func(o *relay.Options) { o.Workers = 4 })
		for range good {
			publish(ctx, outbox.Event{EventContext: outboxtest.JSON(`{"amount":"1"}`)})
			Eventually(ctx, func(g Gomega) {
				events, _ := waiting(g)
				g.Expect(events).To(Equal(bad))
			}).WithTimeout(patience).Should(Succeed())
		}
		Eventually(ctx, inserts.Load).WithTimeout(patience).Should(BeNumerically(">", 10))
		Expect(most.Load()).To(Equal(int32(1)), "workers with a failing batch")
		Expect(running.Ready(ctx)).To(Succeed())

		Expect(deadLetters()).To(BeEmpty())
	})

	Describe("while the sink is unavailable", func() {
		It("waits without using attempts, logs the outage once, and continues by itself", func(ctx SpecContext) {
			running := start()
			publishMany(ctx, 5)
			expectOnce(ctx, 5)

			testengines.Query(ctx, "clickhouse", target.HTTP, "RENAME TABLE event_log TO elsewhere")
			publishMany(ctx, 5)
			Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(MatchError(ContainSubstring("sink")))
			// After many probes, batches have only the attempts that were in progress
			// when the outage began. These are one attempt of each worker, and another if
			// a worker did not take its lease within one second.
			probes := clickHouse.checks.Load()
			Eventually(ctx, clickHouse.checks.Load).WithTimeout(patience).Should(BeNumerically(">", probes+10))
			var attempts int
			Expect(db.Get(&attempts, "SELECT coalesce(max(attempts), 0) FROM outbox_batches")).To(Succeed())
			Expect(attempts).To(BeNumerically("<", 6))

			testengines.Query(ctx, "clickhouse", target.HTTP, "RENAME TABLE elsewhere TO event_log")
			expectOnce(ctx, 10)
			Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(Succeed())
			Expect(strings.Count(string(log.Contents()), "circuit breaker open")).To(BeNumerically("<=", 2))
			Expect(log).To(gbytes.Say("circuit breaker closed"))
		})

		It("names the setting if an insert takes too long", func(ctx SpecContext) {
			running := start(func(o *relay.Options) { o.Sink, o.FlushTimeout = lateSink{clickHouse}, time.Second })
			publishMany(ctx, 5)
			Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(
				MatchError(MatchRegexp(`^sink: unavailable: .*: no response within 1s \(relay\.flush_timeout\)$`)))
		})

		It("waits while consecutive batches fail with an unknown error", func(ctx SpecContext) {
			s = store.New(db, store.Options{MaxRows: 1})
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT broken CHECK throwIf(true) = 0")
			publishMany(ctx, 100)
			running := start()
			Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(MatchError(ContainSubstring("sink")))
			probes := clickHouse.checks.Load()
			Eventually(ctx, clickHouse.checks.Load).WithTimeout(patience).Should(BeNumerically(">", probes+10))
			var tried int
			Expect(db.Get(&tried, "SELECT count(*) FROM outbox_batches WHERE attempts > 0")).To(Succeed())
			Expect(tried).To(BeNumerically("<", 10+clickHouse.checks.Load()), "batches with an attempt: a few, plus one for each probe")

			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log DROP CONSTRAINT broken")
			expectOnce(ctx, 100)
			Expect(deadLetters()).To(BeEmpty())
		})

		It("refuses to start on a table that cannot keep the promises", func(ctx SpecContext) {
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 0")
			var err error
			Eventually(ctx, start().ended).WithTimeout(patience).Should(Receive(&err))
			misconfigured, ok := errors.AsType[*sink.MisconfiguredError](err)
			Expect(ok).To(BeTrue(), "%v", err)
			Expect(misconfigured.Remedy).To(ContainSubstring("non_replicated_deduplication_window"))
		})
	})

	It("reinserts nothing into a table without a deduplication window, until an operator repairs it", func(ctx SpecContext) {
		published, batches := make(chan struct{}, 1), make(chan struct{}, 1)
		running := start(func(o *relay.Options) {
			o.Published, o.BatchesCut, o.PollInterval = published, batches, time.Hour
		})
		publishMany(ctx, 5)
		published <- struct{}{}
		expectOnce(ctx, 5)
		testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 0")
		// One statement, because the relay must not see the events before they are in a
		// batch that was attempted.
		db.MustExecContext(ctx, `
			WITH published AS (
				INSERT INTO outbox_events (event_type, event_context) SELECT 'thing_happened', '{}' FROM generate_series(1, 5) RETURNING id
			)
			INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, last_attempt_at)
			SELECT $1, range_agg(int8range(id, id + 1)), count(*), 1, $1::uuid::text, 1, clock_timestamp() FROM published`, uuid.Must(uuid.NewV7()))
		Eventually(ctx, func() error {
			select {
			case batches <- struct{}{}:
			default:
			}
			return running.Ready(ctx)
		}).WithTimeout(patience).Should(MatchError(ContainSubstring("non_replicated_deduplication_window")))
		var rows int
		Expect(testengines.Scan(ctx, target.HTTP, "SELECT count() FROM event_log", &rows)).To(Succeed())
		Expect(rows).To(Equal(5))
		testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 10000")
		expectOnce(ctx, 10)
	})

	Describe("on a PostgreSQL that lacks a property", func() {
		var role string

		BeforeEach(func() {
			watch = func(r *relay.Relay) { r.Watch(100*time.Millisecond, 500*time.Millisecond, time.Second) }
		})

		// lacking makes the store use a role that is not the owner of the tables.
		lacking := func(ctx context.Context, statement string) {
			GinkgoHelper()
			role = fmt.Sprintf("relay_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
			owner := testengines.OpenPostgres(dsn, nil)
			db.MustExecContext(ctx, "CREATE ROLE "+role)
			DeferCleanup(func(ctx SpecContext) {
				owner.MustExecContext(ctx, "DROP OWNED BY "+role)
				owner.MustExecContext(ctx, "DROP ROLE "+role)
			})
			db.MustExecContext(ctx, "GRANT ALL ON ALL TABLES IN SCHEMA public TO "+role)
			db.MustExecContext(ctx, "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO "+role)
			db.MustExecContext(ctx, strings.ReplaceAll(statement, "SOMEBODY", role))
			session := store.Session(30 * time.Second)
			session["role"] = role
			s = store.New(testengines.OpenStore(dsn, session), store.Options{})
		}

		expectRemedy := func(ctx context.Context, running *runningRelay, remedy string) {
			GinkgoHelper()
			remedy = strings.ReplaceAll(remedy, "SOMEBODY", `"`+role+`"`)
			Eventually(func() error { return running.Ready(ctx) }).WithTimeout(patience).
				Should(MatchError(And(HavePrefix("postgresql: "), ContainSubstring(remedy))))
			Expect(strings.Count(string(log.Contents()), "postgresql unsuitable, delivering nothing")).To(Equal(1))
			Expect(string(log.Contents())).To(ContainSubstring(strings.ReplaceAll(remedy, `"`, `\"`)))
			failing := func(value int) error {
				return testutil.GatherAndCompare(registry, strings.NewReader(fmt.Sprintf(`
# HELP diehard_relay_postgresql_failing 1 if this relay delivers nothing because PostgreSQL is unavailable or lacks a property: see /readyz.
# TYPE diehard_relay_postgresql_failing gauge
diehard_relay_postgresql_failing %d
`, value)), "diehard_relay_postgresql_failing")
			}
			Expect(failing(1)).To(Succeed())
			events, _ := waiting(Default)
			Expect(events).To(Equal(10))
			Eventually(stalledMetric).WithArguments(registry, 1).WithTimeout(patience).Should(Succeed())
			db.MustExecContext(ctx, remedy)
			expectOnce(ctx, 10)
			Eventually(stalledMetric).WithArguments(registry, 0).WithTimeout(patience).Should(Succeed())
			Eventually(func() error { return running.Ready(ctx) }).WithTimeout(patience).Should(Succeed())
			Expect(failing(0)).To(Succeed())
		}

		DescribeTable("delivers nothing, names the remedy once, and continues after it",
			func(ctx SpecContext, statement, remedy string) {
				publishMany(ctx, 10)
				lacking(ctx, statement)
				expectRemedy(ctx, start(), remedy)
			},
			Entry("row level security", "ALTER TABLE outbox_events ENABLE ROW LEVEL SECURITY", "ALTER ROLE SOMEBODY BYPASSRLS"),
			Entry("a missing right", "REVOKE UPDATE ON outbox_history FROM SOMEBODY", "GRANT UPDATE ON outbox_history TO SOMEBODY"),
		)

		It("names the remedy even if the property is lost while it runs", func(ctx SpecContext) {
			lacking(ctx, "SELECT 'SOMEBODY'")
			running := start()
			Eventually(func() error { return running.Ready(ctx) }).WithTimeout(patience).Should(Succeed())
			db.MustExecContext(ctx, "ALTER TABLE outbox_events ENABLE ROW LEVEL SECURITY")
			publishMany(ctx, 10)
			expectRemedy(ctx, running, "ALTER ROLE SOMEBODY BYPASSRLS")
		})
	})

	It("warns once of a server that can lose committed data, and delivers", func(ctx SpecContext) {
		publishMany(ctx, 10)
		start()
		expectOnce(ctx, 10)
		Expect(strings.Count(string(log.Contents()), `level=WARN msg="postgresql can lose committed events in a crash" settings="fsync full_page_writes"`)).To(Equal(1))
		Expect(testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP diehard_relay_postgresql_unsafe 1 for each setting of PostgreSQL with which a crash can lose committed events.
# TYPE diehard_relay_postgresql_unsafe gauge
diehard_relay_postgresql_unsafe{setting="fsync"} 1
diehard_relay_postgresql_unsafe{setting="full_page_writes"} 1
`), "diehard_relay_postgresql_unsafe")).To(Succeed())
	})

	It("inserts no batch again while a row policy may hide it, says so, and delivers other events", func(ctx SpecContext) {
		gateway, through := faults.StartGatewayTo(target.HTTP)
		gateway.Impose("additional_table_filters=" + url.QueryEscape("{'event_log': 'event_type = \\'visible\\''}"))
		publishMany(ctx, 10)
		claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, lease.Token, events) })
		publishMany(ctx, 10)
		claimAndDie(ctx, func(*store.Lease, *sink.Events) {})
		hiding := openSink(through)
		running := start(func(o *relay.Options) { o.Sink = hiding })
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(MatchError(And(
			ContainSubstring("presence check"), ContainSubstring("sees 0 of 10 rows"), ContainSubstring("CREATE ROW POLICY"))))
		publish(ctx, outbox.Event{EventType: "visible"})
		Eventually(ctx, func(g Gomega) {
			events, batches := waiting(g)
			g.Expect([]int{events, batches}).To(Equal([]int{20, 2}))
			g.Expect(batchAttempts(g)).To(HaveEach(BeNumerically(">", 3)))
		}).WithTimeout(patience).Should(Succeed())
		Expect(running.Ready(ctx)).NotTo(Succeed())
		Expect(testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP diehard_relay_blind 1 if a presence check cannot see all rows of the sink: batches with an unknown outcome wait for an operator.
# TYPE diehard_relay_blind gauge
diehard_relay_blind 1
`), "diehard_relay_blind")).To(Succeed())
		Expect(strings.Count(string(log.Contents()), "presence check cannot see all rows")).To(Equal(1))
		Expect(hiding.inserted.Load()).To(Equal(int64(1)), "events in inserts")

		gateway.Impose("")
		expectOnce(ctx, 21)
		Expect(running.Ready(ctx)).To(Succeed())
		Expect(batches("token_renewed")).To(BeZero())
	})

	Context("on a cluster whose replica shows rows that were not committed", func() {
		// awaitDeliveryAfter executes the statement until nothing waits, because a worker
		// that holds a batch writes its own times.
		awaitDeliveryAfter := func(ctx context.Context, statement string) {
			GinkgoHelper()
			Eventually(ctx, func(g Gomega) {
				db.MustExec(statement)
				left, _ := waiting(g)
				g.Expect(left).To(BeZero())
			}).WithTimeout(patience).Should(Succeed())
		}

		It("lets the sink decide by another insert under the same token", func(ctx SpecContext) {
			publishMany(ctx, 10)
			replica := &undecidedSink{observedSink: clickHouse}
			claimAndDie(ctx, func(lease *store.Lease, _ *sink.Events) {
				// The insert has ended with the error 319. A replica shows its rows and
				// removes them before the next check.
				replica.shown = lease.Token
			})
			start(func(o *relay.Options) { o.Sink = replica })
			expectOnce(ctx, 10)
			Expect(batches("resolved")).To(Equal(1))
			Expect(replica.believed.Load()).To(Equal(int32(1)), "checks that found the uncommitted rows")
			Expect(clickHouse.inserted.Load()).To(Equal(int64(10)), "events in inserts")
		})

		It("lets the sink decide also about the insert of a relay with a longer flush timeout", func(ctx SpecContext) {
			slow := store.New(db, store.Options{FlushTimeout: 2 * time.Hour})
			_, err := slow.Check(ctx)
			Expect(err).NotTo(HaveOccurred())
			publishMany(ctx, 10)
			replica := &undecidedSink{observedSink: clickHouse}
			claimAndDie(ctx, func(lease *store.Lease, _ *sink.Events) { replica.shown = lease.Token })
			db.MustExec("UPDATE outbox_batches SET last_attempt_at = last_attempt_at - interval '1 hour'")
			start(func(o *relay.Options) { o.Sink = replica })
			expectOnce(ctx, 10)
			Expect(replica.believed.Load()).To(Equal(int32(1)), "checks that found the uncommitted rows")
		})

		It("samples no recent batch, so that the sink can still decide about its rows", func(ctx SpecContext) {
			testengines.Query(ctx, "clickhouse", target.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
			publishMany(ctx, 10)
			publish(ctx, outbox.Event{EventType: "poison"})
			var sampled atomic.Bool
			clickHouse.before = func(events *sink.Events) {
				if events.Len() < 11 {
					sampled.Store(true)
				}
			}
			start(func(o *relay.Options) { o.Sink = &undecidedSink{observedSink: clickHouse} })
			Eventually(ctx, func() int64 { return clickHouse.inserted.Load() }).WithTimeout(patience).Should(BeNumerically(">=", 4*11))
			Expect(sampled.Load()).To(BeFalse())
			awaitDeliveryAfter(ctx, "UPDATE outbox_batches SET created_at = created_at - interval '1 hour', last_attempt_at = last_attempt_at - interval '1 hour'")
			expectOnce(ctx, 10)
			Expect(deadLetters()).To(HaveLen(1))
		})

		It("settles a batch whose rows were committed", func(ctx SpecContext) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, lease.Token, events) })
			start(func(o *relay.Options) { o.Sink = &undecidedSink{observedSink: clickHouse} })
			expectOnce(ctx, 10)
			Expect(batches("resolved")).To(Equal(1))
		})

		It("believes the rows of an old attempt, whose token may be forgotten", func(ctx SpecContext) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, "another-"+lease.Token, events) })
			db.MustExec("UPDATE outbox_batches SET last_attempt_at = last_attempt_at - interval '1 hour'")
			start(func(o *relay.Options) { o.Sink = &undecidedSink{observedSink: clickHouse} })
			expectOnce(ctx, 10)
		})

		for outcome, rowsAre := range map[string]bool{"removes": false, "keeps": true} {
			It("waits for the decision about an old batch after a recent attempt, if the sink "+outcome+" the rows", func(ctx SpecContext) {
				publishMany(ctx, 10)
				replica := &undecidedSink{observedSink: clickHouse}
				claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) {
					if rowsAre {
						insert(ctx, "another-"+lease.Token, events)
					}
					replica.shown = lease.Token
				})
				db.MustExec("UPDATE outbox_batches SET attempts = 2, created_at = created_at - interval '1 hour'")
				start(func(o *relay.Options) { o.Sink = replica })
				Eventually(ctx, log).WithTimeout(patience).Should(gbytes.Say("waiting for the sink's decision"))
				events, _ := waiting(Default)
				Expect(events).To(Equal(10), "no row is believed")
				awaitDeliveryAfter(ctx, "UPDATE outbox_batches SET last_attempt_at = clock_timestamp() - interval '1 hour'")
				expectOnce(ctx, 10)
			})
		}

		DescribeTable("believes the rows after PostgreSQL's clock was set back", func(ctx SpecContext, attempts int) {
			publishMany(ctx, 10)
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, "another-"+lease.Token, events) })
			db.MustExec(`UPDATE outbox_batches SET attempts = $1, created_at = created_at + interval '1 hour',
				last_attempt_at = last_attempt_at + interval '1 hour'`, attempts)
			start(func(o *relay.Options) { o.Sink = &undecidedSink{observedSink: clickHouse} })
			expectOnce(ctx, 10)
		},
			Entry("since the first attempt", 1),
			Entry("since a later attempt", 2),
		)

		It("believes the rows of an unverified batch, whose token is new", func(ctx SpecContext) {
			publishMany(ctx, 10)
			s = store.New(db, store.Options{FlushTimeout: time.Second})
			claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, "another-"+lease.Token, events) })
			db.MustExec("UPDATE outbox_history SET unverified_to = 1000")
			start(func(o *relay.Options) { o.Sink = &undecidedSink{observedSink: clickHouse} })
			expectOnce(ctx, 10)
		})
	})

	It("settles rows that are present after PostgreSQL's clock was set back", func(ctx SpecContext) {
		publishMany(ctx, 10)
		claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, "another-"+lease.Token, events) })
		db.MustExec("UPDATE outbox_batches SET last_attempt_at = last_attempt_at + interval '1 hour'")
		start()
		expectOnce(ctx, 10)
	})

	It("reports events that are present although their insert failed", func(ctx SpecContext) {
		testengines.Query(ctx, "clickhouse", target.HTTP, "CREATE MATERIALIZED VIEW failing ENGINE = Null AS SELECT throwIf(1) FROM event_log")
		first := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
		published := publish(ctx, outbox.Event{EventDateTime: first}, outbox.Event{EventDateTime: first.AddDate(0, 0, 1)})
		start()
		expectOnce(ctx, 2)
		Expect(log).To(gbytes.Say(`level=WARN msg="events stored by failed insert" batch_id=\S+ events=2 attempt=2 stored=2 hint="materialized views .*clickhouse error 395.*` +
			`first_event_date_time=2026-03-01T12:00:00.000Z last_event_date_time=2026-03-02T12:00:00.000Z event_types=\[thing_happened\] event_ids="\[` +
			published[0].EventID.String() + " " + published[1].EventID.String()))
		Expect(testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP diehard_relay_events_stored_by_failed_inserts_total Events that are present although their insert failed. Materialized views of the table may lack them.
# TYPE diehard_relay_events_stored_by_failed_inserts_total counter
diehard_relay_events_stored_by_failed_inserts_total 2
`), "diehard_relay_events_stored_by_failed_inserts_total")).To(Succeed())
		testengines.Query(ctx, "clickhouse", target.HTTP, "DROP VIEW failing")
		publishMany(ctx, 1)
		expectOnce(ctx, 3)
		Expect(strings.Count(string(log.Contents()), "stored by failed insert")).To(Equal(1))
	})

	It("keeps a batch that was attempted at another table, says so, and delivers other events", func(ctx SpecContext) {
		publishMany(ctx, 10)
		destination, err := clickHouse.Destination(ctx)
		Expect(err).NotTo(HaveOccurred())
		s.SetDestination(destination)
		claimAndDie(ctx, func(lease *store.Lease, events *sink.Events) { insert(ctx, lease.Token, events) })
		Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: target.Native, Table: "event_log_2"}, slog.New(slog.DiscardHandler))).To(Succeed())
		other, err := clickhouse.Open(clickhouse.Options{DSN: target.Native, Table: "event_log_2"})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(other.Close)
		running := start(func(o *relay.Options) {
			o.Sink, o.Store, o.Registry = other, store.New(db, store.Options{}), prometheus.NewRegistry()
		})
		publishMany(ctx, 5)
		count := func(g Gomega, table string) (rows int) {
			g.Expect(testengines.Scan(ctx, target.HTTP, "SELECT count() FROM "+table, &rows)).To(Succeed())
			return rows
		}
		Eventually(ctx, func(g Gomega) {
			g.Expect(running.Ready(ctx)).To(MatchError(And(
				ContainSubstring("1 batches with 10 events"), ContainSubstring(destination), ContainSubstring("UPDATE outbox_batches"))))
			g.Expect(count(g, "event_log_2")).To(Equal(5))
			events, batches := waiting(g)
			g.Expect([]int{events, batches}).To(Equal([]int{10, 1}))
		}).WithTimeout(patience).Should(Succeed())
		Expect(strings.Count(string(log.Contents()), "batches attempted at another destination")).To(Equal(1))

		By("going back to the first table")
		start()
		expectOnce(ctx, 10)
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(Succeed())
	})

	It("delivers a batch of another table to the current table after the operator has said so", func(ctx SpecContext) {
		publishMany(ctx, 10)
		s.SetDestination("a table that was lost")
		claimAndDie(ctx, func(*store.Lease, *sink.Events) {})
		running := start()
		var elsewhere *store.ElsewhereError
		Eventually(ctx, func() bool {
			var ok bool
			elsewhere, ok = errors.AsType[*store.ElsewhereError](running.Ready(ctx))
			return ok
		}).WithTimeout(patience).Should(BeTrue())
		db.MustExec(elsewhere.Remedy)
		expectOnce(ctx, 10)
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(Succeed())
	})

	It("delivers a batch that an operator has split in smaller parts", func(ctx SpecContext) {
		publishMany(ctx, 10)
		var id uuid.UUID
		claimAndDie(ctx, func(lease *store.Lease, _ *sink.Events) { id = lease.ID })
		Expect(s.SplitBatch(ctx, "alice@laptop", id)).To(Succeed())
		start()
		expectOnce(ctx, 10)
		Expect(string(log.Contents())).To(ContainSubstring(`result=split`))
	})

	It("resolves no batch at a table that has replaced its table", func(ctx SpecContext) {
		published, batches := make(chan struct{}, 1), make(chan struct{}, 1)
		running := start(func(o *relay.Options) {
			o.Published, o.BatchesCut, o.PollInterval = published, batches, time.Hour
		})
		publishMany(ctx, 1)
		published <- struct{}{}
		expectOnce(ctx, 1)
		all := 1
		var lease *store.Lease
		for lease == nil { // a worker that was woken for the first event may take the batch
			expectOnce(ctx, all)
			publishMany(ctx, 10)
			all += 10
			_, err := s.Cut(ctx, 0)
			Expect(err).NotTo(HaveOccurred())
			lease, err = s.Claim(ctx, 1<<40, true)
			Expect(err).NotTo(HaveOccurred())
		}
		var events store.Events
		Expect(lease.Read(ctx, &events)).To(Succeed())
		insert(ctx, lease.Token, &events.Events)
		testengines.Query(ctx, "clickhouse", target.HTTP, "CREATE TABLE event_log_2 AS event_log")
		testengines.Query(ctx, "clickhouse", target.HTTP, "EXCHANGE TABLES event_log AND event_log_2")
		lease.Release()
		Eventually(ctx, func() error {
			select {
			case batches <- struct{}{}:
			default:
			}
			return running.Ready(ctx)
		}).WithTimeout(patience).Should(MatchError(ContainSubstring("1 batches with 10 events")))
		testengines.Query(ctx, "clickhouse", target.HTTP, "EXCHANGE TABLES event_log AND event_log_2")
		running.stop()
		Eventually(ctx, running.ended).WithTimeout(patience).Should(BeClosed())
		start(func(o *relay.Options) { o.Registry = prometheus.NewRegistry() })
		expectOnce(ctx, all)
	})

	It("continues after its connections to PostgreSQL are lost", func(ctx SpecContext) {
		// The relay gets its own connections, because the spec keeps one.
		s = store.New(testengines.OpenStore(dsn, store.Session(30*time.Second)), store.Options{})
		running := start()
		publishMany(ctx, 5)
		expectOnce(ctx, 5)
		for round := range 5 {
			db.MustExec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE datname = current_database() AND pid != pg_backend_pid()`)
			publishMany(ctx, 5)
			expectOnce(ctx, 10+5*round)
		}
		Eventually(ctx, running.Ready).WithArguments(ctx).WithTimeout(patience).Should(Succeed())
	})

	It("finishes its delivery when it is stopped, and leaves the other batches", func(ctx SpecContext) {
		release := clickHouse.hold()
		s = store.New(db, store.Options{MaxRows: 3})
		publishMany(ctx, 12)
		running := start(func(o *relay.Options) { o.Workers = 1 })
		Eventually(ctx, clickHouse.inserted.Load).WithTimeout(patience).Should(Equal(int64(3)))
		running.stop()
		release()
		Eventually(ctx, running.ended).WithTimeout(patience).Should(Receive(BeNil()))

		var rows, left int
		Expect(testengines.Scan(ctx, target.HTTP, "SELECT count() FROM event_log", &rows)).To(Succeed())
		Expect(db.Get(&left, "SELECT count(*) FROM outbox_events")).To(Succeed())
		Expect(rows).To(Equal(3))
		Expect(left).To(Equal(9), "the delivery was settled, and no other was started")
	})
})

type runningRelay struct {
	*relay.Relay
	stop  func()
	ended chan error // receives Run's error and is then closed
}

// traceparent returns the traceparent of the n-th request.
func traceparent(n int, flags string) outbox.Traceparent {
	return outboxtest.Traceparent(fmt.Sprintf("00-0af7651916cd43dd8448eb21%08x-b7ad6b71%08x-%s", n, n, flags))
}

// observedSink is the real sink. It counts its calls.
type observedSink struct {
	*clickhouse.Sink

	before, after   func(*sink.Events) // called before and after each insert, if not nil
	inserts         sync.RWMutex
	checks, queries atomic.Int32
	inserted        atomic.Int64 // events
}

func (s *observedSink) Insert(ctx context.Context, batch sink.Batch) error {
	if s.before != nil {
		s.before(batch.Events)
	}
	s.inserted.Add(int64(batch.Events.Len()))
	s.inserts.RLock()
	defer s.inserts.RUnlock()
	if s.after != nil {
		defer s.after(batch.Events)
	}
	return s.Sink.Insert(ctx, batch)
}

// lateSink inserts only after the deadline.
type lateSink struct{ *observedSink }

func (s lateSink) Insert(ctx context.Context, batch sink.Batch) error {
	<-ctx.Done()
	return s.observedSink.Insert(ctx, batch)
}

// hold makes inserts wait until release is called, or the spec ends.
func (s *observedSink) hold() (release func()) {
	s.inserts.Lock()
	release = sync.OnceFunc(s.inserts.Unlock)
	DeferCleanup(release)
	return release
}

func (s *observedSink) Check(ctx context.Context) error {
	s.checks.Add(1)
	return s.Sink.Check(ctx)
}

func (s *observedSink) InFlight(ctx context.Context, token string) (bool, error) {
	s.queries.Add(1)
	return s.Sink.InFlight(ctx, token)
}

func (s *observedSink) Present(ctx context.Context, keys *sink.Keys) ([]bool, error) {
	s.queries.Add(1)
	return s.Sink.Present(ctx, keys)
}

func openSink(dsn string) *observedSink {
	GinkgoHelper()
	opened, err := clickhouse.Open(clickhouse.Options{DSN: dsn})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(opened.Close)
	return &observedSink{Sink: opened}
}

// undecidedSink acts like a cluster whose replica shows the rows of an insert that was not
// committed in Keeper. The first presence check finds them. Then the replica removes them.
type undecidedSink struct {
	*observedSink

	shown    string // the token of the insert
	believed atomic.Int32
}

func (s *undecidedSink) Undecided() bool { return true }

func (s *undecidedSink) Present(ctx context.Context, keys *sink.Keys) ([]bool, error) {
	if s.shown != "" && s.believed.CompareAndSwap(0, 1) {
		return slices.Repeat([]bool{true}, keys.Len()), nil
	}
	return s.observedSink.Present(ctx, keys)
}

// first removes the first n events from events and returns them.
func first(events *sink.Events, n int) *sink.Events {
	events.EventID = events.EventID[:n]
	events.EventType.Indexes = events.EventType.Indexes[:n]
	events.EventDateTime = events.EventDateTime[:n]
	events.Environment.Indexes = events.Environment.Indexes[:n]
	events.EventContext.Ends = events.EventContext.Ends[:n]
	events.MetadataVersion = events.MetadataVersion[:n]
	return events
}
