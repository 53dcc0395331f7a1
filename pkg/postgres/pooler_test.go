package postgres_test

import (
	"context"
	"database/sql"
	"errors"
	"syscall"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("Behind PgBouncer in transaction mode", func() {
	var (
		direct, through string
		db              *sqlx.DB
	)

	// The pooler has one session for all clients.
	BeforeEach(func(ctx SpecContext) {
		direct = newDatabase(ctx)
		through = testengines.StartPgBouncer(ctx, direct, 1)
		db = open(postgres.Options{DSN: through, Session: map[string]string{"lock_timeout": "1234ms", "synchronous_commit": "off"}, KeepStatements: true})
	})

	setting := func(ctx context.Context, name string) (value string) {
		GinkgoHelper()
		Expect(postgres.InSession(ctx, db, func(s postgres.Session) error {
			return sqlx.GetContext(ctx, s, &value, "SELECT current_setting($1)", name)
		})).To(Succeed())
		return value
	}

	It("is known", func(ctx SpecContext) {
		Expect(postgres.IsPooled(ctx, db)).To(BeTrue())
		Expect(postgres.IsPooled(ctx, open(postgres.Options{DSN: direct, Session: map[string]string{"lock_timeout": "1234ms"}}))).To(BeFalse())
	})

	It("gives single statements and transactions the settings, and keeps them from other clients", func(ctx SpecContext) {
		open(postgres.Options{DSN: direct}).MustExecContext(ctx,
			"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', current_database()); END $$")
		other := open(postgres.Options{DSN: through})
		Expect(show(ctx, other, "lock_timeout")).To(Equal("0"))
		Expect(setting(ctx, "lock_timeout")).To(Equal("1234ms"))
		Expect(setting(ctx, "transaction_isolation")).To(Equal("read committed"))
		Expect(postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			Expect(show(ctx, tx, "synchronous_commit")).To(Equal("off"))
			return nil
		})).To(Succeed())
		Expect(show(ctx, other, "lock_timeout")).To(Equal("0"))
		Expect(show(ctx, other, "synchronous_commit")).To(Equal("on"))
		Expect(show(ctx, other, "default_transaction_isolation")).To(Equal("serializable"))
	})

	It("keeps no statement prepared", func(ctx SpecContext) {
		for range 3 {
			setting(ctx, "lock_timeout")
		}
		var names []string
		Expect(db.SelectContext(ctx, &names, "SELECT name FROM pg_prepared_statements")).To(Succeed())
		Expect(names).To(BeEmpty())
	})

	It("commits a statement without rows, and no statement that has failed", func(ctx SpecContext) {
		db.MustExecContext(ctx, "CREATE TABLE things (id int PRIMARY KEY)")
		insert := func(statement string) error {
			var id int
			return postgres.InSession(ctx, db, func(s postgres.Session) error { return sqlx.GetContext(ctx, s, &id, statement) })
		}
		Expect(insert("WITH new AS (INSERT INTO things VALUES (1) RETURNING id) SELECT id FROM new WHERE id = 2")).To(MatchError(sql.ErrNoRows))
		Expect(insert("INSERT INTO things VALUES (2), (1) RETURNING id")).To(MatchError(ContainSubstring("duplicate key")))
		var ids []int
		Expect(db.SelectContext(ctx, &ids, "SELECT id FROM things")).To(Succeed())
		Expect(ids).To(Equal([]int{1}))
	})

	It("returns the error of the commit", func(ctx SpecContext) {
		db.MustExecContext(ctx, "CREATE TABLE things (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
		db.MustExecContext(ctx, "INSERT INTO things VALUES (1)")
		var id int
		Expect(postgres.InSession(ctx, db, func(s postgres.Session) error {
			return sqlx.GetContext(ctx, s, &id, "INSERT INTO things VALUES (1) RETURNING id")
		})).To(MatchError(And(HavePrefix("commit: "), ContainSubstring("duplicate key"))))
		var things int
		Expect(db.GetContext(ctx, &things, "SELECT count(*) FROM things")).To(Succeed())
		Expect(things).To(Equal(1))
	})

	// PgBouncer 1.18 can crash when a client cancels a statement:
	// https://github.com/pgbouncer/pgbouncer/issues/801.
	It("does not bring the pooler down by statements whose contexts end", func(ctx SpecContext) {
		through := testengines.StartPgBouncer(ctx, direct, 8)
		busy := open(postgres.Options{DSN: through, MaxOpenConns: 40, Session: map[string]string{"lock_timeout": "1234ms"}})
		var group errgroup.Group
		group.SetLimit(40)
		for i := range 3000 {
			group.Go(func() error {
				statement, cancel := context.WithCancel(ctx)
				defer cancel()
				time.AfterFunc(time.Duration(i%20)*500*time.Microsecond, cancel)
				_, err := busy.ExecContext(statement, "SELECT pg_sleep(0.005)")
				if errors.Is(err, syscall.ECONNREFUSED) {
					return err
				}
				return nil
			})
		}
		Expect(group.Wait()).To(Succeed())
		Expect(open(postgres.Options{DSN: through}).PingContext(ctx)).To(Succeed())
	})

	It("does not listen, and says so once", func(ctx SpecContext) {
		log, lines := logs()
		states := make(chan bool, 10)
		_, err := postgres.Listen(ctx, postgres.ListenOptions{DSN: through, Channels: []string{"one", "two"}, Log: log, Changed: func(listening bool) { states <- listening }})
		Expect(err).NotTo(HaveOccurred())
		Eventually(lines).Should(gbytes.Say(`level=WARN msg="postgresql notifications unavailable behind a pooler, polling" hint="set postgres.listen_dsn to the address of the server"`))
		Eventually(states).Should(Receive(BeFalse()))
		var channels []string
		Expect(db.SelectContext(ctx, &channels, "SELECT pg_listening_channels()")).To(Succeed())
		Expect(channels).To(BeEmpty(), "the session belongs to all clients")
	})
})
