package devstack_test

import (
	"context"
	"database/sql"

	_ "github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

var _ = Describe("PostgreSQL", func() {
	It("starts, keeps data over a kill, and stops", func(ctx context.Context) {
		p, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(p.Stop)
		dsn, err := p.CreateDatabase(ctx, "one")
		Expect(err).NotTo(HaveOccurred())
		db, err := sql.Open("postgres", dsn)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(db.Close)
		_, err = db.ExecContext(ctx, "CREATE TABLE t AS SELECT 1 AS n")
		Expect(err).NotTo(HaveOccurred())
		Expect(p.Kill()).To(Succeed())
		Expect(p.Done()).To(BeClosed())
		Expect(p.Start(ctx)).To(Succeed())
		var n int
		Eventually(func() error { return db.QueryRowContext(ctx, "SELECT n FROM t").Scan(&n) }).Should(Succeed())
		Expect(n).To(Equal(1))
	})
})
