package devstack_test

import (
	"context"
	"database/sql"
	"net"
	"path/filepath"

	_ "github.com/ClickHouse/clickhouse-go/v2"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

var _ = Describe("ClickHouse", func() {
	start := func(ctx context.Context, o devstack.ClickHouseOptions) *devstack.ClickHouse {
		GinkgoHelper()
		o.Log = GinkgoWriter
		c, err := devstack.StartClickHouse(ctx, o)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(c.Stop)
		return c
	}
	connect := func(dsn string) *sql.DB {
		GinkgoHelper()
		db, err := sql.Open("clickhouse", dsn)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(db.Close)
		return db
	}

	It("keeps acknowledged rows and its ports after a kill", func(ctx SpecContext) {
		c := start(ctx, devstack.ClickHouseOptions{User: "diehard", Password: "s3cret"})
		Expect(c.CreateDatabase(ctx, "one")).To(Succeed())
		for _, dsn := range []string{c.NativeDSN("one"), c.HTTPDSN("one")} {
			db := connect(dsn)
			_, err := db.ExecContext(ctx, "CREATE OR REPLACE TABLE t ENGINE = MergeTree ORDER BY n AS SELECT 1 AS n")
			Expect(err).NotTo(HaveOccurred())
			Expect(c.Kill()).To(Succeed())
			Expect(c.Done()).To(BeClosed())
			Expect(c.Start(ctx)).To(Succeed())
			var n int
			Eventually(func() error { return db.QueryRowContext(ctx, "SELECT n FROM t").Scan(&n) }).WithTimeout(patience).Should(Succeed())
			Expect(n).To(Equal(1))
			Expect(connect(wrongPassword(dsn)).PingContext(ctx)).To(MatchError(ContainSubstring("516")))
		}
	})

	It("keeps the caller's data folder, and a second server refuses to use it", func(ctx SpecContext) {
		dir := filepath.Join(GinkgoT().TempDir(), "with a space")
		first := start(ctx, devstack.ClickHouseOptions{DataDir: dir})
		_, err := connect(first.HTTPDSN("default")).ExecContext(ctx, "CREATE TABLE t ENGINE = MergeTree ORDER BY n AS SELECT 1 AS n")
		Expect(err).NotTo(HaveOccurred())

		_, err = devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{DataDir: dir})
		Expect(err).To(MatchError(ContainSubstring(dir + " is in use by another ClickHouse")))

		Expect(first.Stop()).To(Succeed())
		var n int
		again := start(ctx, devstack.ClickHouseOptions{DataDir: dir})
		Expect(connect(again.NativeDSN("default")).QueryRowContext(ctx, "SELECT n FROM t").Scan(&n)).To(Succeed())
	})

	It("reports that the chosen port is taken", func(ctx SpecContext) {
		taken, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(taken.Close)
		_, err = devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{NativePort: portOf(taken)})
		Expect(err).To(MatchError(And(ContainSubstring(taken.Addr().String()), ContainSubstring("address already in use"))))
	})
})
