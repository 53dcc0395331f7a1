package httpapi_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"

	"github.com/getsentry/sentry-go"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.opentelemetry.io/otel/trace"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/diehard-outbox/diehard/internal/otlptest"
	"github.com/diehard-outbox/diehard/internal/sentrytest"
	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

const (
	traceID     = "0af7651916cd43dd8448eb211c80319c"
	parentID    = "b7ad6b7169203331"
	traceparent = "00-" + traceID + "-" + parentID + "-01"
)

// measured returns the number of observations of each series of the request
// histogram. A key has the form route method status.
func measured(registry *prometheus.Registry) map[string]uint64 {
	GinkgoHelper()
	families, err := registry.Gather()
	Expect(err).NotTo(HaveOccurred())
	series := make(map[string]uint64)
	for _, family := range families {
		if family.GetName() != "diehard_http_request_seconds" {
			continue
		}
		for _, metric := range family.GetMetric() {
			labels := make(map[string]string)
			for _, label := range metric.GetLabel() {
				labels[label.GetName()] = label.GetValue()
			}
			series[fmt.Sprintf("%s %s %s", labels["route"], labels["method"], labels["status"])] = observations(metric)
		}
	}
	return series
}

func observations(metric *dto.Metric) uint64 { return metric.GetHistogram().GetSampleCount() }

// eventTraceparents returns the traceparents of the events in the outbox.
func eventTraceparents(ctx context.Context) []string {
	GinkgoHelper()
	var values []string
	Expect(db.SelectContext(ctx, &values, "SELECT coalesce(traceparent, '') FROM outbox_events")).To(Succeed())
	return values
}

