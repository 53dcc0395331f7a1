package chaos_test

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// cluster is a primary with its replicas, each at its own port.
type cluster struct {
	settings map[string]string
	nodes    []*devstack.Postgres
	primary  int
}

const clusterSize = 3

// dsn returns the DSN of all nodes. Clients then find the primary by themselves.
func (c *cluster) dsn() string {
	GinkgoHelper()
	hosts := make([]string, len(c.nodes))
	for i, node := range c.nodes {
		hosts[i] = hostOf(node.DSN("diehard"))
	}
	u, err := url.Parse(c.nodes[0].DSN("diehard"))
	Expect(err).NotTo(HaveOccurred())
	u.Host = strings.Join(hosts, ",")
	return u.String()
}

func (c *cluster) open(i int) *sqlx.DB {
	GinkgoHelper()
	return testengines.OpenPostgres(c.nodes[i].DSN("diehard"), nil)
}

// replicas returns the indexes of all nodes but the primary.
func (c *cluster) replicas() (all []int) {
	for i := range c.nodes {
		if i != c.primary {
			all = append(all, i)
		}
	}
	return all
}

// synchronize makes the commits of the primary wait for one of the replicas.
func (c *cluster) synchronize(ctx context.Context) {
	GinkgoHelper()
	primary := c.open(c.primary)
	primary.MustExecContext(ctx, "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'")
	primary.MustExecContext(ctx, "SELECT pg_reload_conf()")
	Eventually(ctx, func(g Gomega) {
		var count int
		g.Expect(primary.Get(&count, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'")).To(Succeed())
		g.Expect(count).To(Equal(len(c.replicas())))
	}).WithTimeout(patience).Should(Succeed())
}

// failOver kills the primary and promotes the replica that has received the most. The
// other replica follows it.
func (c *cluster) failOver(ctx context.Context) (lost int) {
	GinkgoHelper()
	lost = c.primary
	Expect(c.nodes[lost].Kill()).To(Succeed())
	for _, i := range c.replicas() { // until they receive nothing more
		replica := c.open(i)
		Eventually(ctx, func(g Gomega) {
			var receiving bool
			g.Expect(replica.Get(&receiving, "SELECT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')")).To(Succeed())
			g.Expect(receiving).To(BeFalse())
		}).WithTimeout(patience).Should(Succeed())
	}
	most, received := -1, int64(-1)
	for _, i := range c.replicas() {
		var bytes int64
		Expect(c.open(i).Get(&bytes, "SELECT (coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0')::bigint")).To(Succeed())
		if bytes > received {
			most, received = i, bytes
		}
	}
	var promoted bool
	Expect(c.open(most).Get(&promoted, "SELECT pg_promote()")).To(Succeed())
	Expect(promoted).To(BeTrue())
	c.primary = most
	for _, i := range c.replicas() {
		if i != lost {
			follower := c.open(i)
			follower.MustExecContext(ctx, "ALTER SYSTEM SET primary_conninfo = '"+connInfo(c.nodes[most].DSN("diehard"))+"'")
			follower.MustExecContext(ctx, "SELECT pg_reload_conf()")
		}
	}
	return lost
}

// rejoin brings a lost primary back as a replica, at its port, with a copy of the data of
// the new primary.
func (c *cluster) rejoin(ctx context.Context, lost int) {
	GinkgoHelper()
	primary := c.nodes[c.primary]
	port, err := strconv.Atoi(hostOf(c.nodes[lost].DSN("diehard"))[len("127.0.0.1:"):])
	Expect(err).NotTo(HaveOccurred())
	c.nodes[lost] = startStandby(ctx, primary, primary.DSN("diehard"), devstack.PostgresOptions{Settings: c.settings, Port: port})
}

// createUser creates a user as soon as the API accepts it, and returns its id.
func createUser(ctx context.Context, apiURL, email string) (id string) {
	GinkgoHelper()
	Eventually(ctx, func(g Gomega) {
		a, err := system.Post(ctx, apiURL+"/v1/users", system.NewUser{Email: email})
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(a.Status).To(Equal(http.StatusCreated), "%v", a.Body)
		id, _ = a.Body["id"].(string)
	}).WithTimeout(patience).WithPolling(20 * time.Millisecond).Should(Succeed())
	return id
}

var _ = Describe("A primary with two replicas, under load", func() {
	DescribeTable("doubles no event in two failovers, and loses none that PostgreSQL has kept", func(ctx SpecContext, synchronous bool) {
		settings := map[string]string{"wal_keep_size": "256MB"}
		own := system.StartPrivate(ctx, devstack.PostgresOptions{Settings: settings}, devstack.ClickHouseOptions{})
		c := &cluster{settings: settings, nodes: []*devstack.Postgres{own.Postgres}}
		for len(c.nodes) < clusterSize {
			c.nodes = append(c.nodes, startStandby(ctx, own.Postgres, own.PostgresDSN, devstack.PostgresOptions{Settings: settings}))
		}
		if synchronous {
			c.synchronize(ctx)
		}
		s := system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)
		env := slices.Concat(brisk, []string{"DIEHARD_RELAY_LINGER=1ms", "DIEHARD_POSTGRES_DSN=" + c.dsn()})
		api := s.API(env...)
		for range 2 {
			s.Relay(s.ClickHouse.Native, env...)
		}
		users := createUsers(ctx, api, 500)
		// arrived returns whether the event of the user is in ClickHouse.
		arrived := func(g Gomega, id string) int {
			var events int
			g.Expect(testengines.Scan(ctx, own.ClickHouseDSNs.HTTP,
				"SELECT count() FROM event_log WHERE JSONExtractString(event_context, 'user_id') = '"+id+"'", &events)).To(Succeed())
			return events
		}
		for n := range 2 {
			users.awaitMore(ctx, 200)
			failed := time.Now()
			lost := c.failOver(ctx)
			id := createUser(ctx, api.URL(), fmt.Sprintf("after-failover-%d@example.com", n))
			accepted := time.Since(failed)
			Eventually(ctx, func(g Gomega) { g.Expect(arrived(g, id)).To(Equal(1)) }).WithTimeout(patience).WithPolling(100 * time.Millisecond).Should(Succeed())
			AddReportEntry("recovery", fmt.Sprintf("failover %d, synchronous %t: users are created again after %s, and their events arrive after %s",
				n+1, synchronous, accepted.Round(100*time.Millisecond), time.Since(failed).Round(100*time.Millisecond)))
			c.rejoin(ctx, lost)
			if synchronous {
				c.synchronize(ctx)
			}
		}
		users.awaitMore(ctx, 200)

		last := system.New(suite.Prepared(), c.nodes[c.primary].DSN("diehard"), own.ClickHouseDSNs)
		if synchronous {
			users.expectEach(ctx, last, outcome{Fault: "primary with synchronous replicas killed, and replaced", Done: "PostgreSQL, twice"})
			return
		}
		// Users that the API has acknowledged may be lost, with their events or without.
		users.stop()
		users.expectResponses()
		last.AwaitEmpty(ctx)
		rows, distinct := last.Arrived(ctx, Default)
		Expect(rows).To(Equal(distinct), "doubled")
		var kept, delivered []string
		Expect(last.Postgres.SelectContext(ctx, &kept, "SELECT id::text FROM users")).To(Succeed())
		Expect(testengines.Scan(ctx, own.ClickHouseDSNs.HTTP, "SELECT groupArray(JSONExtractString(event_context, 'user_id')) FROM event_log", &delivered)).To(Succeed())
		Expect(missing(kept, delivered)).To(BeEmpty(), "lost, although PostgreSQL has the user")
		acknowledged := slices.Collect(maps.Keys(users.created))
		AddReportEntry("asynchronous", fmt.Sprintf("%d users acknowledged, of which PostgreSQL has lost %d; %d events, none doubled",
			len(acknowledged), len(missing(acknowledged, kept)), rows))
	},
		Entry("with synchronous replicas", true),
		Entry("with asynchronous replicas", false),
	)
})

// missing returns the ids that are not in there.
func missing(ids, there []string) (absent []string) {
	has := make(map[string]bool, len(there))
	for _, id := range there {
		has[id] = true
	}
	return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return has[id] })
}
