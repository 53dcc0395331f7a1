package postgres_test

import (
	"context"
	"database/sql"
	"errors"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("InTx", func() {
	var db *sqlx.DB

	BeforeEach(func(ctx SpecContext) {
		db = open(postgres.Options{DSN: newDatabase(ctx)})
		_, err := db.ExecContext(ctx, "CREATE TABLE things (id int PRIMARY KEY)")
		Expect(err).NotTo(HaveOccurred())
	})

	insert := func(ctx context.Context, tx *sqlx.Tx) {
		GinkgoHelper()
		_, err := tx.ExecContext(ctx, "INSERT INTO things VALUES (1)")
		Expect(err).NotTo(HaveOccurred())
	}
	count := func(ctx context.Context) (n int) {
		GinkgoHelper()
		Expect(db.GetContext(ctx, &n, "SELECT count(*) FROM things")).To(Succeed())
		return n
	}
	// atCommit makes the server run the statement when a transaction with an insert
	// commits.
	atCommit := func(ctx context.Context, statement string) {
		GinkgoHelper()
		_, err := db.ExecContext(ctx, `
			CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN `+statement+`; RETURN NULL; END $$;
			CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON things
			DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()`)
		Expect(err).NotTo(HaveOccurred())
	}

	It("commits", func(ctx SpecContext) {
		Expect(postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			insert(ctx, tx)
			return nil
		})).To(Succeed())
		Expect(count(ctx)).To(Equal(1))
	})

	It("rolls back and returns the error of the function", func(ctx SpecContext) {
		failure := errors.New("on purpose")
		Expect(postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			insert(ctx, tx)
			return failure
		})).To(BeIdenticalTo(failure))
		Expect(count(ctx)).To(BeZero())
	})

	It("rolls back when the function panics", func(ctx SpecContext) {
		Expect(func() {
			_ = postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
				insert(ctx, tx)
				panic("on purpose")
			})
		}).To(PanicWith("on purpose"))
		Expect(count(ctx)).To(BeZero())
		Expect(db.Stats().InUse).To(BeZero())
	})

	It("uses READ COMMITTED even if the server has another default", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: root, Session: map[string]string{"default_transaction_isolation": "serializable"}})
		Expect(postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			Expect(show(ctx, tx, "transaction_isolation")).To(Equal("read committed"))
			return nil
		})).To(Succeed())
	})

	It("reports an unknown outcome if the connection is lost during the commit", func(ctx SpecContext) {
		atCommit(ctx, "PERFORM pg_terminate_backend(pg_backend_pid())")
		err := postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			insert(ctx, tx)
			return nil
		})
		Expect(err).To(MatchError(postgres.ErrOutcomeUnknown))
		Expect(postgres.IsUnavailable(err)).To(BeTrue())
	})

	It("reports a known outcome if the server refuses the commit", func(ctx SpecContext) {
		atCommit(ctx, "RAISE 'on purpose'")
		err := postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			insert(ctx, tx)
			return nil
		})
		Expect(err).To(MatchError(ContainSubstring("on purpose")))
		Expect(err).NotTo(MatchError(postgres.ErrOutcomeUnknown))
		Expect(count(ctx)).To(BeZero())
	})

	It("reports a known outcome if the context ends before the commit", func(ctx SpecContext) {
		canceled, cancel := context.WithCancel(ctx)
		defer cancel()
		err := postgres.InTx(canceled, db, func(tx *sqlx.Tx) error {
			insert(ctx, tx)
			cancel()
			return nil
		})
		Expect(err).To(HaveOccurred())
		Expect(err).NotTo(MatchError(postgres.ErrOutcomeUnknown))
		Expect(count(ctx)).To(BeZero())
	})
})

var _ = Describe("A transaction", func() {
	It("has the requested options, even after other transactions on its connection", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: root, MaxOpenConns: 1})
		for range 3 { // with BeginTx of lib/pq, the third one fails
			for isolation, shown := range map[sql.IsolationLevel]string{
				sql.LevelDefault: "read committed", sql.LevelReadCommitted: "read committed",
				sql.LevelRepeatableRead: "repeatable read", sql.LevelSerializable: "serializable",
			} {
				for readOnly, setting := range map[bool]string{false: "off", true: "on"} {
					tx, err := db.BeginTxx(ctx, &sql.TxOptions{Isolation: isolation, ReadOnly: readOnly})
					Expect(err).NotTo(HaveOccurred())
					var is struct {
						Isolation string `db:"isolation"`
						ReadOnly  string `db:"read_only"`
					}
					Expect(tx.GetContext(ctx, &is, `SELECT current_setting('transaction_isolation') AS isolation,
						current_setting('transaction_read_only') AS read_only`)).To(Succeed())
					Expect(is.Isolation).To(Equal(shown))
					Expect(is.ReadOnly).To(Equal(setting))
					Expect(tx.Rollback()).To(Succeed())
				}
			}
		}
		_, err := db.BeginTxx(ctx, &sql.TxOptions{Isolation: sql.LevelSnapshot})
		Expect(err).To(MatchError(ContainSubstring("Snapshot")))
	})
})
