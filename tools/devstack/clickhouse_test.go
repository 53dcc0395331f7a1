package devstack_test

import (
	"context"
	"database/sql"

	_ "github.com/ClickHouse/clickhouse-go/v2"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

var _ = Describe("ClickHouse", func() {
	It("keeps what was acknowledged over a kill", func(ctx context.Context) {
		c, err := devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{Log: GinkgoWriter, User: "diehard", Password: "s3cret"})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(c.Stop)
		Expect(c.CreateDatabase(ctx, "one")).To(Succeed())
		for _, dsn := range []string{c.NativeDSN("one"), c.HTTPDSN("one")} {
			db, err := sql.Open("clickhouse", dsn)
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(db.Close)
			_, err = db.ExecContext(ctx, "CREATE OR REPLACE TABLE t ENGINE = MergeTree ORDER BY n AS SELECT 1 AS n")
			Expect(err).NotTo(HaveOccurred())
			Expect(c.Kill()).To(Succeed())
			Expect(c.Done()).To(BeClosed())
			Expect(c.Start(ctx)).To(Succeed())
			var n int
			Eventually(func() error { return db.QueryRowContext(ctx, "SELECT n FROM t").Scan(&n) }).Should(Succeed())
			Expect(n).To(Equal(1))
		}
	})
})