var _ = Describe("A request", func() {
	It("has the client's address in the log, unless it is turned off", func(ctx SpecContext) {
		api := start(ctx)
		api.get(ctx, "/v1/users")
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"client_address":"127.0.0.1"`))
		api = start(ctx, func(o *httpapi.Options) { o.AddressesOff = true })
		api.get(ctx, "/v1/users")
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"msg":"request"`))
		Expect(string(api.log.Contents())).NotTo(ContainSubstring("client_address"))
	})

	Describe("has an id", func() {
		DescribeTable("from the client if it is valid",
			func(ctx SpecContext, id string, taken bool) {
				api := start(ctx)
				got := api.get(ctx, "/v1/users", "X-Request-ID: "+id).header.Get("X-Request-ID")
				if taken {
					Expect(got).To(Equal(id))
				} else {
					Expect(got).To(MatchRegexp(uuidPattern))
				}
				Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"request_id":"` + got + `"`))
			},
			Entry("a UUID", "0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11", true),
			Entry("an X-Amzn-Trace-Id", "Root=1-67891233-abcdef012345678912345678", true),
			Entry("128 characters", strings.Repeat("a", 128), true),
			Entry("129 characters", strings.Repeat("a", 129), false),
			Entry("an empty id", "", false),
			Entry("an id with quotes", `a"b`, false),
			Entry("an id with a space", "a b", false),
			Entry("an id that is not ASCII", "ä", false),
		)

		It("from the server otherwise", func(ctx SpecContext) {
			api := start(ctx)
			first, second := api.get(ctx, "/nowhere"), api.get(ctx, "/nowhere")
			Expect(first.header.Get("X-Request-ID")).NotTo(Equal(second.header.Get("X-Request-ID")))
		})
	})

	DescribeTable("passes its trace context to the event",
		func(ctx SpecContext, given, want string) {
			api := start(ctx)
			created := api.create(ctx, `{"email":"ada@example.com"}`, "Traceparent: "+given)
			Expect(created.status).To(Equal(http.StatusCreated))
			Expect(created.header.Get("Traceparent")).To(Equal(want))
			Expect(eventTraceparents(ctx)).To(Equal([]string{want}))
			if want != "" {
				Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"trace_id":"` + traceID + `"`))
			}
		},
		Entry("unchanged", traceparent, traceparent),
		Entry("unchanged if it is not sampled", "00-"+traceID+"-"+parentID+"-00", "00-"+traceID+"-"+parentID+"-00"),
		Entry("in the format of version 00 if the version is later", "cc-"+traceID+"-"+parentID+"-01-what-else", traceparent),
		Entry("unless the version is invalid", "ff-"+traceID+"-"+parentID+"-01", ""),
		Entry("unless version 00 has more fields", traceparent+"-more", ""),
		Entry("unless the trace id is all zeros", "00-"+strings.Repeat("0", 32)+"-"+parentID+"-01", ""),
		Entry("unless the parent id is all zeros", "00-"+traceID+"-"+strings.Repeat("0", 16)+"-01", ""),
		Entry("unless it is in upper case", strings.ToUpper(traceparent), ""),
		Entry("unless it is truncated", traceparent[:50], ""),
		Entry("unless it is empty", "", ""),
	)

	It("is measured by its route, with one label for unknown routes and methods", func(ctx SpecContext) {
		api := start(ctx)
		api.create(ctx, `{"email":"ada@example.com"}`)
		api.create(ctx, `{"email":"ada@example.com"}`)
		api.get(ctx, "/v1/users/1")
		api.get(ctx, "/v1/users/2")
		api.get(ctx, "/a")
		api.get(ctx, "/b")
		api.do(ctx, "FROB", "/v1/users", nil)
		api.do(ctx, "FRAB", "/v1/users", nil)
		Eventually(ctx, measured).WithArguments(api.registry).Should(Equal(map[string]uint64{
			"/v1/users POST 201":    1,
			"/v1/users POST 409":    1,
			"/v1/users/:id GET 404": 2,
			"unmatched GET 404":     2,
			"/v1/users other 405":   2,
		}))
	})

	It("causes one log line without personal data", func(ctx SpecContext) {
		api := start(ctx)
		api.create(ctx, `{"email":"ada@example.com","first_name":"Augusta"}`)
		api.create(ctx, `{"email":"ada@example.com","first_name":"Augusta"}`)
		api.get(ctx, "/v1/users?email=ada@example.com")
		api.get(ctx, "/ada@example.com")
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"level":"INFO","msg":"request","method":"POST","route":"/v1/users","status":201,"duration":[0-9.e-]+,"request_id":"[^"]+","client_address":"127.0.0.1"}`))
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"method":"POST","route":"/v1/users","status":409,.*"problem":"email-taken"`))
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"method":"GET","route":"/v1/users","status":200`))
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"method":"GET","route":"unmatched","status":404`))
		Expect(string(api.log.Contents())).NotTo(Or(ContainSubstring("example.com"), ContainSubstring("Augusta")))
	})

	Describe("with spans", func() {
		var (
			collector *otlptest.Collector
			tracer    trace.Tracer
			flush     func()
		)

		BeforeEach(func(ctx SpecContext) {
			collector = otlptest.Start()
			GinkgoT().Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL())
			var err error
			tracer, flush, err = telemetry.StartTraces(ctx, telemetry.TracesOptions{Service: "diehard-api", Log: slog.New(slog.DiscardHandler)})
			Expect(err).NotTo(HaveOccurred())
		})

		traced := func(o *httpapi.Options) { o.Tracer = tracer }

		// spans stops the API and returns the spans with the name.
		spans := func(api *api, name string) []otlptest.Span {
			GinkgoHelper()
			api.stop()
			Eventually(api.stopped).Should(Receive(BeNil()))
			close(api.stopped) // the end of the spec waits for it, too
			flush()
			return collector.Named(name)
		}

		It("is a span that continues the client's trace, and the event joins it", func(ctx SpecContext) {
			api := start(ctx, traced)
			created := api.create(ctx, `{"email":"ada@example.com"}`, "Traceparent: "+traceparent)
			Expect(created.status).To(Equal(http.StatusCreated))
			events := eventTraceparents(ctx)
			request := spans(api, "POST /v1/users")
			Expect(request).To(HaveLen(1))
			Expect(request[0].Trace).To(Equal(traceID))
			Expect(request[0].Parent).To(Equal(parentID))
			Expect(request[0].GetKind()).To(Equal(otlp.Span_SPAN_KIND_SERVER))
			Expect(request[0].Attributes).To(Equal(map[string]any{
				"http.request.method": "POST", "http.route": "/v1/users", "http.response.status_code": int64(201), "url.scheme": "http",
			}))
			joined := fmt.Sprintf("00-%s-%s-01", traceID, request[0].ID)
			Expect(events).To(Equal([]string{joined}))
			Expect(created.header.Get("Traceparent")).To(Equal(joined))

			publish := collector.Named("publish outbox_events")
			Expect(publish).To(HaveLen(1))
			Expect(publish[0].Parent).To(Equal(request[0].ID))
			Expect(publish[0].GetKind()).To(Equal(otlp.Span_SPAN_KIND_PRODUCER))
			Expect(publish[0].Attributes).To(Equal(map[string]any{
				"messaging.system": "diehard", "messaging.destination.name": "outbox_events",
				"messaging.operation.name": "publish", "messaging.operation.type": "send",
			}))
		})

		It("begins a trace if the client sends none, or an invalid one", func(ctx SpecContext) {
			api := start(ctx, traced)
			api.create(ctx, `{"email":"ada@example.com"}`)
			api.create(ctx, `{"email":"eve@example.com"}`, "Traceparent: 00-"+traceID+"-"+parentID+"-01", "Traceparent: 00-"+traceID+"-"+parentID+"-01")
			requests := spans(api, "POST /v1/users")
			Expect(requests).To(HaveLen(2))
			Expect(requests).To(HaveEach(And(HaveField("Parent", ""), HaveField("Trace", Not(Equal(traceID))))))
		})

		It("is not recorded if the client does not record it, and neither is its event", func(ctx SpecContext) {
			api := start(ctx, traced)
			api.create(ctx, `{"email":"ada@example.com"}`, "Traceparent: 00-"+traceID+"-"+parentID+"-00")
			Expect(eventTraceparents(ctx)).To(ConsistOf(And(HavePrefix("00-"+traceID), HaveSuffix("-00"))))
			Expect(spans(api, "POST /v1/users")).To(BeEmpty())
		})

		It("has the name of its route, and no personal data", func(ctx SpecContext) {
			api := start(ctx, traced)
			api.create(ctx, `{"email":"ada@example.com","first_name":"Augusta"}`)
			api.create(ctx, `{"email":"ada@example.com","first_name":"Augusta"}`)
			api.get(ctx, "/v1/users?email=ada@example.com")
			api.get(ctx, "/ada@example.com")
			unmatched := spans(api, "GET")
			Expect(unmatched).To(HaveLen(1))
			Expect(unmatched[0].Attributes).NotTo(HaveKey("http.route"))
			for _, span := range collector.Spans() {
				Expect(span.String()).NotTo(Or(ContainSubstring("example.com"), ContainSubstring("Augusta")))
			}
			Expect(collector.Named("publish outbox_events")).To(ContainElement(And(
				HaveField("Attributes", HaveKeyWithValue("error.type", "email-taken")),
				WithTransform(func(s otlptest.Span) otlp.Status_StatusCode { return s.GetStatus().GetCode() }, Equal(otlp.Status_STATUS_CODE_UNSET)))))
		})

		It("has the problem of a server error", func(ctx SpecContext) {
			api := start(ctx, traced, func(o *httpapi.Options) { o.Users = nil })
			api.get(ctx, "/v1/users")
			failed := spans(api, "GET /v1/users")
			Expect(failed).To(HaveLen(1))
			Expect(failed[0].GetStatus().GetCode()).To(Equal(otlp.Status_STATUS_CODE_ERROR))
			Expect(failed[0].Attributes).To(And(HaveKeyWithValue("error.type", "internal-error"), HaveKeyWithValue("http.response.status_code", int64(500))))
		})
	})

	Describe("with Sentry enabled", func() {
		var (
			reported *sentrytest.Listener
			flush    func()
		)

		BeforeEach(func() {
			reported = sentrytest.Start()
			// Sentry's state belongs to the process. Therefore the spec restores it at
			// its end.
			hub := sentry.CurrentHub()
			hub.PushScope()
			var err error
			flush, err = telemetry.StartSentry(telemetry.SentryOptions{DSN: reported.DSN(), TracesSampleRate: 1})
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(func() {
				hub.Client().Close()
				hub.PopScope()
			})
		})

		It("is a transaction that continues the client's trace, and the event joins it", func(ctx SpecContext) {
			api := start(ctx)
			Expect(api.create(ctx, `{"email":"ada@example.com"}`,
				"Traceparent: 00-"+traceID+"-"+parentID+"-00").status).To(Equal(http.StatusCreated))
			Eventually(ctx, reported.Transactions).Should(HaveLen(1))
			transaction := reported.Transactions()[0]
			Expect(transaction.Transaction).To(Equal("POST /v1/users"))
			Expect(transaction.TransactionInfo.Source).To(Equal("route"))
			trace := transaction.Contexts.Trace
			Expect(trace.TraceID).To(Equal(traceID))
			Expect(trace.ParentSpanID).To(Equal(parentID))
			Expect(trace.Op).To(Equal("http.server"))
			Expect(trace.Status).To(Equal("ok"))
			Expect(eventTraceparents(ctx)).To(Equal([]string{fmt.Sprintf("00-%s-%s-01", traceID, trace.SpanID)}))
			Expect(transaction.Tags).To(HaveKey("request_id"))
			Expect(string(transaction.Raw)).NotTo(Or(ContainSubstring(`"request":`), ContainSubstring("example.com")),
				"a request's URL, headers and body contain personal data")
		})

		It("begins a trace if the client sends none", func(ctx SpecContext) {
			created := start(ctx).create(ctx, `{"email":"ada@example.com"}`)
			Eventually(ctx, reported.Transactions).Should(HaveLen(1))
			trace := reported.Transactions()[0].Contexts.Trace
			traceparent := fmt.Sprintf("00-%s-%s-01", trace.TraceID, trace.SpanID)
			Expect(eventTraceparents(ctx)).To(Equal([]string{traceparent}))
			Expect(created.header.Get("Traceparent")).To(Equal(traceparent))
		})

		It("is a transaction even if the resource does not exist", func(ctx SpecContext) {
			start(ctx).get(ctx, "/v1/users/1")
			Eventually(ctx, reported.Transactions).Should(HaveLen(1))
			Expect(reported.Transactions()[0].Contexts.Trace.Status).To(Equal("not_found"))
			flush()
			Expect(reported.Errors()).To(BeEmpty())
		})

		It("reports a server error once, with the scope of the request", func(ctx SpecContext) {
			api := start(ctx, func(o *httpapi.Options) { o.Users = nil })
			failed := api.get(ctx, "/v1/users")
			expectProblem(failed, http.StatusInternalServerError, "internal-error")
			Eventually(ctx, reported.Transactions).Should(HaveLen(1))
			flush()
			Expect(reported.Errors()).To(HaveLen(1))
			fault := reported.Errors()[0]
			Expect(fault.Exception).To(HaveLen(1))
			Expect(fault.Exception[0].Value).To(ContainSubstring("nil pointer"))
			Expect(fault.Exception[0].Stacktrace.Frames).To(ContainElement(HaveField("Function", "(*Service).List")))
			Expect(fault.Tags).To(HaveKeyWithValue("request_id", failed.header.Get("X-Request-ID")))
			Expect(fault.Contexts.Trace.TraceID).To(Equal(reported.Transactions()[0].Contexts.Trace.TraceID))
		})
	})
})
