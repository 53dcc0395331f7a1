package integration_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/sentrytest"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
	"github.com/diehard-outbox/diehard/test/system"
)

// mostOfAnInsert is less than the size of an insert of 1,000 events, and more
// than the size of any query.
const mostOfAnInsert = 8 << 10

var _ = Describe("Delivery", func() {
	var s *system.System

	BeforeEach(func(ctx SpecContext) { s = newSystem(ctx) })

	DescribeTableSubtree("", func(protocol string) {
		It("inserts the event into ClickHouse and removes it from the outbox", func(ctx SpecContext) {
			api := s.API()
			s.Relay(s.ClickHouseDSN(protocol))
			id := system.Create(ctx, api, system.NewUser{Email: "grace@example.com", FirstName: "Grace", LastName: "Hopper"})
			s.ExpectDelivered(ctx, 1)

			var eventType, environment, eventContext string
			var happened time.Time
			var version uint64
			Expect(testengines.Scan(ctx, s.ClickHouse.HTTP,
				"SELECT event_type, event_date_time, environment, event_context, metadata_version FROM event_log",
				&eventType, &happened, &environment, &eventContext, &version)).To(Succeed())
			Expect(eventType).To(Equal("user_created"))
			Expect(environment).To(Equal("Test"))
			Expect(eventContext).To(Equal(fmt.Sprintf(
				`{"user_id":%q,"email":"grace@example.com","first_name":"Grace","last_name":"Hopper"}`, id)))
			Expect(version).To(Equal(uint64(1)))
			var created time.Time
			Expect(s.Postgres.Get(&created, "SELECT created_at FROM users WHERE id = $1", id)).To(Succeed())
			Expect(happened).To(BeTemporally("~", created, time.Minute))
		})

		It("delivers events of two months in one batch", func(ctx SpecContext) {
			Expect(s.Publish(ctx,
				system.Event(outbox.WithTime(time.Date(2026, 1, 31, 23, 59, 59, 999_999_000, time.UTC))),
				system.Event(outbox.WithTime(time.Date(2026, 2, 1, 0, 0, 0, 0, time.UTC))),
				system.Event(outbox.WithTime(time.Date(2026, 1, 1, 0, 0, 0, 1_000, time.UTC))),
			)).To(Succeed())
			relay := s.Relay(s.ClickHouseDSN(protocol))
			s.ExpectDelivered(ctx, 3)
			var months []uint32
			Expect(testengines.Scan(ctx, s.ClickHouse.HTTP,
				"SELECT arraySort(groupArray(toYYYYMM(event_date_time))) FROM event_log", &months)).To(Succeed())
			Expect(months).To(Equal([]uint32{202601, 202601, 202602}))
			relay.AwaitMetric(`diehard_relay_batches_total{result="settled"}`, 1)
		})

		It("delivers a payload of 5 MB byte for byte", func(ctx SpecContext) {
			payload := largePayload(5_000_000)
			large, err := outbox.NewEvent(json.RawMessage(payload), outbox.WithType("report_made"))
			Expect(err).NotTo(HaveOccurred())
			Expect(s.Publish(ctx, system.Event(), large, system.Event())).To(Succeed())
			s.Relay(s.ClickHouseDSN(protocol))
			s.ExpectDelivered(ctx, 3)
			var length uint64
			var sum string
			Expect(testengines.Scan(ctx, s.ClickHouse.HTTP,
				"SELECT length(event_context), lower(hex(SHA256(event_context))) FROM event_log WHERE event_type = 'report_made'",
				&length, &sum)).To(Succeed())
			Expect(length).To(Equal(uint64(len(payload))))
			want := sha256.Sum256(payload)
			Expect(sum).To(Equal(hex.EncodeToString(want[:])))
		})

		It("finishes its insert when it is stopped, and claims no new batch", func(ctx SpecContext) {
			proxy, through := faults.StartProxyTo(s.ClickHouseDSN(protocol))
			relay := s.Relay(through)
			proxy.Hold(faults.Answers, mostOfAnInsert)
			Expect(s.Publish(ctx, system.Events(1000)...)).To(Succeed())
			Eventually(ctx, func(g Gomega) {
				rows, _ := s.Arrived(ctx, g)
				g.Expect(rows).To(Equal(1000))
			}).WithTimeout(patience).Should(Succeed())

			relay.Signal(syscall.SIGTERM)
			Eventually(relay.Ready, patience).Should(Equal(http.StatusServiceUnavailable))
			Expect(s.Publish(ctx, system.Event())).To(Succeed())
			proxy.Release()
			relay.Ended()
			left, batches, _ := s.Left(Default)
			Expect(left).To(Equal(1), "the event that was published during the insert")
			Expect(batches).To(BeZero())

			s.Relay(s.ClickHouseDSN(protocol))
			s.ExpectDelivered(ctx, 1001)
		})

		It("gives up an insert that exceeds the shutdown timeout, and another relay delivers the batch", func(ctx SpecContext) {
			proxy, through := faults.StartProxyTo(s.ClickHouseDSN(protocol))
			// The flush timeout is long, so that only the stop can end the insert.
			relay := s.Relay(through, "DIEHARD_RELAY_SHUTDOWN_TIMEOUT=100ms", "DIEHARD_RELAY_FLUSH_TIMEOUT=10m")
			proxy.Hold(faults.Answers, mostOfAnInsert)
			Expect(s.Publish(ctx, system.Events(1000)...)).To(Succeed())
			Eventually(ctx, func(g Gomega) {
				rows, _ := s.Arrived(ctx, g)
				g.Expect(rows).To(Equal(1000))
			}).WithTimeout(patience).Should(Succeed())
			relay.Stop()

			s.Relay(s.ClickHouseDSN(protocol))
			s.ExpectDelivered(ctx, 1000)
		})

		DescribeTable("loses and doubles no event when a relay is killed during an insert",
			func(ctx SpecContext, held faults.Direction, after int) {
				proxy, through := faults.StartProxyTo(s.ClickHouseDSN(protocol))
				relay := s.Relay(through)
				proxy.Hold(held, after)
				Expect(s.Publish(ctx, system.Events(1000)...)).To(Succeed())
				Eventually(ctx, func(g Gomega) {
					var attempts int
					g.Expect(s.Postgres.Get(&attempts, "SELECT attempts FROM outbox_batches")).To(Succeed())
					g.Expect(attempts).To(Equal(1))
					g.Expect(proxy.Held()).NotTo(BeZero())
					if held == faults.Answers {
						rows, _ := s.Arrived(ctx, g)
						g.Expect(rows).To(Equal(1000))
					}
				}).WithTimeout(patience).Should(Succeed())
				relay.Kill()
				if held == faults.Requests && after > 0 {
					proxy.Down() // ClickHouse waits for the rest
				}

				s.Relay(s.ClickHouseDSN(protocol))
				s.ExpectDelivered(ctx, 1000)
				By("delivering the held data of the killed relay")
				proxy.Release()
				Eventually(ctx, proxy.Connections).WithTimeout(patience).Should(BeZero())
				Eventually(ctx, s.Inserts).WithArguments(ctx).WithTimeout(patience).Should(BeZero())
				s.ExpectDelivered(ctx, 1000)
			},
			Entry("before ClickHouse received it", faults.Requests, 0),
			Entry("during the insert", faults.Requests, mostOfAnInsert),
			Entry("before ClickHouse's response arrived", faults.Answers, mostOfAnInsert),
		)

		It("loses no event during a network outage to ClickHouse, and reports it", func(ctx SpecContext) {
			sentry := sentrytest.Start()
			proxy, through := faults.StartProxyTo(s.ClickHouseDSN(protocol))
			api := s.API("DIEHARD_SENTRY_DSN=" + sentry.DSN())
			relay := s.Relay(through, "DIEHARD_SENTRY_DSN="+sentry.DSN(), "DIEHARD_ENVIRONMENT=Test")
			system.Create(ctx, api, system.NewUser{Email: "before@example.com"})
			s.ExpectDelivered(ctx, 1)
			Expect(sentry.Errors()).To(BeEmpty())

			proxy.Down()
			system.Create(ctx, api, system.NewUser{Email: "during@example.com"})
			Eventually(relay.Ready, patience).Should(Equal(http.StatusServiceUnavailable))
			Expect(relay.Metric("diehard_relay_circuit_open")).To(Equal(1.0))
			var failure map[string]any
			Eventually(func() map[string]any {
				for _, record := range relay.Log() {
					if record["level"] == "ERROR" {
						failure = record
						break
					}
				}
				return failure
			}, patience).ShouldNot(BeEmpty())
			Expect(failure["err"]).To(ContainSubstring("refused"))
			Eventually(sentry.Errors, patience).ShouldNot(BeEmpty())
			report := sentry.Errors()[0]
			Expect(report.Message).To(Equal(failure["msg"]))
			Expect(report.Environment).To(Equal("Test"))
			Expect(report.Release).To(Equal("diehard@dev"))
			Expect(report.Exception).To(ContainElement(HaveField("Value", ContainSubstring("refused"))))
			Expect(api.Ready()).To(Equal(http.StatusOK), "the API does not depend on ClickHouse")
			system.Create(ctx, api, system.NewUser{Email: "later@example.com"})
			left, _, _ := s.Left(Default)
			Expect(left).To(Equal(2))

			proxy.Up()
			Eventually(relay.Ready, patience).Should(Equal(http.StatusOK))
			s.ExpectDelivered(ctx, 3)

			By("reporting each request and each batch")
			api.Stop()
			relay.Stop()
			names := map[string]int{}
			for _, transaction := range sentry.Transactions() {
				names[transaction.Transaction+" "+transaction.Contexts.Trace.Status]++
			}
			Expect(names).To(HaveKeyWithValue("POST /v1/users ok", 3))
			Expect(names).To(HaveKeyWithValue("relay batch ok", BeNumerically(">=", 2)))
		})
	}, protocols)

	DescribeTable("shows a request and its delivery in one trace",
		func(ctx SpecContext, headers ...string) {
			sentry := sentrytest.Start()
			api := s.API("DIEHARD_SENTRY_DSN=" + sentry.DSN())
			relay := s.Relay(s.ClickHouseDSN("native"), "DIEHARD_SENTRY_DSN="+sentry.DSN())
			answer, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "ada@example.com"}, headers...)
			Expect(err).NotTo(HaveOccurred())
			Expect(answer.Status).To(Equal(http.StatusCreated))
			s.ExpectDelivered(ctx, 1)
			api.Stop()
			relay.Stop()

			transactions := map[string]sentrytest.Event{}
			for _, transaction := range sentry.Transactions() {
				transactions[transaction.Transaction] = transaction
			}
			Expect(transactions).To(And(HaveKey("POST /v1/users"), HaveKey("deliver")))
			request, delivery := transactions["POST /v1/users"].Contexts.Trace, transactions["deliver"].Contexts.Trace
			Expect(delivery.TraceID).To(Equal(request.TraceID))
			Expect(delivery.ParentSpanID).To(Equal(request.SpanID))
			if len(headers) > 0 {
				Expect(headers[0]).To(ContainSubstring(request.TraceID + "-" + request.ParentSpanID))
			}
		},
		Entry("that begins with the request"),
		Entry("that the client began", "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
		Entry("that the client does not record", "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"),
	)

	It("records no delivery of a request that the API does not record, even if the client does", func(ctx SpecContext) {
		sentry := sentrytest.Start()
		api := s.API("DIEHARD_SENTRY_DSN="+sentry.DSN(), "DIEHARD_SENTRY_TRACES_SAMPLE_RATE=0")
		relay := s.Relay(s.ClickHouseDSN("native"), "DIEHARD_SENTRY_DSN="+sentry.DSN())
		answer, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "ada@example.com"},
			"Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
		Expect(err).NotTo(HaveOccurred())
		Expect(answer.Status).To(Equal(http.StatusCreated))
		s.ExpectDelivered(ctx, 1)
		api.Stop()
		relay.Stop()
		Expect(sentry.Transactions()).To(HaveEach(HaveField("Transaction", "relay batch")))
	})

	It("limits the size of batches so that a relay can hold two", func(ctx SpecContext) {
		const maxBytes, events = 1 << 20, 60
		proxy, through := faults.StartProxyTo(s.ClickHouse.Native)
		relay := s.Relay(through, fmt.Sprint("DIEHARD_RELAY_BATCH_MAX_BYTES=", maxBytes))
		Eventually(relay.Ready, patience).Should(Equal(http.StatusOK))
		proxy.Down()
		large := system.Events(events)
		for i := range large {
			large[i].EventContext = outboxtest.JSON(string(largePayload(50_000)))
		}
		Expect(s.Publish(ctx, large...)).To(Succeed())
		var largest int
		Eventually(ctx, func(g Gomega) {
			g.Expect(s.Postgres.GetContext(ctx, &largest, "SELECT coalesce(max(byte_count), 0) FROM outbox_batches")).To(Succeed())
			g.Expect(largest).To(BeNumerically(">", 0))
		}).WithTimeout(patience).Should(Succeed())
		Expect(2 * largest).To(BeNumerically("<=", maxBytes))
		proxy.Up()
		s.ExpectDelivered(ctx, events)
	})

	It("delivers each of 100,000 events once with four relays while producers publish", Label("long"), func(ctx SpecContext) {
		const total, producers, perTransaction = 100_000, 4, 100
		small := []string{"DIEHARD_RELAY_BATCH_MAX_ROWS=2000", "DIEHARD_RELAY_LINGER=20ms"}
		var group sync.WaitGroup
		for range producers {
			group.Go(func() {
				defer GinkgoRecover()
				for range total / producers / perTransaction {
					Expect(s.Publish(ctx, system.Events(perTransaction)...)).To(Succeed())
				}
			})
		}
		for i := range 4 {
			s.Relay(s.ClickHouseDSN([]string{"native", "http"}[i%2]), small...)
		}
		group.Wait()
		s.ExpectDelivered(ctx, total)
	})

	It("loses and doubles no event while relays are killed and restarted", Label("long"), func(ctx SpecContext) {
		const total, perTransaction = 20_000, 100
		small := []string{"DIEHARD_RELAY_BATCH_MAX_ROWS=500", "DIEHARD_RELAY_LINGER=5ms"}
		published := make(chan struct{})
		go func() {
			defer GinkgoRecover()
			defer close(published)
			for range total / perTransaction {
				Expect(s.Publish(ctx, system.Events(perTransaction)...)).To(Succeed())
			}
		}()
		for i := range 6 {
			relay := s.Relay(s.ClickHouseDSN([]string{"native", "http"}[i%2]), small...)
			Eventually(ctx, func(g Gomega) { // while the relay is working
				rows, _ := s.Arrived(ctx, g)
				g.Expect(rows).To(BeNumerically(">=", min(total, (i+1)*2000)))
			}).WithTimeout(patience).WithPolling(5 * time.Millisecond).Should(Succeed())
			relay.Kill()
		}
		s.Relay(s.ClickHouse.Native)
		Eventually(ctx, published).WithTimeout(patience).Should(BeClosed())
		s.ExpectDelivered(ctx, total)
	})
})

// largePayload returns about n bytes of JSON. It contains everything that decoding and
// encoding again would change: spaces, escapes, the order of keys, and numbers beyond a
// float64.
func largePayload(n int) []byte {
	var b strings.Builder
	b.WriteString("{ \"b\" : 1,\t\"a\":1.000000000000000000001, \"b\": 2 ,\n\"text\":\"")
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same in each run
	for b.Len() < n-2 {
		switch random.IntN(8) {
		case 0:
			b.WriteString(`\u0000\"\\\/`)
		case 1:
			b.WriteString("ü漢🧨") //nolint:gosmopolitan // characters of two, three and four bytes
		default:
			fmt.Fprintf(&b, "%x", random.Uint64())
		}
	}
	b.WriteString(`"}`)
	return []byte(b.String())
}
