package devstack_test

import (
	"context"
	"database/sql"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"time"

	_ "github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

const patience = time.Minute

var _ = Describe("PostgreSQL", func() {
	start := func(ctx context.Context, o devstack.PostgresOptions) *devstack.Postgres {
		GinkgoHelper()
		p, err := devstack.StartPostgres(ctx, o)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(p.Stop)
		return p
	}
	connect := func(dsn string) *sql.DB {
		GinkgoHelper()
		db, err := sql.Open("postgres", dsn)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(db.Close)
		return db
	}

	It("starts, keeps data after a kill, and stops", func(ctx SpecContext) {
		p := start(ctx, devstack.PostgresOptions{})
		dsn, err := p.CreateDatabase(ctx, "one")
		Expect(err).NotTo(HaveOccurred())
		db := connect(dsn)
		_, err = db.ExecContext(ctx, "CREATE TABLE t AS SELECT 1 AS n")
		Expect(err).NotTo(HaveOccurred())
		Expect(p.Kill()).To(Succeed())
		Expect(p.Done()).To(BeClosed())
		Expect(p.Start(ctx)).To(Succeed())
		var n int
		Eventually(func() error { return db.QueryRowContext(ctx, "SELECT n FROM t").Scan(&n) }).WithTimeout(patience).Should(Succeed())
		Expect(n).To(Equal(1))

		By("refusing a second database with the same name, and a wrong password")
		_, err = p.CreateDatabase(ctx, "one")
		Expect(err).To(MatchError(ContainSubstring("already exists")))
		Expect(connect(wrongPassword(dsn)).PingContext(ctx)).To(MatchError(ContainSubstring("password authentication failed")))
	})

	It("keeps the caller's data folder, and a second server refuses to use it", func(ctx SpecContext) {
		dir := filepath.Join(GinkgoT().TempDir(), "with a space")
		first := start(ctx, devstack.PostgresOptions{DataDir: dir, Durable: true})
		db := connect(first.DSN("postgres"))
		var fsync string
		Expect(db.QueryRowContext(ctx, "SHOW fsync").Scan(&fsync)).To(Succeed())
		Expect(fsync).To(Equal("on"))
		_, err := db.ExecContext(ctx, "CREATE TABLE t AS SELECT 1 AS n")
		Expect(err).NotTo(HaveOccurred())

		_, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{DataDir: dir})
		Expect(err).To(MatchError(ContainSubstring(fmt.Sprintf("%s is in use by the server with process id %d", dir, first.PID()))))

		Expect(first.Stop()).To(Succeed())
		again := start(ctx, devstack.PostgresOptions{DataDir: dir})
		var n int
		Expect(connect(again.DSN("postgres")).QueryRowContext(ctx, "SELECT n FROM t").Scan(&n)).To(Succeed())
	})

	It("reports that the chosen port is taken", func(ctx SpecContext) {
		taken, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(taken.Close)
		_, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{Port: portOf(taken)})
		Expect(err).To(MatchError(ContainSubstring("the port is taken: " + taken.Addr().String())))
	})

	It("uses the programs in DIEHARD_DEV_POSTGRES_BIN", Serial, func(ctx SpecContext) {
		GinkgoT().Setenv("DIEHARD_DEV_POSTGRES_BIN", GinkgoT().TempDir())
		_, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{})
		Expect(err).To(MatchError(And(ContainSubstring("DIEHARD_DEV_POSTGRES_BIN"), ContainSubstring("initdb"))))
	})
})

func wrongPassword(dsn string) string {
	GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	u.User = url.UserPassword(u.User.Username(), "guess")
	return u.String()
}

func portOf(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }
