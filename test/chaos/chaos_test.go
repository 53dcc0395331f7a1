package chaos_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// chaosDuration is the duration of the chaos. If it is not set, the chaos ends after
// chaosFaults faults. The run's seed determines the faults.
var chaosDuration, _ = time.ParseDuration(os.Getenv("DIEHARD_CHAOS_DURATION"))

const (
	chaosRelays = 4
	chaosFaults = 20 // the number of faults if no duration is set
	// A publisher inserts chaosEvents events in a transaction, chaosPace times a second.
	chaosEvents, chaosPace = 100, 40
)

// chaos is a system with random faults.
type chaos struct {
	*system.System
	own                        *system.Private
	random                     *rand.Rand
	postgres, native, http     *faults.Proxy
	throughPostgres            string
	throughNative, throughHTTP string
	api                        *programs.Process
	relays                     [chaosRelays]*programs.Process
	users                      *clients
	attempts                   atomic.Int64 // attempts to publish
	stopPublishing             func()
	happened                   map[string]int
}

var _ = Describe("Chaos", Serial, Label("long"), func() {
	It("loses and doubles no event", func(ctx SpecContext) {
		c := newChaos(ctx)
		kinds := c.kinds()
		began, next := time.Now(), 0
		order := c.random.Perm(len(kinds))
		for n := 0; n < chaosFaults || time.Since(began) < chaosDuration; n++ {
			if next == len(order) {
				order, next = c.random.Perm(len(kinds)), 0
			}
			kind := kinds[order[next]]
			next++
			By(kind.name)
			c.happened[kind.name]++
			kind.happen(ctx)
			c.last(ctx, 20)
			c.restartEnded()
		}

		By("removing all faults")
		c.users.stop()
		c.stopPublishing()
		for _, relay := range c.relays {
			awaitReady(ctx, relay)
		}
		c.AwaitEmpty(ctx)
		var published, bad, created int
		Expect(c.Postgres.Get(&published, "SELECT count(*) FROM ledger")).To(Succeed())
		Expect(c.Postgres.Get(&bad, "SELECT count(*) FROM ledger WHERE bad")).To(Succeed())
		Expect(c.Postgres.Get(&created, "SELECT count(*) FROM users")).To(Succeed())
		faultsInAll := 0
		for _, times := range c.happened {
			faultsInAll += times
		}
		AddReportEntry("chaos", ReportEntryVisibilityAlways, fmt.Sprintf("seed %d: %d events and %d users, %d faults in %s: %v",
			GinkgoRandomSeed(), published, created, faultsInAll, time.Since(began).Round(time.Second), c.happened))
		for id, email := range c.users.created {
			var there bool
			Expect(c.Postgres.Get(&there, "SELECT EXISTS (SELECT FROM users WHERE id = $1)", id)).To(Succeed())
			Expect(there).To(BeTrue(), "the response for %s had the status 201", email)
		}
		expectOnce(ctx, c.System, outcome{
			Fault: fmt.Sprintf("%d random faults of %d kinds", faultsInAll, len(c.happened)),
			Done:  fmt.Sprintf("%d relays, an API and their databases", chaosRelays), Events: published + created, Dead: bad,
		})
	})
})

func newChaos(ctx context.Context) *chaos {
	GinkgoHelper()
	c := &chaos{
		own:      system.StartPrivate(ctx, devstack.PostgresOptions{}, devstack.ClickHouseOptions{}),
		random:   rand.New(rand.NewPCG(uint64(GinkgoRandomSeed()), 0)), //nolint:gosec // the seed makes it repeatable
		happened: map[string]int{},
	}
	c.System = system.New(suite.Prepared(), c.own.PostgresDSN, c.own.ClickHouseDSNs)
	system.KeepDuplicates(ctx, c.ClickHouse)
	// The default of the column fails for {"bad": "yes"}.
	c.query(ctx, "ALTER TABLE event_log ADD COLUMN amount UInt64 DEFAULT toUInt64(JSONExtractString(event_context, 'bad') = 'yes' ? '' : '1')")
	c.Postgres.MustExecContext(ctx, "CREATE TABLE ledger (n bigint, bad boolean)")
	c.Postgres.MustExecContext(ctx, "ALTER TABLE outbox_events DROP CONSTRAINT event_date_time_is_in_years_1_to_9999")
	c.postgres, c.throughPostgres = faults.StartProxyTo(c.ProgramsDSN())
	c.native, c.throughNative = faults.StartProxyTo(c.ClickHouseDSN("native"))
	c.http, c.throughHTTP = faults.StartProxyTo(c.ClickHouseDSN("http"))
	c.startAPI()
	awaitReady(ctx, c.api)
	for i := range c.relays {
		c.startRelay(i)
	}
	c.users = createUsers(ctx, c.api, 100)
	c.publish(ctx)
	awaitArrival(ctx, c.System, chaosEvents)
	return c
}

