package store_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("Assumptions", func() {
	session := store.Session(30 * time.Second)

	It("are the table in docs/delivery.md", func() {
		var table strings.Builder
		table.WriteString("<!-- postgresql -->\n| setting, right or object | reason | how it is met |\n| --- | --- | --- |\n")
		for _, assumption := range store.Assumptions() {
			fmt.Fprintf(&table, "| %s | %s | %s |\n", assumption.Object, assumption.Reason, assumption.Met)
		}
		table.WriteString("<!-- /postgresql -->\n")
		root, err := testengines.Repository()
		Expect(err).NotTo(HaveOccurred())
		content, err := os.ReadFile(filepath.Join(root, "docs", "delivery.md"))
		Expect(err).NotTo(HaveOccurred())
		Expect(strings.Contains(string(content), table.String())).To(BeTrue(), "the table must be:\n\n%s", table.String())
	})

	It("override the settings of the database, of the role and of the DSN", func(ctx SpecContext) {
		hostile := map[string]string{
			"synchronous_commit":                  "off",
			"default_transaction_isolation":       "serializable",
			"row_security":                        "on",
			"idle_session_timeout":                "1h",
			"transaction_timeout":                 "1h",
			"idle_in_transaction_session_timeout": "1h",
			"statement_timeout":                   "1h",
			"lock_timeout":                        "1h",
			"tcp_keepalives_idle":                 "77",
			"tcp_keepalives_interval":             "77",
			"tcp_keepalives_count":                "7",
			"tcp_user_timeout":                    "77",
			"jit":                                 "on",
			"enable_seqscan":                      "on",
			"enable_bitmapscan":                   "on",
			"enable_memoize":                      "on",
			"enable_hashjoin":                     "on",
			"enable_mergejoin":                    "on",
			"enable_indexscan":                    "off",
			"enable_indexonlyscan":                "off",
			"enable_nestloop":                     "off",
			"enable_sort":                         "off",
			"max_parallel_workers_per_gather":     "4",
			"plan_cache_mode":                     "force_generic_plan",
		}
		Expect(slices.Collect(maps.Keys(hostile))).To(ConsistOf(slices.Collect(maps.Keys(session))))
		dsn := suite.PostgresDSN(ctx)
		owner := testengines.OpenPostgres(dsn, nil)
		var known []string
		Expect(owner.SelectContext(ctx, &known, "SELECT name FROM pg_settings")).To(Succeed())
		for name, value := range hostile {
			if slices.Contains(known, name) {
				owner.MustExecContext(ctx, fmt.Sprintf("DO $$ BEGIN EXECUTE format('ALTER DATABASE %%I SET %s = ''%s''', current_database()); END $$", name, value))
			}
		}
		for _, form := range []string{dsn, dsn + "&synchronous_commit=off&options=-c%20row_security%3Don"} {
			db := testengines.OpenStore(form, session)
			for name, value := range session {
				if !slices.Contains(known, name) {
					continue
				}
				var actual string
				Expect(db.GetContext(ctx, &actual, "SELECT setting FROM pg_settings WHERE name = $1", name)).To(Succeed())
				Expect(actual).To(Equal(value), name)
			}
		}
	})

	It("keep a cut in a crash, if the database turns synchronous_commit off", func(ctx SpecContext) {
		own := testengines.StartPostgres(ctx, map[string]string{"wal_writer_delay": "10s"})
		db := testengines.OpenStore(own.DSN(), session)
		Expect(testengines.Schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
		db.MustExecContext(ctx, "ALTER DATABASE postgres SET synchronous_commit = off")
		db = testengines.OpenStore(own.DSN(), session)
		publish(ctx, db, outbox.NewPublisher(outbox.PublisherOptions{}), outbox.Event{})
		s := store.New(db, store.Options{})
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
		own.Kill()
		own.Start(ctx)
		var batches int
		Eventually(ctx, func() error { return db.GetContext(ctx, &batches, "SELECT count(*) FROM outbox_batches") }).Should(Succeed())
		Expect(batches).To(Equal(1))
	})

	It("keep an attempt in a crash, if another client of a shared session has turned synchronous_commit off", func(ctx SpecContext) {
		own := testengines.StartPostgres(ctx, map[string]string{"wal_writer_delay": "10s"})
		db := testengines.OpenStore(own.DSN(), session)
		Expect(testengines.Schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
		publish(ctx, db, outbox.NewPublisher(outbox.PublisherOptions{}), outbox.Event{})
		s := store.New(db, store.Options{})
		Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
		db.SetMaxOpenConns(1)
		db.MustExecContext(ctx, "SET synchronous_commit = off")
		db.SetMaxOpenConns(2)
		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		lease.Release()
		own.Kill()
		own.Start(ctx)
		var attempts []int
		Eventually(ctx, func() error {
			return db.SelectContext(ctx, &attempts, "SELECT attempts FROM outbox_batches")
		}).Should(Succeed())
		Expect(attempts).To(Equal([]int{1}))
	})
})

var _ = Describe("Check", func() {
	var (
		dsn, role string
		owner     *sqlx.DB
	)

	// grants are the rights of the documentation.
	const grants = `
		GRANT SELECT, DELETE ON outbox_events TO %[1]s;
		GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_batches, outbox_cursor, outbox_history TO %[1]s;
		GRANT SELECT, INSERT, UPDATE ON outbox_fuse TO %[1]s;
		GRANT SELECT, INSERT, DELETE ON outbox_quarantine TO %[1]s;
		GRANT SELECT ON outbox_pause TO %[1]s;
		GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relays TO %[1]s;
		GRANT SELECT, INSERT, UPDATE ON outbox_housekeeping TO %[1]s;
		GRANT SELECT, DELETE ON outbox_audit TO %[1]s;
		GRANT SELECT, INSERT ON outbox_dead_letters TO %[1]s;
		GRANT SELECT ON SEQUENCE outbox_events_id_seq TO %[1]s;
		GRANT SELECT ON diehard_outbox_version TO %[1]s`

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		owner = testengines.OpenPostgres(dsn, nil)
		role = fmt.Sprintf("relay_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
		owner.MustExecContext(ctx, "CREATE ROLE "+role)
		DeferCleanup(func(ctx SpecContext) {
			owner.MustExecContext(ctx, "DROP OWNED BY "+role)
			owner.MustExecContext(ctx, "DROP ROLE "+role)
		})
		owner.MustExecContext(ctx, fmt.Sprintf(grants, role))
	})

	// as returns a store with the rights of the role.
	as := func(settings map[string]string) *store.Store {
		GinkgoHelper()
		own := maps.Clone(settings)
		own["role"] = role
		return store.New(testengines.OpenStore(dsn, own), store.Options{})
	}
	asRole := func() *store.Store { return as(store.Session(30 * time.Second)) }

	It("accepts a role with the documented rights, which can deliver", func(ctx SpecContext) {
		s := asRole()
		unsafe, err := s.Check(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(unsafe).To(Equal([]string{"fsync", "full_page_writes"}), "the server of the suite is fast, not durable")

		publish(ctx, owner, outbox.NewPublisher(outbox.PublisherOptions{}), outbox.Event{}, outbox.Event{}, outbox.Event{}, outbox.Event{})
		owner.MustExecContext(ctx, "UPDATE outbox_history SET timeline = 'another'")
		Expect(s.Cut(ctx, 0)).Error().To(MatchError(store.ErrHistoryChanged))
		Expect(s.Poll(ctx)).To(BeTrue())
		Expect(s.Cut(ctx, 0)).To(HaveField("Events", 4))
		Expect(s.Stats(ctx)).To(WithTransform(batchCount, Equal(int64(1))))
		claim := func() *store.Lease {
			GinkgoHelper()
			owner.MustExecContext(ctx, "UPDATE outbox_batches SET next_attempt_at = '-infinity'")
			lease, err := s.Claim(ctx, anyBytes, true)
			Expect(err).NotTo(HaveOccurred())
			Expect(lease).NotTo(BeNil())
			return lease
		}
		Expect(claim().Retry(ctx, errors.New("on purpose"), 0)).To(Succeed())
		Expect(claim().RenewToken(ctx, errors.New("on purpose"))).To(Succeed())
		Expect(claim().SetAside(ctx, []int64{4}, []int64{1, 2, 3})).To(Succeed())
		Expect(s.PutIntoQuarantine(ctx, "a", errors.New("on purpose"))).To(Succeed())
		Expect(s.EndQuarantine(ctx, []string{"a"})).To(Succeed())
		owner.MustExecContext(ctx, "DELETE FROM outbox_batches WHERE event_ids @> 4::bigint")
		refusing := claim()
		Expect(refusing.AllowDeadLetters(ctx, 1)).To(BeTrue())
		Expect(refusing.Shrink(ctx, store.Outcome{
			Delivered: []int64{1}, Refused: []store.Refused{{ID: 2, Cause: errors.New("on purpose")}}, Remaining: []int64{3},
		}, nil)).To(Succeed())
		Expect(claim().Settle(ctx)).To(Succeed())
	})

	It("names the remedy if a restored dump lacks the function of the migrations", func(ctx SpecContext) {
		owner.MustExecContext(ctx, "DROP FUNCTION diehard_server()")
		_, err := asRole().Check(ctx)
		Expect(err).To(And(HaveField("Problem", "the function diehard_server is missing"), HaveField("Remedy", ContainSubstring("relay migrate --print=postgres"))))
	})

	DescribeTable("names the remedy, and accepts the database after it",
		func(ctx SpecContext, spoil, problem, remedy string) {
			owner.MustExecContext(ctx, strings.ReplaceAll(spoil, "SOMEBODY", role))
			_, err := asRole().Check(ctx)
			refused, ok := errors.AsType[*postgres.UnsuitableError](err)
			Expect(ok).To(BeTrue(), "%v", err)
			Expect(err.Error()).NotTo(ContainSubstring("\n"))
			Expect(refused.Problem).To(Equal(strings.ReplaceAll(problem, "SOMEBODY", role)))
			Expect(refused.Remedy).To(HavePrefix(strings.ReplaceAll(remedy, "SOMEBODY", `"`+role+`"`)))
			owner.MustExecContext(ctx, strings.ReplaceAll(remedy, "SOMEBODY", role))
			Expect(second(asRole().Check(ctx))).To(Succeed())
		},
		Entry("no right to delete events", "REVOKE DELETE ON outbox_events FROM SOMEBODY",
			"the role SOMEBODY lacks rights on outbox_events: DELETE", "GRANT DELETE ON outbox_events TO SOMEBODY"),
		Entry("no right to lock the cursor", "REVOKE UPDATE, INSERT ON outbox_cursor FROM SOMEBODY",
			"the role SOMEBODY lacks rights on outbox_cursor: INSERT, UPDATE", "GRANT INSERT, UPDATE ON outbox_cursor TO SOMEBODY"),
		Entry("no right to record a change of history", "REVOKE UPDATE ON outbox_history FROM SOMEBODY",
			"the role SOMEBODY lacks rights on outbox_history: UPDATE", "GRANT UPDATE ON outbox_history TO SOMEBODY"),
		Entry("no right to dead-letter", "REVOKE INSERT ON outbox_dead_letters FROM SOMEBODY",
			"the role SOMEBODY lacks rights on outbox_dead_letters: INSERT", "GRANT INSERT ON outbox_dead_letters TO SOMEBODY"),
		Entry("no right on the sequence", "REVOKE ALL ON SEQUENCE outbox_events_id_seq FROM SOMEBODY",
			"the role SOMEBODY may not read the sequence of outbox_events", "GRANT SELECT ON SEQUENCE public.outbox_events_id_seq TO SOMEBODY"),
		Entry("no right on the identity of the server", "REVOKE EXECUTE ON FUNCTION diehard_server() FROM PUBLIC",
			"the role SOMEBODY may not read the identity of the server", "GRANT EXECUTE ON FUNCTION diehard_server() TO SOMEBODY"),
		Entry("row level security", "ALTER TABLE outbox_events ENABLE ROW LEVEL SECURITY",
			"row level security hides rows of outbox_events from the role SOMEBODY", "ALTER ROLE SOMEBODY BYPASSRLS"),
		Entry("row level security with a policy that hides nothing",
			"ALTER TABLE outbox_batches ENABLE ROW LEVEL SECURITY; CREATE POLICY all_rows ON outbox_batches USING (true)",
			"row level security hides rows of outbox_batches from the role SOMEBODY", "ALTER ROLE SOMEBODY BYPASSRLS"),
		Entry("an unlogged table", "ALTER TABLE outbox_batches SET UNLOGGED",
			"the table outbox_batches is unlogged: a crash of PostgreSQL empties it", "ALTER TABLE outbox_batches SET LOGGED"),
		Entry("a lost constraint", "ALTER TABLE outbox_batches DROP CONSTRAINT outbox_batches_are_disjoint",
			"the constraint outbox_batches_are_disjoint is missing or invalid",
			"ALTER TABLE outbox_batches ADD CONSTRAINT outbox_batches_are_disjoint EXCLUDE USING gist (event_ids WITH &&)"),
		Entry("a sequence that cycles", "ALTER SEQUENCE outbox_events_id_seq CYCLE",
			"the sequence of outbox_events does not ascend, or cycles",
			"ALTER SEQUENCE public.outbox_events_id_seq INCREMENT BY 1 MINVALUE 1 NO CYCLE"),
	)

	It("finds all problems in an inspection, which changes nothing", func(ctx SpecContext) {
		history := func() (row string) {
			GinkgoHelper()
			Expect(owner.GetContext(ctx, &row, "SELECT outbox_history::text FROM outbox_history")).To(Succeed())
			return row
		}
		before := history()
		s := store.New(testengines.OpenStore(dsn, map[string]string{"role": role, "row_security": "on"}), store.Options{FlushTimeout: time.Hour})
		owner.MustExecContext(ctx, strings.ReplaceAll(`REVOKE DELETE ON outbox_events, outbox_batches FROM SOMEBODY;
			REVOKE ALL ON SEQUENCE outbox_events_id_seq FROM SOMEBODY; ALTER TABLE outbox_events SET UNLOGGED`, "SOMEBODY", role))
		found, err := s.Inspect(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(found.Complete).To(BeTrue())
		Expect(found.Unsafe).To(Equal([]string{"fsync", "full_page_writes"}), "the server of the suite is fast, not durable")
		problem := func(part store.Part, text string) any {
			return And(HaveField("Part", part), HaveField("Err.Problem", ContainSubstring(text)))
		}
		Expect(found.Problems).To(HaveExactElements(
			problem(store.Rights, "lacks rights on outbox_events: DELETE"),
			problem(store.Tables, "the table outbox_events is unlogged"),
			problem(store.Rights, "lacks rights on outbox_batches: DELETE"),
			problem(store.Settings, "row_security is on"),
			problem(store.Rights, "may not read the sequence of outbox_events"),
		))
		Expect(second(s.Check(ctx))).To(MatchError(found.Problems[0].Err.Error()))
		Expect(history()).To(Equal(before))

		By("looking for a table that does not exist")
		owner.MustExecContext(ctx, "ALTER TABLE outbox_fuse RENAME TO fuse")
		found, err = s.Inspect(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(found.Complete).To(BeFalse())
		Expect(found.Problems).To(ContainElement(problem(store.Tables, "the table outbox_fuse is missing")))
	})

	It("refuses a table without its primary key, and a lost identity", func(ctx SpecContext) {
		owner.MustExecContext(ctx, "ALTER TABLE outbox_events ALTER id DROP IDENTITY")
		Expect(second(asRole().Check(ctx))).To(MatchError(ContainSubstring("the column id of outbox_events has no sequence")))
		owner.MustExecContext(ctx, "ALTER TABLE outbox_events DROP CONSTRAINT outbox_events_pkey")
		Expect(second(asRole().Check(ctx))).To(MatchError(ContainSubstring("the table outbox_events has no valid primary key")))
	})

	DescribeTable("refuses a transaction without the settings of the session",
		func(ctx SpecContext, setting, value, problem string) {
			settings := store.Session(30 * time.Second)
			settings[setting] = value
			Expect(second(as(settings).Check(ctx))).To(MatchError(And(
				ContainSubstring(problem), ContainSubstring("connect to PostgreSQL directly, or through a pooler in session mode"))))
		},
		Entry("synchronous_commit", "synchronous_commit", "off", "synchronous_commit is off"),
		Entry("row_security", "row_security", "on", "row_security is on"),
	)

	It("names the schema that the role may not use", func(ctx SpecContext) {
		owner.MustExecContext(ctx, "CREATE SCHEMA diehard; ALTER TABLE outbox_events SET SCHEMA diehard")
		settings := store.Session(30 * time.Second)
		settings["role"] = role
		s := store.New(testengines.OpenStore(dsn, settings), store.Options{Schema: "diehard"})
		Expect(second(s.Check(ctx))).To(MatchError(ContainSubstring(`GRANT USAGE ON SCHEMA "diehard"`)))
	})

	It("finds hidden rows even if row level security is enabled while the relay runs", func(ctx SpecContext) {
		s := asRole()
		Expect(second(s.Check(ctx))).To(Succeed())
		publish(ctx, owner, outbox.NewPublisher(outbox.PublisherOptions{}), outbox.Event{})
		owner.MustExecContext(ctx, "ALTER TABLE outbox_events ENABLE ROW LEVEL SECURITY")
		Expect(second(s.Poll(ctx))).To(MatchError(ContainSubstring("row-level security")))
	})
})
