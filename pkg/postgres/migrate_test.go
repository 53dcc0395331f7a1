package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"github.com/pressly/goose/v3"
	"golang.org/x/sync/errgroup"

	migrations "github.com/diehard-outbox/diehard/db"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("the schema", func() {
	var (
		dsn    string
		db     *sqlx.DB
		quiet  = slog.New(slog.DiscardHandler)
		newest int64
	)

	BeforeEach(func(ctx SpecContext) {
		dsn = newDatabase(ctx)
		db = open(postgres.Options{DSN: dsn})
		files, err := fs.Glob(migrations.Postgres, "*.sql")
		Expect(err).NotTo(HaveOccurred())
		_, err = fmt.Sscanf(files[len(files)-1], "%d_", &newest)
		Expect(err).NotTo(HaveOccurred())
	})

	applied := func(ctx context.Context) (versions []int64) {
		GinkgoHelper()
		Expect(db.SelectContext(ctx, &versions,
			"SELECT version_id FROM diehard_db_version WHERE version_id > 0 ORDER BY id")).To(Succeed())
		return versions
	}

	It("is migrated once, however often and from however many sides at once", func(ctx SpecContext) {
		var running, steps atomic.Int32
		var group errgroup.Group
		for range 6 {
			own := open(postgres.Options{DSN: dsn, MaxOpenConns: 2})
			group.Go(func() error {
				return postgres.Migrate(ctx, own.DB, quiet, func(context.Context) error {
					defer running.Add(-1)
					if running.Add(1) > 1 {
						return errors.New("two at once")
					}
					steps.Add(1)
					return nil
				})
			})
		}
		Expect(group.Wait()).To(Succeed())
		Expect(steps.Load()).To(BeEquivalentTo(6))
		Expect(applied(ctx)).To(HaveLen(int(newest)))
		Expect(postgres.CheckSchema(ctx, db.DB, quiet)).To(Succeed())
	})

	It("says that another process is migrating, and stops waiting with its context", func(ctx SpecContext) {
		holding, release := make(chan struct{}), make(chan struct{})
		first := make(chan error, 1)
		go func() {
			first <- postgres.Migrate(ctx, db.DB, quiet, func(context.Context) error {
				close(holding)
				<-release
				return nil
			})
		}()
		Eventually(holding).Should(BeClosed())

		waiting, cancel := context.WithCancel(ctx)
		log, lines := logs()
		second := make(chan error, 1)
		go func() { second <- postgres.Migrate(waiting, open(postgres.Options{DSN: dsn}).DB, log) }()
		Eventually(lines).Should(gbytes.Say("another process is migrating"))
		Consistently(second, "300ms").ShouldNot(Receive())
		cancel()
		Eventually(second).Should(Receive(MatchError(ContainSubstring("canceled"))))

		close(release)
		Eventually(first).Should(Receive(BeNil()))
	})

	It("returns the error of what follows, and gives the lock back", func(ctx SpecContext) {
		failure := errors.New("on purpose")
		Expect(postgres.Migrate(ctx, db.DB, quiet, func(context.Context) error { return failure })).
			To(MatchError(failure))
		Expect(postgres.Migrate(ctx, db.DB, quiet)).To(Succeed())
	})

	It("is left as it is rather than to wait for a table that somebody holds", SpecTimeout(time.Minute), func(ctx SpecContext) {
		Expect(postgres.Migrate(ctx, db.DB, quiet)).To(Succeed())
		provider, err := goose.NewProvider(goose.DialectPostgres, db.DB, migrations.Postgres,
			goose.WithTableName("diehard_db_version"), goose.WithDisableGlobalRegistry(true))
		Expect(err).NotTo(HaveOccurred())
		for _, version := range []int64{3, 5} {
			_, err = provider.DownTo(ctx, version-1)
			Expect(err).NotTo(HaveOccurred())
			holder := db.MustBeginTx(ctx, nil)
			DeferCleanup(func() { _ = holder.Rollback() })
			holder.MustExecContext(ctx, "LOCK TABLE outbox_events IN ACCESS SHARE MODE")

			Expect(postgres.Migrate(ctx, db.DB, quiet)).To(MatchError(And(
				ContainSubstring("another transaction holds a table"), ContainSubstring("version:%d", version))))
			Expect(postgres.CheckSchema(ctx, db.DB, quiet)).To(
				MatchError(&postgres.SchemaTooOldError{Have: version - 1, Need: newest}))

			Expect(holder.Rollback()).To(Succeed())
			Expect(postgres.Migrate(ctx, db.DB, quiet)).To(Succeed())
		}
	})

	It("is too old before it is migrated", func(ctx SpecContext) {
		err := postgres.CheckSchema(ctx, db.DB, quiet)
		tooOld, ok := errors.AsType[*postgres.SchemaTooOldError](err)
		Expect(ok).To(BeTrue(), "%v", err)
		Expect(*tooOld).To(Equal(postgres.SchemaTooOldError{Have: 0, Need: newest}))
		Expect(err).To(MatchError(And(
			ContainSubstring("needs version %d and found 0", newest), ContainSubstring("`api migrate`"))))
		Expect(postgres.CheckReady(ctx, db.DB)).To(MatchError(err.Error()))
	})

	It("is too old when a migration is missing", func(ctx SpecContext) {
		Expect(postgres.Migrate(ctx, db.DB, quiet)).To(Succeed())
		_, err := db.ExecContext(ctx, "DELETE FROM diehard_db_version WHERE version_id = $1", newest)
		Expect(err).NotTo(HaveOccurred())
		Expect(postgres.CheckSchema(ctx, db.DB, quiet)).To(
			MatchError(&postgres.SchemaTooOldError{Have: newest - 1, Need: newest}))
	})

	It("may be newer, which is logged, and is not touched then", func(ctx SpecContext) {
		Expect(postgres.Migrate(ctx, db.DB, quiet)).To(Succeed())
		_, err := db.ExecContext(ctx, "INSERT INTO diehard_db_version (version_id, is_applied) VALUES ($1, true)", newest+7)
		Expect(err).NotTo(HaveOccurred())

		log, lines := logs()
		Expect(postgres.CheckSchema(ctx, db.DB, log)).To(Succeed())
		Expect(lines).To(gbytes.Say(`level=WARN msg=".*newer.*" have=%d need=%d`, newest+7, newest))
		Expect(postgres.Migrate(ctx, db.DB, quiet)).To(Succeed())
		Expect(applied(ctx)).To(HaveLen(int(newest) + 1))
	})

	It("is ready when it can be written to", func(ctx SpecContext) {
		Expect(postgres.Migrate(ctx, db.DB, quiet)).To(Succeed())
		Expect(postgres.CheckReady(ctx, db.DB)).To(Succeed())

		standby := open(postgres.Options{DSN: dsn, Session: map[string]string{"default_transaction_read_only": "on"}})
		Expect(postgres.CheckReady(ctx, standby.DB)).To(MatchError(ContainSubstring("takes no writes")))
	})

	It("is not taken for old when the server does not answer", func(ctx SpecContext) {
		err := postgres.CheckSchema(ctx, open(postgres.Options{DSN: "postgres://u@127.0.0.1:1/d?sslmode=disable"}).DB, quiet)
		Expect(postgres.IsUnavailable(err)).To(BeTrue(), "%v", err)
	})
})