func (c *chaos) query(ctx context.Context, statement string) {
	GinkgoHelper()
	testengines.Query(ctx, "clickhouse", c.ClickHouse.HTTP, statement)
}

func (c *chaos) startAPI() {
	GinkgoHelper()
	c.api = c.LaunchAPI("DIEHARD_POSTGRES_DSN=" + c.throughPostgres)
	if c.users != nil {
		c.users.url.Store(c.api.URL())
	}
}

// startRelay starts a relay. Half of the relays use the proxy to PostgreSQL,
// and half use HTTP to ClickHouse.
func (c *chaos) startRelay(i int) {
	GinkgoHelper()
	env := append(slices.Clone(brisk), "DIEHARD_RELAY_BATCH_MAX_ROWS=5000", "DIEHARD_RELAY_POLL_INTERVAL=500ms",
		"DIEHARD_RELAY_DEAD_LETTER_AFTER=10s")
	if i < chaosRelays/2 {
		env = append(env, "DIEHARD_POSTGRES_DSN="+c.throughPostgres)
	}
	c.relays[i] = c.LaunchRelay([]string{c.throughNative, c.throughHTTP}[i%2], env...)
}

// restartEnded starts the relays again that have ended because the table was missing at
// their start.
func (c *chaos) restartEnded() {
	GinkgoHelper()
	const running = -1
	for i, relay := range c.relays {
		if relay.ExitCode() != running {
			relay.EndsWith(1)
			c.startRelay(i)
		}
	}
}

// publish publishes events until it is stopped, and ignores errors. The table ledger
// records the committed events.
func (c *chaos) publish(ctx context.Context) {
	publishing, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		pace := rate.NewLimiter(chaosPace, 1)
		for pace.Wait(publishing) == nil {
			_ = c.publishOnce(ctx, fmt.Sprintf("INSERT INTO ledger SELECT n, false FROM generate_series(1, %d) AS n", chaosEvents))
			c.attempts.Add(1)
		}
	}()
	c.stopPublishing = func() {
		cancel()
		<-done
	}
	DeferCleanup(c.stopPublishing)
}

func (c *chaos) publishOnce(ctx context.Context, ledger string) error {
	tx, err := c.Postgres.BeginTxx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.ExecContext(ctx, ledger); err != nil {
		return err
	}
	if err := c.PublishIn(ctx, tx, system.Events(chaosEvents)...); err != nil {
		return err
	}
	return tx.Commit()
}

// last waits until the publisher has made a number of further attempts.
func (c *chaos) last(ctx context.Context, attempts int64) {
	GinkgoHelper()
	before := c.attempts.Load()
	Eventually(ctx, c.attempts.Load).WithTimeout(patience).WithPolling(5 * time.Millisecond).Should(BeNumerically(">=", before+attempts))
}

// some returns a random duration of a fault, as a number of attempts to publish.
func (c *chaos) some() int64 { return 5 + c.random.Int64N(100) }

type chaosFault struct {
	name   string
	happen func(ctx context.Context)
}

