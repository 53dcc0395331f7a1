package integration_test

import (
	"fmt"
	"net/http"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/otlptest"
	"github.com/diehard-outbox/diehard/internal/sentrytest"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("OpenTelemetry", func() {
	It("shows a request in the client's trace, and a flush that links to it", func(ctx SpecContext) {
		const traceID, parentID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
		collector := otlptest.Start()
		s := newSystem(ctx)
		endpoint := "OTEL_EXPORTER_OTLP_ENDPOINT=" + collector.URL()
		api, relay := s.API(endpoint), s.Relay(s.ClickHouseDSN("native"), endpoint)
		answer, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "ada@example.com", FirstName: "Augusta"},
			"Traceparent: 00-"+traceID+"-"+parentID+"-01")
		Expect(err).NotTo(HaveOccurred())
		Expect(answer.Status).To(Equal(http.StatusCreated))
		s.ExpectDelivered(ctx, 1)
		api.Stop()
		relay.Stop()

		spans := map[string]otlptest.Span{}
		for _, span := range collector.Spans() {
			spans[span.GetName()] = span
			Expect(span.String()).NotTo(Or(ContainSubstring("example.com"), ContainSubstring("Augusta")))
		}
		Expect(spans).To(And(HaveLen(6), HaveKey("POST /v1/users"), HaveKey("publish outbox_events"), HaveKey("cut outbox_events"),
			HaveKey("deliver outbox_events"), HaveKey("flush event_log"), HaveKey("settle outbox_events")))
		request, publish, flush := spans["POST /v1/users"], spans["publish outbox_events"], spans["flush event_log"]
		Expect(request.Trace).To(Equal(traceID))
		Expect(request.Parent).To(Equal(parentID))
		Expect(request.Resource).To(And(HaveKeyWithValue("service.name", "diehard-api"), HaveKeyWithValue("deployment.environment.name", "Test")))
		Expect(publish.Trace).To(Equal(traceID))
		Expect(publish.Parent).To(Equal(request.ID))
		Expect(flush.Links).To(Equal([]string{traceID}))
		Expect(fmt.Sprintf("%x", flush.GetLinks()[0].GetSpanId())).To(Equal(request.ID))
		Expect(flush.Resource).To(HaveKeyWithValue("service.name", "diehard-relay"))
		Expect(answer.Headers.Get("Traceparent")).To(Equal("00-" + traceID + "-" + request.ID + "-01"))
	})

	DescribeTable("costs no event and no request when its collector and Sentry",
		func(ctx SpecContext, isDead bool, protocol string) {
			const users = 50
			collector, reports := otlptest.Start(), sentrytest.Start()
			target := collector.URL()
			if protocol == "grpc" {
				target = collector.GRPC()
			}
			toCollector, endpoint := faults.StartProxyTo(target)
			toSentry, dsn := faults.StartProxyTo(reports.DSN())
			proxies := []*faults.Proxy{toCollector, toSentry}
			for _, proxy := range proxies {
				if isDead {
					proxy.Down()
				} else {
					proxy.Hold(faults.Requests, 0)
				}
			}
			s := newSystem(ctx)
			// Every span is its own request, and a queue of one span is always full.
			env := []string{
				"OTEL_EXPORTER_OTLP_ENDPOINT=" + endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL=" + protocol, "DIEHARD_SENTRY_DSN=" + dsn,
				"OTEL_BSP_MAX_QUEUE_SIZE=1", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=1",
			}
			api, relay := s.API(env...), s.Relay(s.ClickHouseDSN("native"), env...)
			for n := range users {
				system.Create(ctx, api, system.NewUser{Email: fmt.Sprintf("user-%d@example.com", n)})
			}
			s.ExpectDelivered(ctx, users)
			if !isDead {
				for _, proxy := range proxies {
					Eventually(ctx, proxy.Held).WithTimeout(patience).ShouldNot(BeZero())
				}
			}
			api.Signal(syscall.SIGTERM)
			relay.Signal(syscall.SIGTERM)
			for _, program := range []*programs.Process{api, relay} {
				program.Ended()
				Expect(program.Messages()).To(ContainElement("program stopped"))
			}
			Expect(collector.Spans()).To(BeEmpty())
			Expect(reports.Spans()).To(BeEmpty())
		},
		Entry("accept connections and never respond", false, "http/protobuf"),
		Entry("accept connections and never respond, by gRPC", false, "grpc"),
		Entry("are dead", true, "http/protobuf"),
	)

	It("refuses a protocol that the programs lack, with exit code 2", func() {
		for _, program := range []string{"api", "relay"} {
			p := programs.Run(suite.Prepared(), program, nil, "DIEHARD_API_AUTH=off", "DIEHARD_POSTGRES_DSN=postgres://127.0.0.1:1/diehard",
				"DIEHARD_CLICKHOUSE_DSN=clickhouse://127.0.0.1:1/diehard",
				"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL=http/json")
			p.EndsWith(2)
			Expect(string(p.Err.Contents())).To(Equal(program + ": OTEL_EXPORTER_OTLP_PROTOCOL is \"http/json\", must be http/protobuf or grpc\n"))
		}
	})
})
