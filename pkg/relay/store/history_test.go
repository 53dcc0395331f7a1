package store_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("The history of the outbox", func() {
	var (
		db *sqlx.DB
		s  *store.Store
	)

	BeforeEach(func(ctx SpecContext) {
		db = newDatabase(ctx)
		s = newStore(db)
	})

	// arrange leaves a batch without an attempt, and an event without a batch.
	arrange := func(ctx context.Context) {
		GinkgoHelper()
		publishEvents(ctx, db, 2)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
		publishEvents(ctx, db, 1)
	}

	DescribeTable("has changed if",
		func(ctx SpecContext, sign string, change ...string) {
			arrange(ctx)
			for _, statement := range change {
				db.MustExecContext(ctx, statement)
			}
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			Expect(err).To(MatchError(ContainSubstring(sign)))
			expectUnverified(ctx, db, s)
			publishEvents(ctx, db, 1)
			db.MustExecContext(ctx, "DELETE FROM outbox_batches")
			Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1), "the change is recorded once")
		},
		Entry("the server has another system identifier", "another system identifier",
			"UPDATE outbox_history SET system_identifier = '1', recorded_by = pg_current_xact_id()::xid"),
		Entry("the server has another timeline", "another timeline",
			"UPDATE outbox_history SET timeline = '00000000', recorded_by = pg_current_xact_id()::xid"),
		Entry("the database is another", "another database",
			"UPDATE outbox_history SET database_oid = 1, recorded_by = pg_current_xact_id()::xid"),
		Entry("somebody has changed the row", "copied or changed",
			"UPDATE outbox_history SET unverified_to = 0"),
		Entry("the row was dumped and restored", "copied or changed",
			"CREATE TEMPORARY TABLE dump AS SELECT * FROM outbox_history", "TRUNCATE outbox_history",
			"INSERT INTO outbox_history SELECT * FROM dump"),
		Entry("the row is missing", "outbox_history is empty", "TRUNCATE outbox_history"),
		Entry("all singletons are missing", "outbox_history is empty", "TRUNCATE outbox_history, outbox_cursor"),
		Entry("a copy has added a row to the cursor", "several rows",
			"INSERT INTO outbox_cursor (cuts) VALUES (-1)", "INSERT INTO outbox_cursor (cuts) VALUES (7)",
			"UPDATE outbox_history SET unverified_to = 0"),
		Entry("cuts that this relay has made are missing", "cuts of this relay are missing",
			"UPDATE outbox_cursor SET cuts = cuts - 1"),
		Entry("this relay has worked on another outbox", "does not know",
			"UPDATE outbox_history SET incarnation = gen_random_uuid(), recorded_by = pg_current_xact_id()::xid"),
		Entry("an event was not numbered by the sequence", "higher ids than the sequence",
			"UPDATE outbox_batches SET attempts = 1", // no batch waits for its first attempt
			"INSERT INTO outbox_events (id, event_type, event_context) OVERRIDING SYSTEM VALUE VALUES (1000, 'a', '{}')"),
	)

	It("has not changed if only the cursor is missing", func(ctx SpecContext) {
		arrange(ctx)
		db.MustExecContext(ctx, "TRUNCATE outbox_cursor")
		Expect(s.Stats(ctx)).To(HaveField("BacklogEvents", BeNumerically(">=", 3)))
		Expect(s.Poll(ctx)).To(BeTrue())
		Expect(claimed(ctx, s)).To(BeFalse(), "the lock of the fleet is missing")
		db.MustExecContext(ctx, "UPDATE outbox_batches SET attempts = 1")
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		Expect(claimed(ctx, s)).To(BeTrue())
		other := newStore(db)
		publishEvents(ctx, db, 1)
		Expect(other.Poll(ctx)).To(BeTrue())
		Expect(s.Poll(ctx)).To(BeTrue())
	})

	It("begins again after all tables were emptied", func(ctx SpecContext) {
		for range 2 {
			arrange(ctx)
			db.MustExecContext(ctx, `TRUNCATE outbox_events, outbox_batches, outbox_cursor, outbox_history,
				outbox_dead_letters RESTART IDENTITY`)
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
		}
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		Expect(claimed(ctx, s)).To(BeTrue())
	})

	It("is recorded by one relay for the whole fleet", func(ctx SpecContext) {
		arrange(ctx)
		other := newStore(db)
		Expect(other.Cut(ctx, time.Hour)).To(HaveField("Batches", 0))
		db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
		_, err := s.Cut(ctx, 0)
		Expect(err).To(MatchError(store.ErrHistoryChanged))
		db.MustExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = '-infinity'")
		Expect(claimed(ctx, other)).To(BeFalse(), "it still remembers the earlier history")
		Expect(other.Poll(ctx)).To(BeTrue())
		Expect(other.Cut(ctx, 0)).To(HaveField("Events", 1))
		Expect(claimed(ctx, other)).To(BeTrue())
		publishEvents(ctx, db, 1)
		Expect(s.Cut(ctx, time.Hour)).To(HaveField("Batches", 0))
	})

	It("allows no claim of a relay that has made cuts that are missing", func(ctx SpecContext) {
		arrange(ctx)
		db.MustExecContext(ctx, "UPDATE outbox_cursor SET cuts = 0")
		Expect(claimed(ctx, s)).To(BeFalse())
		Expect(s.Poll(ctx)).To(BeTrue())
	})

	Describe("of a database that was filled before its first cut", func() {
		// other returns another migrated database on the same server, with the events and
		// batches of db.
		other := func(ctx context.Context) (*sqlx.DB, *store.Store) {
			GinkgoHelper()
			filled := newDatabase(ctx)
			testengines.DumpTables(ctx, db, "outbox_events", "outbox_batches").Restore(ctx, filled)
			return filled, newStore(filled)
		}

		const (
			raiseSequence = "SELECT setval(pg_get_serial_sequence('outbox_events', 'id'), (SELECT max(id) FROM outbox_events))"
			deleteBatches = "DELETE FROM outbox_batches"
		)

		DescribeTable("has changed", func(ctx SpecContext, inOld, inNew string) {
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			lease, err := s.Claim(ctx, anyBytes, true)
			Expect(err).NotTo(HaveOccurred())
			Expect(lease.Settle(ctx)).To(Succeed())
			publishEvents(ctx, db, 2)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
			publishEvents(ctx, db, 1)
			db.MustExecContext(ctx, inOld)
			var last int
			Expect(db.GetContext(ctx, &last, "SELECT max(id) FROM outbox_events")).To(Succeed())
			filled, s := other(ctx)
			filled.MustExecContext(ctx, inNew)
			_, err = s.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			var unverified int
			Expect(filled.GetContext(ctx, &unverified, "SELECT unverified_to FROM outbox_history")).To(Succeed())
			Expect(unverified).To(Equal(last))
		},
			Entry("with batches", "SELECT", raiseSequence),
			Entry("with events whose ids the sequence has not returned", deleteBatches, "SELECT"),
			Entry("with some events whose ids the sequence has not returned", deleteBatches,
				"SELECT setval(pg_get_serial_sequence('outbox_events', 'id'), (SELECT min(id) FROM outbox_events))"),
			Entry("with events that were published before the migration",
				deleteBatches+"; UPDATE outbox_events SET published_at = '2001-01-01'", raiseSequence),
			Entry("with the events of an outbox that has published a thousand", deleteBatches+"; DELETE FROM outbox_events;"+
				"SELECT setval(pg_get_serial_sequence('outbox_events', 'id'), 1000);"+
				"INSERT INTO outbox_events (event_type, event_context) VALUES ('a', '{}')", raiseSequence),
		)

		It("has not changed if the first transactions were rolled back", func(ctx SpecContext) {
			tx := db.MustBegin()
			tx.MustExecContext(ctx, "INSERT INTO outbox_events (event_type, event_context) SELECT 'a', '{}' FROM generate_series(1, 999)")
			Expect(tx.Rollback()).To(Succeed())
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		})

		It("has not changed while the first transactions are open", func(ctx SpecContext) {
			late := db.MustBegin()
			defer func() { _ = late.Rollback() }()
			late.MustExecContext(ctx, "INSERT INTO outbox_events (event_type, event_context) VALUES ('a', '{}')")
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		})
	})

	It("has changed in a copy of the database, and in a restored dump, on the same server", func(ctx SpecContext) {
		arrange(ctx)
		restored := newDatabase(ctx)
		restored.MustExecContext(ctx, "TRUNCATE outbox_cursor, outbox_history") // as a dump creates them
		testengines.DumpTables(ctx, db, "outbox_events", "outbox_batches", "outbox_cursor", "outbox_history").Restore(ctx, restored)
		_, err := newStore(restored).Cut(ctx, 0)
		Expect(err).To(MatchError(And(ContainSubstring("copied or changed"), ContainSubstring("another database"))))

		copied := suite.CopyOfPostgresDSN(ctx, name(ctx, db))
		_, err = newStore(testengines.OpenStore(copied, store.Session(time.Minute))).Cut(ctx, 0)
		Expect(err).To(MatchError(And(ContainSubstring("another database"), Not(ContainSubstring("copied or changed")))))
	})

	Describe("of a server that a provider runs", func() {
		const anotherStart = "UPDATE outbox_history SET timeline = 'start 1', recorded_by = pg_current_xact_id()::xid"

		It("has changed after each start, if the server does not show its timeline", func(ctx SpecContext) {
			testengines.HideTimeline(ctx, db)
			arrange := func() {
				GinkgoHelper()
				publishEvents(ctx, db, 1)
				_, err := s.Cut(ctx, 0)
				Expect(err).To(And(MatchError(store.ErrHistoryChanged), MatchError(ContainSubstring("another start of a server that does not show its timeline"))))
			}
			arrange() // the server has shown its timeline before
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1), "it is recorded once")
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			Expect(claimed(ctx, s)).To(BeTrue())
			db.MustExecContext(ctx, anotherStart)
			Expect(claimed(ctx, s)).To(BeFalse())
			arrange()
			expectUnverified(ctx, db, s)
		})

		It("has not changed if the server has no memory for the answer", func(ctx SpecContext) {
			arrange(ctx)
			end := testengines.FailTimeline(ctx, db, "out_of_memory")
			// PostgreSQL does not notice the change of its own function in sessions that
			// have called it.
			s := newStore(testengines.OpenStore(suite.PostgresDSNOf(name(ctx, db)), store.Session(time.Minute)))
			_, err := s.Cut(ctx, 0)
			Expect(err).To(And(MatchError(ContainSubstring("wal_level must be set")), Not(MatchError(store.ErrHistoryChanged))))
			end()
			Expect(claimed(ctx, s)).To(BeTrue())
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		})

		It("has not changed after a failover, if the operator says that it loses no commit", func(ctx SpecContext) {
			s := store.New(db, store.Options{Lossless: true})
			publishEvents(ctx, db, 2)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
			for _, change := range []string{"UPDATE outbox_history SET timeline = '00000000', recorded_by = pg_current_xact_id()::xid", anotherStart} {
				db.MustExecContext(ctx, change)
				Expect(claimed(ctx, s)).To(BeTrue())
				publishEvents(ctx, db, 1)
				Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			}
			db.MustExecContext(ctx, "UPDATE outbox_history SET unverified_to = 0")
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(ContainSubstring("copied or changed")), "a dump was restored")
		})

		It("is known to relays of a role that may read neither its identifier nor its timeline", func(ctx SpecContext) {
			role := fmt.Sprintf("provided_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
			dsn := suite.EmptyPostgresDSN(ctx)
			superuser := testengines.OpenPostgres(dsn, nil)
			superuser.MustExecContext(ctx, "CREATE ROLE "+role)
			DeferCleanup(func(ctx SpecContext) { superuser.MustExecContext(ctx, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
			superuser.MustExecContext(ctx, "GRANT CREATE ON SCHEMA public TO "+role+"; REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
			testengines.HideTimeline(ctx, superuser)
			session := store.Session(time.Minute)
			session["role"] = role
			own := testengines.OpenStore(dsn, session)
			Expect(testengines.Schema.Migrate(ctx, own.DB, quiet)).To(Succeed())

			s := newStore(own)
			Expect(s.Inspect(ctx)).To(And(HaveField("Problems", BeEmpty()), HaveField("NoTimeline", true), HaveField("Complete", true)))
			publishEvents(ctx, own, 2)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
			Expect(claimed(ctx, s)).To(BeTrue())

			By("getting the right to read the identifier, and losing it again")
			identifier := func() (known string) {
				GinkgoHelper()
				Expect(own.GetContext(ctx, &known, "SELECT system_identifier FROM outbox_history")).To(Succeed())
				return known
			}
			superuser.MustExecContext(ctx, "GRANT EXECUTE ON FUNCTION pg_control_system() TO "+role)
			publishEvents(ctx, own, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			Expect(identifier()).To(BeEmpty())
			_, err := s.Check(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(identifier()).NotTo(BeEmpty())
			Expect(claimed(ctx, s)).To(BeTrue())
			publishEvents(ctx, own, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1), "it is no change of history")
			own.MustExecContext(ctx, "UPDATE outbox_history SET system_identifier = '1', recorded_by = pg_current_xact_id()::xid")
			_, err = s.Cut(ctx, 0)
			Expect(err).To(MatchError(ContainSubstring("another system identifier")))
			superuser.MustExecContext(ctx, "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM "+role)
			own.MustExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = '-infinity'")
			Expect(claimed(ctx, s)).To(BeTrue())
			publishEvents(ctx, own, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
		})
	})

	It("is recorded with all events that exist, even if the sequence is behind them", func(ctx SpecContext) {
		arrange(ctx)
		db.MustExecContext(ctx, "INSERT INTO outbox_events (id, event_type, event_context) OVERRIDING SYSTEM VALUE VALUES (1000, 'a', '{}')")
		db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
		_, err := s.Cut(ctx, 0)
		Expect(err).To(MatchError(store.ErrHistoryChanged))
		expectUnverified(ctx, db, s)
		publishEvents(ctx, db, 1)
		var published int
		Expect(db.GetContext(ctx, &published, "SELECT max(id) FROM outbox_events")).To(Succeed())
		Expect(published).To(BeNumerically(">", 1000), "publishers do not collide with the events")
	})

	It("is recorded with the ids of dead letters, even if their sequence is behind them", func(ctx SpecContext) {
		letter := `INSERT INTO outbox_dead_letters (id, outbox_event_id, event_id, event_type, event_date_time,
			environment, event_context, metadata_version, published_at, batch_id, token, error)
			OVERRIDING %s VALUE VALUES (1, 1, gen_random_uuid(), 'a', now(), 'Test', '{}', 1, now(), gen_random_uuid(), 'of the batch', 'why')`
		db.MustExecContext(ctx, fmt.Sprintf(letter, "SYSTEM"))
		db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
		_, err := s.Cut(ctx, 0)
		Expect(err).To(MatchError(store.ErrHistoryChanged))
		db.MustExecContext(ctx, fmt.Sprintf(letter, "USER"))
	})

	It("is recorded with the events of dead letters", func(ctx SpecContext) {
		db.MustExecContext(ctx, `INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
			environment, event_context, metadata_version, published_at, batch_id, token, error)
			VALUES (500, gen_random_uuid(), 'a', now(), 'Test', '{}', 1, now(), gen_random_uuid(), 'of the batch', 'why')`)
		db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
		_, err := s.Cut(ctx, 0)
		Expect(err).To(MatchError(store.ErrHistoryChanged))
		for _, err := range s.RequeueDeadLetters(ctx, []int64{1}) {
			Expect(err).NotTo(HaveOccurred())
		}
		expectUnverified(ctx, db, s)
	})

	It("stays changed if a dead letter is requeued before a relay notices", func(ctx SpecContext) {
		db.MustExecContext(ctx, `INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
			environment, event_context, metadata_version, published_at, batch_id, token, error)
			VALUES (0, gen_random_uuid(), 'a', now(), 'Test', '{}', 1, now(), gen_random_uuid(), 'of the batch', 'why')`)
		db.MustExecContext(ctx, "UPDATE outbox_history SET unverified_to = 0")
		for _, err := range s.RequeueDeadLetters(ctx, []int64{1}) {
			Expect(err).NotTo(HaveOccurred())
		}
		_, err := s.Cut(ctx, 0)
		Expect(err).To(MatchError(store.ErrHistoryChanged))
	})

	Describe("with relays of different flush timeouts", func() {
		var slow, quick *store.Store

		BeforeEach(func() {
			slow = store.New(db, store.Options{MaxRows: 10, FlushTimeout: 8 * time.Minute})
			quick = store.New(db, store.Options{MaxRows: 10, FlushTimeout: time.Second, MaxDelay: time.Second})
		})

		longest := func(ctx context.Context) (seconds float64) {
			GinkgoHelper()
			Expect(db.GetContext(ctx, &seconds, "SELECT extract(epoch FROM flush_timeout) FROM outbox_history")).To(Succeed())
			return seconds
		}
		// waits returns how long each batch waits, in minutes.
		waits := func(ctx context.Context) (minutes []float64) {
			GinkgoHelper()
			Expect(db.SelectContext(ctx, &minutes, `SELECT extract(epoch FROM next_attempt_at - clock_timestamp()) / 60
				FROM outbox_batches ORDER BY batch_id`)).To(Succeed())
			return minutes
		}

		It("waits for the inserts of the slowest relay after a change, also if a quick relay has recorded it", func(ctx SpecContext) {
			Expect(second(slow.Check(ctx))).To(Succeed())
			Expect(second(quick.Check(ctx))).To(Succeed())
			Expect(longest(ctx)).To(Equal(480.0))
			arrange(ctx)
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("More", true))
			db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
			_, err := quick.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			Expect(quick.Cut(ctx, 0)).To(HaveField("Batches", 1))
			Expect(quick.Poll(ctx)).To(BeTrue())
			Expect(waits(ctx)).To(HaveExactElements(BeNumerically("~", 8, 0.5), BeNumerically("~", 8, 0.5)))
			Expect(longest(ctx)).To(Equal(480.0))
			db.MustExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = next_attempt_at + interval '1 hour'") // the clock was set back
			Expect(quick.Poll(ctx)).To(BeTrue())
			Expect(waits(ctx)).To(HaveExactElements(BeNumerically("~", 8, 0.5), BeNumerically("~", 8, 0.5)))
		})

		It("waits for its own inserts if no relay is slower", func(ctx SpecContext) {
			Expect(second(quick.Check(ctx))).To(Succeed())
			arrange(ctx)
			db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
			_, err := slow.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			Expect(waits(ctx)).To(HaveExactElements(BeNumerically("~", 8, 0.5)))
			Expect(longest(ctx)).To(Equal(480.0))
		})

		It("makes requeued dead letters wait as long", func(ctx SpecContext) {
			Expect(second(slow.Check(ctx))).To(Succeed())
			db.MustExecContext(ctx, `INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
				environment, event_context, metadata_version, published_at, batch_id, token, error)
				VALUES (1, gen_random_uuid(), 'a', now(), 'Test', '{}', 1, now(), gen_random_uuid(), 'of the batch', 'why')`)
			db.MustExecContext(ctx, "UPDATE outbox_history SET unverified_to = 1, recorded_by = pg_current_xact_id()::xid")
			for _, err := range quick.RequeueDeadLetters(ctx, []int64{1}) {
				Expect(err).NotTo(HaveOccurred())
			}
			Expect(waits(ctx)).To(HaveExactElements(BeNumerically("~", 8, 0.5)))
		})

		It("has the timeouts of all relays again after the row was deleted", func(ctx SpecContext) {
			arrange(ctx)
			Expect(second(slow.Check(ctx))).To(Succeed())
			Expect(second(slow.Cut(ctx, 0))).To(Succeed())
			db.MustExecContext(ctx, "TRUNCATE outbox_history")
			_, err := quick.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			Expect(longest(ctx)).To(Equal(1.0))
			_, err = slow.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged), "it does not know the new row")
			Expect(longest(ctx)).To(Equal(480.0))
		})

		It("has the timeout of a relay that takes over a recorded change", func(ctx SpecContext) {
			arrange(ctx)
			Expect(second(slow.Cut(ctx, 0))).To(Succeed())
			db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
			_, err := quick.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			Expect(longest(ctx)).To(Equal(1.0))
			Expect(second(slow.Cut(ctx, 0))).To(Succeed())
			Expect(longest(ctx)).To(Equal(480.0))
			Expect(second(quick.Cut(ctx, 0))).To(Succeed(), "the change is recorded once")
		})

		It("shows a copied row also after a relay has recorded its timeout", func(ctx SpecContext) {
			arrange(ctx)
			db.MustExecContext(ctx, "UPDATE outbox_history SET unverified_to = 0")
			Expect(second(slow.Check(ctx))).To(Succeed())
			_, err := quick.Cut(ctx, 0)
			Expect(err).To(MatchError(ContainSubstring("copied or changed")))
		})
	})

	Describe("for a role without rights on the sequence", func() {
		var limited *sqlx.DB

		BeforeEach(func(ctx SpecContext) {
			role := fmt.Sprintf("relay_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
			db.MustExecContext(ctx, "CREATE ROLE "+role)
			DeferCleanup(func(ctx SpecContext) {
				db.MustExecContext(ctx, "DROP OWNED BY "+role)
				db.MustExecContext(ctx, "DROP ROLE "+role)
			})
			db.MustExecContext(ctx, "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "+role)
			session := store.Session(30 * time.Second)
			session["role"] = role
			limited = testengines.OpenStore(suite.PostgresDSNOf(name(ctx, db)), session)
			s = newStore(limited)
		})

		It("is recorded", func(ctx SpecContext) {
			arrange(ctx)
			db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			expectUnverified(ctx, db, s)
		})

		It("is recorded with advice if publishers would collide", func(ctx SpecContext) {
			var role string
			Expect(limited.GetContext(ctx, &role, "SELECT current_user")).To(Succeed())
			db.MustExecContext(ctx, "GRANT SELECT ON SEQUENCE outbox_events_id_seq TO "+pq.QuoteIdentifier(role))
			publishEvents(ctx, db, 1)
			db.MustExecContext(ctx, "INSERT INTO outbox_events (id, event_type, event_context) OVERRIDING SYSTEM VALUE VALUES (1000, 'a', '{}')")
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(ContainSubstring("SELECT setval('public.outbox_events_id_seq', 1000)")))
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2), "it is recorded once")
		})

		It("does not prevent the figures of a large backlog", func(ctx SpecContext) {
			publishEvents(ctx, db, 11_000)
			Expect(s.Stats(ctx)).To(HaveField("BacklogEvents", int64(11_000)))
		})
	})

	It("is replicated by a publication for all tables", func(ctx SpecContext) {
		db.MustExecContext(ctx, "CREATE PUBLICATION everything FOR ALL TABLES")
		var tables []struct {
			Name   string `db:"table_name"`
			Column string `db:"column_name"`
		}
		Expect(db.SelectContext(ctx, &tables, `SELECT DISTINCT ON (table_name) table_name, column_name
			FROM information_schema.columns WHERE table_schema = 'public' AND is_generated = 'NEVER' AND is_identity = 'NO'
			ORDER BY table_name`)).To(Succeed())
		Expect(len(tables)).To(BeNumerically(">=", 7))
		for _, table := range tables {
			_, err := db.ExecContext(ctx, fmt.Sprintf("UPDATE %s SET %[2]s = %[2]s", table.Name, table.Column))
			Expect(err).NotTo(HaveOccurred())
			_, err = db.ExecContext(ctx, "DELETE FROM "+table.Name+" WHERE false")
			Expect(err).NotTo(HaveOccurred())
		}
	})

	It("belongs to the publishing server while a subscription writes into the outbox", func(ctx SpecContext) {
		arrange(ctx)
		published := newDatabase(ctx)
		published.MustExecContext(ctx, "CREATE PUBLICATION everything FOR ALL TABLES")
		db.MustExecContext(ctx, fmt.Sprintf(`CREATE SUBSCRIPTION from_blue CONNECTION '%s' PUBLICATION everything
			WITH (enabled = false, create_slot = false, copy_data = false, slot_name = 'missing')`, suite.PostgresDSNOf(name(ctx, published))))
		DeferCleanup(func(ctx SpecContext) {
			db.MustExecContext(ctx, "ALTER SUBSCRIPTION from_blue DISABLE")
			db.MustExecContext(ctx, "ALTER SUBSCRIPTION from_blue SET (slot_name = NONE)")
			db.MustExecContext(ctx, "DROP SUBSCRIPTION from_blue")
		})
		Expect(s.Poll(ctx)).To(BeTrue())
		Expect(s.Cut(ctx, 0)).To(HaveField("More", true), "a disabled subscription does not write")
		db.MustExecContext(ctx, "ALTER SUBSCRIPTION from_blue ENABLE")
		publishEvents(ctx, db, 1)
		Expect(claimed(ctx, s)).To(BeFalse())
		for range 2 {
			Expect(s.Poll(ctx)).To(BeTrue())
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(And(ContainSubstring("from_blue"), ContainSubstring("DROP SUBSCRIPTION"))))
		}
		db.MustExecContext(ctx, "ALTER SUBSCRIPTION from_blue DISABLE")
		Eventually(ctx, func() error {
			_, err := newStore(db).Cut(ctx, 0) // a relay that has not seen the subscription
			return err
		}).WithTimeout(time.Minute).Should(MatchError(store.ErrHistoryChanged))
		expectUnverified(ctx, db, s)
	})
})