func (c *chaos) kinds() []chaosFault {
	relay := func() int { return c.random.IntN(chaosRelays) }
	link := func() *faults.Proxy { return []*faults.Proxy{c.postgres, c.native, c.http}[c.random.IntN(3)] }
	during := func(ctx context.Context) {
		c.last(ctx, c.some())
		if c.random.IntN(3) == 0 { // another fault at the same time
			i := relay()
			c.relays[i].Kill()
			c.startRelay(i)
		}
	}
	return []chaosFault{
		{"relay killed", func(context.Context) {
			i := relay()
			c.relays[i].Kill()
			c.startRelay(i)
		}},
		{"all relays killed", func(context.Context) {
			for i := range c.relays {
				c.relays[i].Kill()
			}
			for i := range c.relays {
				c.startRelay(i)
			}
		}},
		{"relay stopped and continued", func(ctx context.Context) {
			i := relay()
			c.relays[i].Signal(syscall.SIGSTOP)
			c.last(ctx, c.some())
			c.relays[i].Signal(syscall.SIGCONT)
		}},
		{"relay ended", func(context.Context) {
			i := relay()
			c.relays[i].Signal(syscall.SIGTERM)
			c.relays[i].Ended()
			c.startRelay(i)
		}},
		{"API killed", func(context.Context) {
			c.api.Kill()
			c.startAPI()
		}},
		{"ClickHouse killed", func(ctx context.Context) {
			Expect(c.own.ClickHouse.Kill()).To(Succeed())
			during(ctx)
			Expect(c.own.ClickHouse.Start(ctx)).To(Succeed())
		}},
		{"PostgreSQL killed", func(ctx context.Context) {
			Expect(c.own.Postgres.Kill()).To(Succeed())
			c.last(ctx, 3)
			Expect(c.own.Postgres.Start(ctx)).To(Succeed())
		}},
		{"PostgreSQL's sessions ended", func(ctx context.Context) {
			_, _ = c.Postgres.ExecContext(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()")
		}},
		{"connections refused", func(ctx context.Context) {
			p := link()
			p.Down()
			during(ctx)
			p.Up()
		}},
		{"connections reset", func(ctx context.Context) {
			p := link()
			for range 5 {
				c.last(ctx, 2)
				p.Reset()
			}
		}},
		{"request cut", func(ctx context.Context) {
			p := link()
			p.CutOnce(1 + c.random.IntN(100_000))
			during(ctx)
		}},
		{"responses lost", func(ctx context.Context) {
			p := link()
			p.Hold(faults.Answers, c.random.IntN(50_000))
			during(ctx)
			p.Reset()
			p.Release()
		}},
		{"requests delayed", func(ctx context.Context) {
			p := link()
			p.Hold(faults.Requests, c.random.IntN(50_000))
			during(ctx)
			p.Release()
		}},
		{"network slow", func(ctx context.Context) {
			p := link()
			p.Throttle(1_000 + c.random.IntN(100_000))
			during(ctx)
			p.Throttle(0)
		}},
		{"packets dropped", func(ctx context.Context) {
			p := link()
			p.Vanish()
			during(ctx)
			p.Return()
		}},
		{"network flapping", func(ctx context.Context) {
			p := link()
			for range 5 {
				p.Down()
				c.last(ctx, 2)
				p.Up()
				c.last(ctx, 2)
			}
		}},
		{"table missing", func(ctx context.Context) {
			c.query(ctx, "RENAME TABLE event_log TO elsewhere")
			during(ctx)
			c.query(ctx, "RENAME TABLE elsewhere TO event_log")
		}},
		{"view throwing after the rows were stored", func(ctx context.Context) {
			c.query(ctx, "CREATE MATERIALIZED VIEW throws ENGINE = Null AS SELECT throwIf(rand() % 2 = 0) FROM event_log")
			during(ctx)
			c.query(ctx, "DROP VIEW throws")
		}},
		{"inserts refused", func(ctx context.Context) {
			c.query(ctx, "ALTER TABLE event_log MODIFY SETTING parts_to_throw_insert = 1")
			during(ctx)
			c.query(ctx, "ALTER TABLE event_log MODIFY SETTING parts_to_throw_insert = 1000000")
		}},
		{"event that cannot be encoded", func(ctx context.Context) {
			_, _ = c.Postgres.ExecContext(ctx, `WITH event AS (INSERT INTO outbox_events (event_type, event_context, event_date_time)
				VALUES ('from_the_future', '{}', '12000-01-01 00:00:00+00') RETURNING id)
				INSERT INTO ledger SELECT 1, true FROM event`)
		}},
		{"event that makes inserts fail", func(ctx context.Context) {
			_, _ = c.Postgres.ExecContext(ctx, `WITH event AS (INSERT INTO outbox_events (event_type, event_context)
				VALUES ('thing_happened', '{"bad":"yes"}') RETURNING id)
				INSERT INTO ledger SELECT 1, true FROM event`)
		}},
		{"type of events failing for a while", func(ctx context.Context) {
			c.query(ctx, "ALTER TABLE event_log ADD CONSTRAINT failing CHECK throwIf(event_type = 'user_created') = 0")
			during(ctx)
			c.query(ctx, "ALTER TABLE event_log DROP CONSTRAINT failing")
		}},
	}
}
