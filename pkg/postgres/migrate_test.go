package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("the schema", func() {
	var (
		dsn    string
		db     *sqlx.DB
		quiet  = slog.New(slog.DiscardHandler)
		schema = postgres.Schema{Sets: []postgres.Set{postgres.Outbox, postgres.Users}, Command: "api migrate"}
	)

	const newest = 3 // the version of the outbox

	BeforeEach(func(ctx SpecContext) {
		dsn = newDatabase(ctx)
		db = open(postgres.Options{DSN: dsn})
	})

	applied := func(ctx context.Context) (versions []int64) {
		GinkgoHelper()
		Expect(db.SelectContext(ctx, &versions,
			"SELECT version_id FROM diehard_outbox_version WHERE version_id > 0 ORDER BY id")).To(Succeed())
		return versions
	}

	It("is migrated once by concurrent processes", func(ctx SpecContext) {
		var running, steps atomic.Int32
		var group errgroup.Group
		for range 6 {
			own := open(postgres.Options{DSN: dsn, MaxOpenConns: 2})
			group.Go(func() error {
				return schema.Migrate(ctx, own.DB, quiet, func(context.Context) error {
					defer running.Add(-1)
					if running.Add(1) > 1 {
						return errors.New("concurrent migrations")
					}
					steps.Add(1)
					return nil
				})
			})
		}
		Expect(group.Wait()).To(Succeed())
		Expect(steps.Load()).To(BeEquivalentTo(6))
		Expect(applied(ctx)).To(HaveLen(newest))
		Expect(schema.Check(ctx, db.DB, quiet)).To(Succeed())
	})

	It("logs that another process migrates, and stops waiting when its context ends", func(ctx SpecContext) {
		holding, release := make(chan struct{}), make(chan struct{})
		first := make(chan error, 1)
		go func() {
			first <- schema.Migrate(ctx, db.DB, quiet, func(context.Context) error {
				close(holding)
				<-release
				return nil
			})
		}()
		Eventually(holding).Should(BeClosed())

		waiting, cancel := context.WithCancel(ctx)
		log, lines := logs()
		second := make(chan error, 1)
		go func() { second <- schema.Migrate(waiting, open(postgres.Options{DSN: dsn}).DB, log) }()
		Eventually(lines).Should(gbytes.Say("waiting for another migration"))
		Consistently(second, "300ms").ShouldNot(Receive())
		cancel()
		Eventually(second).Should(Receive(MatchError(ContainSubstring("canceled"))))

		close(release)
		Eventually(first).Should(Receive(BeNil()))
	})

	It("returns the error of the last function, and releases the lock", func(ctx SpecContext) {
		failure := errors.New("on purpose")
		Expect(schema.Migrate(ctx, db.DB, quiet, func(context.Context) error { return failure })).
			To(MatchError(failure))
		Expect(schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
	})

	It("is too old before it is migrated", func(ctx SpecContext) {
		err := schema.Check(ctx, db.DB, quiet)
		tooOld, ok := errors.AsType[*postgres.SchemaTooOldError](err)
		Expect(ok).To(BeTrue(), "%v", err)
		Expect(*tooOld).To(Equal(postgres.SchemaTooOldError{Tables: "outbox", Have: 0, Need: newest, Command: "api migrate"}))
		Expect(err).To(MatchError(And(
			ContainSubstring("found version 0, need version %d", newest), ContainSubstring("`api migrate`"))))
		Expect(schema.CheckReady(ctx, db.DB)).To(MatchError(err.Error()))
	})

	It("is too old when a migration is missing", func(ctx SpecContext) {
		Expect(schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
		_, err := db.ExecContext(ctx, "DELETE FROM diehard_users_version WHERE version_id = 1")
		Expect(err).NotTo(HaveOccurred())
		Expect(schema.Check(ctx, db.DB, quiet)).To(
			MatchError(&postgres.SchemaTooOldError{Tables: "users", Have: 0, Need: 1, Command: "api migrate"}))
	})

	It("is logged and not migrated if it is newer than the program", func(ctx SpecContext) {
		Expect(schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
		_, err := db.ExecContext(ctx, "INSERT INTO diehard_outbox_version (version_id, is_applied) VALUES ($1, true)", newest+7)
		Expect(err).NotTo(HaveOccurred())

		log, lines := logs()
		Expect(schema.Check(ctx, db.DB, log)).To(Succeed())
		Expect(lines).To(gbytes.Say(`level=WARN msg=".*newer.*" tables=outbox have=%d need=%d`, newest+7, newest))
		Expect(schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
		Expect(applied(ctx)).To(HaveLen(newest + 1))
	})

	It("is ready if the server accepts writes", func(ctx SpecContext) {
		Expect(schema.Migrate(ctx, db.DB, quiet)).To(Succeed())
		Expect(schema.CheckReady(ctx, db.DB)).To(Succeed())

		standby := open(postgres.Options{DSN: dsn, Session: map[string]string{"default_transaction_read_only": "on"}})
		Expect(schema.CheckReady(ctx, standby.DB)).To(MatchError(ContainSubstring("accepts no writes")))
	})

	It("does not count as too old if the server does not respond", func(ctx SpecContext) {
		err := schema.Check(ctx, open(postgres.Options{DSN: "postgres://u@127.0.0.1:1/d?sslmode=disable"}).DB, quiet)
		Expect(postgres.IsUnavailable(err)).To(BeTrue(), "%v", err)
	})

	Describe("in the database of another application", func() {
		outbox := postgres.Schema{Sets: []postgres.Set{postgres.Outbox}, Command: "relay migrate"}

		It("creates only the outbox, and does not change an existing table named users", func(ctx SpecContext) {
			db.MustExecContext(ctx, "CREATE TABLE users (name text)")
			db.MustExecContext(ctx, "INSERT INTO users VALUES ('ada')")
			Expect(outbox.Migrate(ctx, db.DB, quiet)).To(Succeed())
			Expect(outbox.Check(ctx, db.DB, quiet)).To(Succeed())
			var names []string
			Expect(db.SelectContext(ctx, &names, "SELECT name FROM users")).To(Succeed())
			Expect(names).To(Equal([]string{"ada"}))
			Expect(schema.Check(ctx, db.DB, quiet)).To(MatchError(ContainSubstring("the tables for users in postgresql are too old")))
		})

		It("suggests another schema if a table of the same name exists", func(ctx SpecContext) {
			db.MustExecContext(ctx, "CREATE TABLE users (name text)")
			Expect(schema.Migrate(ctx, db.DB, quiet)).To(MatchError(And(
				ContainSubstring("another application's table"), ContainSubstring("postgres.schema"), ContainSubstring(`"users"`))))
			Expect(outbox.Check(ctx, db.DB, quiet)).To(Succeed(), "the set before users must be migrated")
		})

		DescribeTable("is created in its own schema",
			func(ctx SpecContext, name string) {
				db.MustExecContext(ctx, "CREATE TABLE users (name text)")
				named := schema
				named.Name = name
				Expect(named.Check(ctx, db.DB, quiet)).To(MatchError(ContainSubstring("found version 0, need version 3")))
				for range 2 {
					Expect(named.Migrate(ctx, db.DB, quiet)).To(Succeed())
				}
				Expect(named.CheckReady(ctx, db.DB)).To(Succeed())
				var tables []string
				Expect(db.SelectContext(ctx, &tables, "SELECT tablename FROM pg_tables WHERE schemaname = $1 ORDER BY 1", name)).To(Succeed())
				Expect(tables).To(Equal([]string{
					"diehard_outbox_version", "diehard_users_version", "idempotency_keys",
					"outbox_audit", "outbox_batches", "outbox_cursor", "outbox_dead_letters", "outbox_events", "outbox_fuse",
					"outbox_history", "outbox_housekeeping", "outbox_pause", "outbox_quarantine", "outbox_relays", "users",
				}))
				Expect(db.SelectContext(ctx, &tables, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).To(Succeed())
				Expect(tables).To(Equal([]string{"users"}))

				By("binding diehard_publish to the schema")
				db.MustExecContext(ctx, "SELECT "+pq.QuoteIdentifier(name)+".diehard_publish('order_placed', '{}')")
				var events int
				Expect(db.GetContext(ctx, &events, "SELECT count(*) FROM "+pq.QuoteIdentifier(name)+".outbox_events")).To(Succeed())
				Expect(events).To(Equal(1))
			},
			Entry("with a plain name", "diehard"),
			Entry("with a name that needs quotes", `The "Shop"'s; DROP.Events`),
		)

		It("requires no CREATE privilege if the schema exists", func(ctx SpecContext) {
			role := fmt.Sprintf("migrator_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
			db.MustExecContext(ctx, "CREATE ROLE "+role)
			DeferCleanup(func(ctx SpecContext) {
				db.MustExecContext(ctx, "DROP OWNED BY "+role)
				db.MustExecContext(ctx, "DROP ROLE "+role)
			})
			db.MustExecContext(ctx, "CREATE SCHEMA events AUTHORIZATION "+role)
			own := open(postgres.Options{DSN: dsn, Session: map[string]string{"role": role}})
			named := outbox
			named.Name = "events"
			Expect(named.Migrate(ctx, own.DB, quiet)).To(Succeed())
			named.Name = "another"
			Expect(named.Migrate(ctx, own.DB, quiet)).To(MatchError(And(
				ContainSubstring("create the schema another"), ContainSubstring("permission denied"))))
		})
	})

	DescribeTable("is refused in a database whose encoding is not UTF8, in one line",
		func(ctx SpecContext, encoding string) {
			name := fmt.Sprintf("encoded_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
			db.MustExecContext(ctx, "CREATE DATABASE "+name+" ENCODING '"+encoding+"' LOCALE 'C' TEMPLATE template0")
			DeferCleanup(func(ctx SpecContext) { db.MustExecContext(ctx, "DROP DATABASE "+name+" WITH (FORCE)") })
			address, err := url.Parse(dsn)
			Expect(err).NotTo(HaveOccurred())
			address.Path = "/" + name
			encoded := open(postgres.Options{DSN: address.String()})
			for _, err := range []error{
				schema.Migrate(ctx, encoded.DB, quiet), schema.Check(ctx, encoded.DB, quiet), schema.CheckReady(ctx, encoded.DB),
			} {
				_, unsuitable := errors.AsType[*postgres.UnsuitableError](err)
				Expect(unsuitable).To(BeTrue(), "%v", err)
				Expect(err).To(MatchError(And(HavePrefix("the database "+name+" has the encoding "+encoding+" instead of UTF8"),
					Not(ContainSubstring("\n")))))
			}
		},
		Entry(nil, "SQL_ASCII"), Entry(nil, "LATIN1"),
	)

	It("names the right that the role lacks to read the version", func(ctx SpecContext) {
		role := fmt.Sprintf("reader_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
		db.MustExecContext(ctx, "CREATE ROLE "+role)
		DeferCleanup(func(ctx SpecContext) {
			db.MustExecContext(ctx, "DROP OWNED BY "+role)
			db.MustExecContext(ctx, "DROP ROLE "+role)
		})
		named := schema
		named.Name = "diehard"
		Expect(named.Migrate(ctx, db.DB, quiet)).To(Succeed())
		own := open(postgres.Options{DSN: dsn, Session: map[string]string{"role": role}})
		err := named.Check(ctx, own.DB, quiet)
		refused, ok := errors.AsType[*postgres.UnsuitableError](err)
		Expect(ok).To(BeTrue(), "%v", err)
		Expect(refused.Remedy).To(Equal(`GRANT USAGE ON SCHEMA "diehard" TO "` + role + `"; ` +
			`GRANT SELECT ON "diehard".diehard_outbox_version TO "` + role + `"`))
	})

	DescribeTable("can be created by the printed statements",
		func(ctx SpecContext, name string) {
			named := schema
			named.Name = name
			var printed strings.Builder
			Expect(named.Print(&printed)).To(Succeed())
			_, err := db.ExecContext(ctx, printed.String())
			Expect(err).NotTo(HaveOccurred())
			Expect(named.Check(ctx, db.DB, quiet)).To(Succeed())
			log, lines := logs()
			Expect(named.Migrate(ctx, db.DB, log)).To(Succeed())
			Expect(lines.Contents()).To(BeEmpty(), "no migration ran")
			Expect(printed.String()).NotTo(Or(ContainSubstring("goose"), ContainSubstring("DROP"), ContainSubstring("{schema")))
		},
		Entry("in the search_path", ""),
		Entry("in a schema", `The "Shop"'s`),
	)
})
