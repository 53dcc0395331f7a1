package chaos_test

import (
	"context"
	"net/http"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// mostOfAnInsert is less than the size of an insert of 100 events, and more
// than the size of any query.
const mostOfAnInsert = 2 << 10

// networkFault is a fault between a relay and one of its databases.
type networkFault struct {
	name string
	// happen starts and ends the fault. It can call noticed, which waits until the
	// relay reports that it cannot deliver.
	happen func(ctx context.Context, p *faults.Proxy, noticed func())
}

var networkFaults = []networkFault{
	{"connections are refused", func(_ context.Context, p *faults.Proxy, noticed func()) {
		p.Down()
		noticed()
		p.Up()
	}},
	{"connections are reset", func(ctx context.Context, p *faults.Proxy, _ func()) {
		for range 5 {
			Eventually(ctx, p.Connections).WithTimeout(patience).ShouldNot(BeZero())
			p.Reset()
		}
	}},
	{"requests are cut off in the middle", func(ctx context.Context, p *faults.Proxy, _ func()) {
		for _, after := range []int{1, 100, 700, mostOfAnInsert, 3 * mostOfAnInsert} {
			p.CutOnce(after)
			Eventually(ctx, p.Uncut).WithTimeout(patience).Should(BeFalse())
		}
	}},
	{"responses are lost", func(ctx context.Context, p *faults.Proxy, noticed func()) {
		p.Hold(faults.Answers, mostOfAnInsert)
		Eventually(ctx, p.Held).WithTimeout(patience).ShouldNot(BeZero())
		noticed()
		p.Down()
		p.Release()
		p.Up()
	}},
	{"requests are delayed past their deadline", func(ctx context.Context, p *faults.Proxy, noticed func()) {
		p.Hold(faults.Requests, mostOfAnInsert)
		Eventually(ctx, p.Held).WithTimeout(patience).ShouldNot(BeZero())
		noticed()
		p.Release()
	}},
	{"the network is too slow", func(_ context.Context, p *faults.Proxy, noticed func()) {
		p.Throttle(1000)
		noticed()
		p.Throttle(0)
	}},
	{"packets are dropped and connections stay half-open", func(_ context.Context, p *faults.Proxy, noticed func()) {
		p.Vanish()
		noticed()
		p.Return()
	}},
	{"the network flaps", func(ctx context.Context, p *faults.Proxy, _ func()) {
		for range 10 {
			p.Down()
			p.Up()
			Eventually(ctx, p.Connections).WithTimeout(patience).ShouldNot(BeZero())
		}
	}},
}

// brisk shortens the flush timeout of the relay from half a minute to seconds.
var brisk = []string{"DIEHARD_RELAY_FLUSH_TIMEOUT=2s"}

var _ = Describe("Between a relay and its databases", func() {
	for _, link := range []string{"PostgreSQL", "ClickHouse over the native protocol", "ClickHouse over HTTP"} {
		for _, fault := range networkFaults {
			It("each event arrives once although "+fault.name+": "+link, func(ctx SpecContext) {
				s := newSystem(ctx)
				env := slices.Concat(small, brisk)
				clickHouse := s.ClickHouse.Native
				var proxy *faults.Proxy
				switch link {
				case "PostgreSQL":
					var through string
					proxy, through = faults.StartProxyTo(s.PostgresDSN)
					env = append(env, "DIEHARD_POSTGRES_DSN="+through)
				case "ClickHouse over HTTP":
					proxy, clickHouse = faults.StartProxyTo(s.ClickHouse.HTTP)
				default:
					proxy, clickHouse = faults.StartProxyTo(s.ClickHouse.Native)
				}
				relay := s.Relay(clickHouse, env...)
				stop := produce(ctx, s)
				awaitArrival(ctx, s, 5*perBatch)
				fault.happen(ctx, proxy, func() { awaitNotReady(ctx, relay) })
				awaitReady(ctx, relay)
				expectOnce(ctx, s, outcome{Fault: fault.name, Done: "between relay and " + link, Events: stop()})
			})
		}
	}
})

var _ = Describe("Between an API and PostgreSQL", func() {
	underLoad := func(ctx context.Context, create func(context.Context, *programs.Process, rate.Limit) *clients) (*system.System, *faults.Proxy, *programs.Process, *clients) {
		GinkgoHelper()
		s := newSystem(ctx)
		proxy, through := faults.StartProxyTo(s.PostgresDSN)
		api := s.API("DIEHARD_POSTGRES_DSN="+through, "DIEHARD_HTTP_REQUEST_TIMEOUT=1s")
		s.Relay(s.ClickHouse.Native, small...)
		users := create(ctx, api, rate.Inf)
		users.awaitMore(ctx, perBatch)
		return s, proxy, api, users
	}

	for _, fault := range networkFaults {
		It("each created user has one event although "+fault.name, func(ctx SpecContext) {
			s, proxy, api, users := underLoad(ctx, createUsers)
			fault.happen(ctx, proxy, func() { users.awaitFailure(ctx) })
			awaitReady(ctx, api)
			users.awaitMore(ctx, perBatch)
			users.expectEach(ctx, s, outcome{Fault: fault.name, Done: "between API and PostgreSQL"})
		})
	}

	for _, commit := range []struct {
		fault string
		held  faults.Direction
	}{
		{"the commit arrives long after the response to the client", faults.Requests},
		{"the reply to the commit is lost", faults.Answers},
	} {
		It("each created user has one event although "+commit.fault, func(ctx SpecContext) {
			s, proxy, api, users := underLoad(ctx, createUsers)
			proxy.HoldFrom(commit.held, "user_created") // the prepared statement is the whole transaction
			users.awaitResponse(ctx, "503 outcome-unknown")
			proxy.Release()
			awaitReady(ctx, api)
			users.awaitMore(ctx, perBatch)
			users.expectEach(ctx, s, outcome{Fault: commit.fault, Done: "between API and PostgreSQL"})
			created, _ := users.counts()
			Eventually(ctx, func() (existing int, err error) {
				err = s.Postgres.Get(&existing, "SELECT count(*) FROM users")
				return existing, err
			}).WithTimeout(patience).Should(BeNumerically(">", created), "at least one created user must be unknown to its client")
		})

		It("a repeated request with the same key returns the only user that it created although "+commit.fault, func(ctx SpecContext) {
			s, proxy, api, users := underLoad(ctx, createUsersOnce)
			proxy.HoldFrom(commit.held, "user_created")
			users.awaitResponse(ctx, "503 outcome-unknown")
			proxy.Release()
			awaitReady(ctx, api)
			users.awaitMore(ctx, perBatch)
			users.expectEach(ctx, s, outcome{Fault: commit.fault, Done: "between API and PostgreSQL, with keys"})
		})
	}
})

// produce publishes about a thousand events a second, in small transactions, until
// stop is called. The function stop returns the number of published events.
func produce(ctx context.Context, s *system.System) (stop func() int) {
	producing, cancel := context.WithCancel(ctx)
	done := make(chan int)
	go func() {
		defer GinkgoRecover()
		defer close(done)
		const atOnce = 20
		pace := rate.NewLimiter(1000, atOnce)
		published := 0
		for pace.WaitN(producing, atOnce) == nil {
			Expect(s.Publish(ctx, system.Events(atOnce)...)).To(Succeed())
			published += atOnce
		}
		done <- published
	}()
	DeferCleanup(func(ctx SpecContext) {
		cancel()
		Eventually(ctx, done).WithTimeout(patience).Should(Or(BeClosed(), Receive()))
	})
	return func() int {
		cancel()
		return <-done
	}
}

// awaitArrival waits for n more events in ClickHouse.
func awaitArrival(ctx context.Context, s *system.System, n int) {
	GinkgoHelper()
	before, _ := s.Arrived(ctx, Default)
	awaitArrivalOf(ctx, s, before+n)
}

// awaitArrivalOf waits until ClickHouse has n events.
func awaitArrivalOf(ctx context.Context, s *system.System, n int) {
	GinkgoHelper()
	Eventually(ctx, func(g Gomega) {
		rows, _ := s.Arrived(ctx, g)
		g.Expect(rows).To(BeNumerically(">=", n))
	}).WithTimeout(patience).WithPolling(10 * time.Millisecond).Should(Succeed())
}

func awaitNotReady(ctx context.Context, p *programs.Process) {
	GinkgoHelper()
	Eventually(ctx, p.Ready).WithTimeout(patience).Should(Equal(http.StatusServiceUnavailable))
}

func awaitReady(ctx context.Context, p *programs.Process) {
	GinkgoHelper()
	Eventually(ctx, p.Ready).WithTimeout(patience).Should(Equal(http.StatusOK))
}
