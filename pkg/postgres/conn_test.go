package postgres_test

import (
	"context"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("A server that stops responding", func() {
	const statement = "SELECT 1"

	var (
		proxy   *faults.Proxy
		through string // the DSN of the proxy
		db      *sqlx.DB
	)

	BeforeEach(func(ctx SpecContext) {
		proxy, through = faults.StartProxyTo(root)
		db = open(postgres.Options{DSN: through, MaxOpenConns: 1})
		Expect(db.PingContext(ctx)).To(Succeed())
	})

	// expectAbandoned expects do to return an error while the server is silent. It
	// expects the pool to work again when the server responds.
	expectAbandoned := func(ctx context.Context, do func(context.Context) error) {
		GinkgoHelper()
		failed := make(chan error, 1)
		limited, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		go func() { failed <- do(limited) }()
		var err error
		Eventually(ctx, failed).WithTimeout(time.Minute).Should(Receive(&err))
		Expect(postgres.IsUnavailable(err)).To(BeTrue(), "%v", err)
		proxy.Return()
		Eventually(ctx, func() error { _, err := db.ExecContext(ctx, statement); return err }).Should(Succeed())
	}

	It("does not block a statement after its context ends", func(ctx SpecContext) {
		proxy.Vanish()
		expectAbandoned(ctx, func(ctx context.Context) error {
			_, err := db.ExecContext(ctx, statement)
			return err
		})
	})

	It("does not block a query after its context ends", func(ctx SpecContext) {
		proxy.Vanish()
		expectAbandoned(ctx, func(ctx context.Context) error {
			var n int
			return db.GetContext(ctx, &n, statement)
		})
	})

	It("does not block BEGIN after its context ends", func(ctx SpecContext) {
		proxy.Vanish()
		expectAbandoned(ctx, func(ctx context.Context) error {
			return postgres.InTx(ctx, db, func(*sqlx.Tx) error { return nil })
		})
	})

	It("does not block a transaction after its context ends, even if the statement's context does not", func(ctx SpecContext) {
		expectAbandoned(ctx, func(limited context.Context) error {
			return postgres.InTx(limited, db, func(tx *sqlx.Tx) error {
				proxy.Vanish()
				_, err := tx.ExecContext(ctx, statement)
				return err
			})
		})
	})

	It("does not block a commit after the transaction's context ends, and the outcome is unknown", func(ctx SpecContext) {
		proxy.HoldFrom(faults.Answers, "COMMIT\x00") // the NUL excludes READ COMMITTED
		limited, cancel := context.WithCancel(ctx)
		defer cancel()
		failed := make(chan error, 1)
		go func() { failed <- postgres.InTx(limited, db, func(*sqlx.Tx) error { return nil }) }()
		Eventually(ctx, proxy.Held).ShouldNot(BeZero())
		cancel()
		Eventually(ctx, failed).WithTimeout(time.Minute).Should(Receive(MatchError(postgres.ErrOutcomeUnknown)))
	})

	It("does not block connecting after its context ends", func(ctx SpecContext) {
		Expect(db.Close()).To(Succeed())
		db = open(postgres.Options{DSN: through + "&connect_timeout=3600", MaxOpenConns: 1})
		proxy.Vanish()
		expectAbandoned(ctx, db.PingContext)
	})

	It("keeps a connection that was returned before the grace period ended", func(ctx SpecContext) {
		var before, after int
		limited, cancel := context.WithCancel(ctx)
		defer cancel()
		connection, err := db.Connx(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(connection.GetContext(limited, &before, "SELECT pg_backend_pid()")).To(Succeed())
		cancel()
		Expect(connection.Close()).To(Succeed())
		Consistently(ctx, func(g Gomega) {
			g.Expect(db.GetContext(ctx, &after, "SELECT pg_backend_pid()")).To(Succeed())
			g.Expect(after).To(Equal(before))
		}).WithTimeout(2 * time.Second).Should(Succeed())
	})
})
