package chaos_test

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

var _ = Describe("A failover of PostgreSQL", func() {
	DescribeTable("to a replica that lacks the last commits loses and doubles no event that the replica has", func(ctx SpecContext, hidden bool) {
		settings := map[string]string{"wal_keep_size": "256MB"}
		own := system.StartPrivate(ctx, devstack.PostgresOptions{Settings: settings}, devstack.ClickHouseOptions{})
		s := system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)
		if hidden {
			testengines.HideTimeline(ctx, s.Postgres)
		}
		replication, replicationDSN := faults.StartProxyTo(own.PostgresDSN)
		standby := startStandby(ctx, own.Postgres, replicationDSN, devstack.PostgresOptions{Settings: settings})
		replica := testengines.OpenPostgres(standby.DSN("diehard"), nil)

		clientsProxy, through := faults.StartProxyTo(own.PostgresDSN)
		env := slices.Concat(small, brisk, []string{"DIEHARD_POSTGRES_DSN=" + through})
		api := s.API(env...)
		relay := s.Relay(s.ClickHouse.Native, env...)
		Expect(s.Publish(ctx, system.Events(500)...)).To(Succeed())
		s.AwaitEmpty(ctx)
		relay.Stop()

		By("replicating 300 more events, and then stopping replication")
		Expect(s.Publish(ctx, system.Events(300)...)).To(Succeed())
		Eventually(ctx, func(g Gomega) {
			var there int
			g.Expect(replica.Get(&there, "SELECT count(*) FROM outbox_events")).To(Succeed())
			g.Expect(there).To(Equal(300))
		}).WithTimeout(patience).Should(Succeed())
		replication.Down()

		By("delivering these 300 events, and 200 events that the replica lacks")
		Expect(s.Publish(ctx, system.Events(200)...)).To(Succeed())
		relay = s.Relay(s.ClickHouse.Native, env...)
		s.AwaitEmpty(ctx)

		By("losing the primary before the replica is promoted")
		Expect(own.Postgres.Kill()).To(Succeed())
		clientsProxy.Lead(hostOf(standby.DSN("diehard")))
		clientsProxy.Reset()
		a, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "ada@example.com"})
		Expect(err).NotTo(HaveOccurred())
		Expect(a.Status).To(Equal(http.StatusServiceUnavailable), "%v", a.Body)
		if hidden { // a relay that was restarted remembers no cuts
			relay.Kill()
			relay = s.LaunchRelay(s.ClickHouse.Native, env...)
		}
		awaitNotReady(ctx, relay)

		By("promoting the replica")
		fault := "failover to a replica that lacks 200 events and the cuts of 300"
		if hidden {
			fault += ", on a server that does not show its timeline"
		}
		var promoted bool
		Expect(replica.Get(&promoted, "SELECT pg_promote()")).To(Succeed())
		Expect(promoted).To(BeTrue())
		after := system.New(suite.Prepared(), standby.DSN("diehard"), own.ClickHouseDSNs)
		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		Expect(after.Publish(ctx, system.Events(99)...)).To(Succeed())
		expectOnce(ctx, after, outcome{
			Fault: fault, Done: "PostgreSQL", Events: 1100,
		})
		awaitMessage(ctx, relay, "resolving all batches")
		awaitReady(ctx, relay)
	},
		Entry("on a server that shows its timeline", false),
		Entry("on a server that does not show its timeline, to a relay that was restarted", true),
	)
})

var _ = Describe("A claim during which PostgreSQL fails over", func() {
	DescribeTable("is not treated as the first attempt", func(ctx SpecContext, noticed bool) {
		s := newSystem(ctx)
		Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
		env := slices.Concat(small, brisk)
		relay := s.LaunchRelay(s.ClickHouse.Native, append(env, fmt.Sprintf("FAILPOINT=%s=stop", failpoint.ClaimMarked))...)
		awaitMessage(ctx, relay, "failpoint reached")
		// Another attempt of the batch has left its token in ClickHouse without the
		// rows. The replica has no record of that attempt.
		loseRows(ctx, s)
		s.Postgres.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
		if noticed {
			// The relay may have noticed the failover before it stopped. If it has
			// stopped with a lock on the cursor, this cut fails until PostgreSQL ends
			// the relay's session.
			other := store.New(s.Postgres, store.Options{FlushTimeout: time.Second})
			Eventually(ctx, func(g Gomega) {
				_, _ = other.Cut(ctx, 0)
				var timeline string
				g.Expect(s.Postgres.Get(&timeline, "SELECT timeline FROM outbox_history")).To(Succeed())
				g.Expect(timeline).NotTo(Equal("00000000"))
			}).WithTimeout(patience).Should(Succeed())
		}
		relay.Signal(syscall.SIGCONT)
		expectOnce(ctx, s, outcome{Fault: "failover during a claim, another worker's attempt lost", Done: "PostgreSQL", Events: perBatch})
	},
		Entry("before the failover is noticed", false),
		Entry("after the failover is noticed", true),
	)
})

// startStandby starts a server on a copy of the primary's data that replicates
// the primary at the DSN. It uses a data folder of its own.
func startStandby(ctx context.Context, primary *devstack.Postgres, primaryDSN string, o devstack.PostgresOptions) *devstack.Postgres {
	GinkgoHelper()
	dir, err := os.MkdirTemp("", "diehard-standby-*")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(os.RemoveAll, dir)
	Expect(os.Chmod(dir, 0o755)).To(Succeed()) //nolint:gosec // the server may run as another user
	copied := filepath.Join(dir, "data")

	session, err := testengines.OpenPostgres(primary.DSN("postgres"), nil).Connx(ctx)
	Expect(err).NotTo(HaveOccurred())
	defer session.Close()
	_, err = session.ExecContext(ctx, "SELECT pg_backup_start('standby', true)")
	Expect(err).NotTo(HaveOccurred())
	output, err := exec.CommandContext(ctx, "cp", "-a", primary.DataDir(), copied).CombinedOutput() //nolint:gosec // our own folders
	Expect(err).NotTo(HaveOccurred(), "%s", output)
	var label string
	Expect(session.GetContext(ctx, &label, "SELECT labelfile FROM pg_backup_stop(false)")).To(Succeed())

	folder, err := os.Stat(copied)
	Expect(err).NotTo(HaveOccurred())
	owner, ok := folder.Sys().(*syscall.Stat_t)
	Expect(ok).To(BeTrue())
	Expect(os.Remove(filepath.Join(copied, "postmaster.pid"))).To(Succeed())
	for name, content := range map[string]string{
		"backup_label":         label,
		"standby.signal":       "",
		"postgresql.auto.conf": "primary_conninfo = '" + connInfo(primaryDSN) + "'\n",
	} {
		path := filepath.Join(copied, name)
		Expect(os.WriteFile(path, []byte(content), 0o600)).To(Succeed())
		Expect(os.Chown(path, int(owner.Uid), int(owner.Gid))).To(Succeed())
	}
	o.DataDir = copied
	standby, err := devstack.StartPostgres(ctx, o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(standby.Stop()).To(Succeed()) })
	return standby
}

// connInfo returns the DSN in the form of primary_conninfo.
func connInfo(dsn string) string {
	GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	password, _ := u.User.Password()
	return fmt.Sprintf("host=%s port=%s user=%s password=%s sslmode=disable", u.Hostname(), u.Port(), u.User.Username(), password)
}

func hostOf(dsn string) string {
	GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	return u.Host
}