// name returns the name of the database.
func name(ctx context.Context, db *sqlx.DB) (name string) {
	GinkgoHelper()
	Expect(db.GetContext(ctx, &name, "SELECT current_database()")).To(Succeed())
	return name
}

func newStore(db *sqlx.DB) *store.Store {
	return store.New(db, store.Options{MaxRows: 10, MaxBytes: 10_000})
}

func publishEvents(ctx context.Context, db *sqlx.DB, n int) {
	GinkgoHelper()
	publish(ctx, db, outbox.NewPublisher(outbox.PublisherOptions{}), make([]outbox.Event, n)...)
}

// claimed claims a batch and releases it. It returns whether it has found one.
func claimed(ctx context.Context, s *store.Store) bool {
	GinkgoHelper()
	lease, err := s.Claim(ctx, anyBytes, true)
	Expect(err).NotTo(HaveOccurred())
	if lease == nil {
		return false
	}
	lease.Release()
	return true
}

// expectUnverified cuts all events and expects that no attempt at a batch is the first,
// and that all batches wait.
func expectUnverified(ctx context.Context, db *sqlx.DB, s *store.Store) {
	GinkgoHelper()
	Expect(second(s.Cut(ctx, 0))).To(Succeed())
	var uncut int
	Expect(db.GetContext(ctx, &uncut, `SELECT count(*) FROM outbox_events
		WHERE NOT EXISTS (SELECT FROM outbox_batches WHERE event_ids @> id)`)).To(Succeed())
	Expect(uncut).To(BeZero())
	var first, due int
	Expect(db.GetContext(ctx, &first, "SELECT count(*) FROM outbox_batches WHERE attempts = 0")).To(Succeed())
	Expect(first).To(BeZero(), "an event may be present in the sink")
	Expect(db.GetContext(ctx, &due, "SELECT count(*) FROM outbox_batches WHERE next_attempt_at < clock_timestamp() + interval '20 s'")).To(Succeed())
	Expect(due).To(BeZero(), "an insert of the lost history may still be in flight")
}

var _ = Describe("The tables of the outbox", func() {
	It("allow one row of the history", func(ctx SpecContext) {
		db := newDatabase(ctx)
		_, err := db.ExecContext(ctx, `INSERT INTO outbox_history (system_identifier, timeline, database_oid) VALUES ('1', '1', 1)`)
		Expect(err).To(MatchError(ContainSubstring("outbox_history_pkey")))
		_, err = db.ExecContext(ctx, `INSERT INTO outbox_history (singleton, system_identifier, timeline, database_oid) VALUES (false, '1', '1', 1)`)
		Expect(err).To(MatchError(ContainSubstring("check")))
	})

	It("are created by migrations whose history is valid", func(ctx SpecContext) {
		db := testengines.OpenStore(suite.EmptyPostgresDSN(ctx), store.Session(time.Minute))
		schema := postgres.Schema{Sets: []postgres.Set{postgres.Outbox}}
		Expect(schema.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
		publishEvents(ctx, db, 1)
		Expect(newStore(db).Cut(ctx, 0)).To(HaveField("Events", 1))
	})

	It("have valid history if the printed statements were executed one by one", func(ctx SpecContext) {
		db := testengines.OpenStore(suite.EmptyPostgresDSN(ctx), store.Session(time.Minute))
		var printed strings.Builder
		Expect((postgres.Schema{Sets: []postgres.Set{postgres.Outbox}}).Print(&printed)).To(Succeed())
		db.MustExecContext(ctx, printed.String())
		publishEvents(ctx, db, 1)
		Expect(newStore(db).Cut(ctx, 0)).To(HaveField("Events", 1))
	})
})
