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

var _ = Describe("A server that falls silent", func() {
	const statement = "SELECT 1"

	var (
		proxy   *faults.Proxy
		through string // the DSN that leads through it
		db      *sqlx.DB
	)

	BeforeEach(func(ctx SpecContext) {
		proxy, through = faults.StartProxyTo(root)
		db = open(postgres.Options{DSN: through, MaxOpenConns: 1})
		Expect(db.PingContext(ctx)).To(Succeed())
	})

	// expectGivenUp expects that what is done while the server is silent ends,
	// though the server stays so, and that the pool works when it no longer is.
	expectGivenUp := func(ctx context.Context, do func(context.Context) error) {
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

	It("is not waited for in a statement beyond its context", func(ctx SpecContext) {
		proxy.Vanish()
		expectGivenUp(ctx, func(ctx context.Context) error {
			_, err := db.ExecContext(ctx, statement)
			return err
		})
	})

	It("is not waited for in a query beyond its context", func(ctx SpecContext) {
		proxy.Vanish()
		expectGivenUp(ctx, func(ctx context.Context) error {
			var n int
			return db.GetContext(ctx, &n, statement)
		})
	})

	It("is not waited for at the begin of a transaction beyond its context", func(ctx SpecContext) {
		proxy.Vanish()
		expectGivenUp(ctx, func(ctx context.Context) error {
			return postgres.InTx(ctx, db, func(*sqlx.Tx) error { return nil })
		})
	})

	It("is not waited for in a transaction beyond its context, whatever the statement's", func(ctx SpecContext) {
		expectGivenUp(ctx, func(limited context.Context) error {
			return postgres.InTx(limited, db, func(tx *sqlx.Tx) error {
				proxy.Vanish()
				_, err := tx.ExecContext(ctx, statement)
				return err
			})
		})
	})

	It("is not waited for in a commit beyond the transaction's context, and the outcome is unknown", func(ctx SpecContext) {
		proxy.HoldFrom(faults.Answers, "COMMIT\x00") // BEGIN says READ COMMITTED
		limited, cancel := context.WithCancel(ctx)
		defer cancel()
		failed := make(chan error, 1)
		go func() { failed <- postgres.InTx(limited, db, func(*sqlx.Tx) error { return nil }) }()
		Eventually(ctx, proxy.Held).ShouldNot(BeZero())
		cancel()
		Eventually(ctx, failed).WithTimeout(time.Minute).Should(Receive(MatchError(postgres.ErrOutcomeUnknown)))
	})

	It("is not waited for in the making of a connection beyond its context", func(ctx SpecContext) {
		Expect(db.Close()).To(Succeed())
		db = open(postgres.Options{DSN: through + "&connect_timeout=3600", MaxOpenConns: 1})
		proxy.Vanish()
		expectGivenUp(ctx, db.PingContext)
	})

	It("is not given up where the connection was given back in time", func(ctx SpecContext) {
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
