package telemetry_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"

	"github.com/getsentry/sentry-go"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"go.opentelemetry.io/otel/trace"

	"github.com/diehard-outbox/diehard/internal/otlptest"
	"github.com/diehard-outbox/diehard/internal/sentrytest"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

var _ = Describe("Traces", func() {
	var (
		collector *otlptest.Collector
		out       *bytes.Buffer
		options   telemetry.TracesOptions
	)

	BeforeEach(func() {
		collector = otlptest.Start()
		out = &bytes.Buffer{}
		options = telemetry.TracesOptions{
			Service: "diehard-api", Environment: "Staging", Version: "1.2.3",
			Log: slog.New(slog.NewTextHandler(out, nil)),
		}
	})

	setenv := func(variables ...string) {
		for _, variable := range variables {
			name, value, _ := strings.Cut(variable, "=")
			GinkgoT().Setenv(name, strings.NewReplacer("COLLECTOR", collector.URL(), "GRPC", collector.GRPC()).Replace(value))
		}
	}

	start := func(ctx context.Context) (trace.Tracer, func()) {
		GinkgoHelper()
		tracer, stop, err := telemetry.StartTraces(ctx, options)
		Expect(err).NotTo(HaveOccurred())
		return tracer, stop
	}

	DescribeTable("are on if the environment says so",
		func(ctx SpecContext, variables ...string) {
			setenv(variables...)
			tracer, stop := start(ctx)
			Expect(tracer).NotTo(BeNil())
			_, span := tracer.Start(ctx, "one")
			span.End()
			stop()
			Expect(collector.Spans()).To(ConsistOf(HaveField("Name", "one")))
			Expect(out.String()).To(BeEmpty())
		},
		Entry("by an endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
		Entry("by an endpoint for traces", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=COLLECTOR/v1/traces"),
		Entry("by an exporter", "OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
		Entry("with the protocol", "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
		Entry("with the protocol for traces", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
		Entry("by gRPC", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_EXPORTER_OTLP_ENDPOINT=GRPC"),
		Entry("if the SDK is not disabled", "OTEL_SDK_DISABLED=false", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
	)

	DescribeTable("are off otherwise",
		func(ctx SpecContext, variables ...string) {
			setenv(variables...)
			tracer, stop := start(ctx)
			Expect(tracer).To(BeNil())
			stop()
		},
		Entry("without variables"),
		Entry("if the endpoint is empty", "OTEL_EXPORTER_OTLP_ENDPOINT="),
		Entry("if other variables are set", "OTEL_SERVICE_NAME=api", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc"),
		Entry("if the SDK is disabled", "OTEL_SDK_DISABLED=True", "OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
		Entry("if the exporter is none", "OTEL_TRACES_EXPORTER=none", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
	)

	DescribeTable("refuse",
		func(ctx SpecContext, problem string, variables ...string) {
			setenv(variables...)
			_, _, err := telemetry.StartTraces(ctx, options)
			Expect(err).To(MatchError(problem))
		},
		Entry("another exporter", `OTEL_TRACES_EXPORTER is "zipkin", must be otlp or none`, "OTEL_TRACES_EXPORTER=zipkin"),
		Entry("another protocol", `OTEL_EXPORTER_OTLP_PROTOCOL is "http/xml", must be http/protobuf or grpc`,
			"OTEL_EXPORTER_OTLP_PROTOCOL=http/xml", "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR"),
		Entry("another protocol for traces", `OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is "http/json", must be http/protobuf or grpc`,
			"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/json", "OTEL_TRACES_EXPORTER=otlp"),
		Entry("an endpoint without a scheme, without quoting it", "OTEL_EXPORTER_OTLP_ENDPOINT is not a URL such as http://localhost:4318",
			"OTEL_EXPORTER_OTLP_ENDPOINT=s3cret@localhost:4318"),
	)

	It("name the program, its version and its environment, unless the environment variables do", func(ctx SpecContext) {
		setenv("OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR")
		export := func() map[string]any {
			tracer, stop := start(ctx)
			_, span := tracer.Start(ctx, "one")
			span.End()
			stop()
			spans := collector.Spans()
			return spans[len(spans)-1].Resource
		}
		Expect(export()).To(And(HaveKeyWithValue("service.name", "diehard-api"), HaveKeyWithValue("service.version", "1.2.3"),
			HaveKeyWithValue("deployment.environment.name", "Staging"), HaveKey("service.instance.id"), HaveKey("telemetry.sdk.version")))
		setenv("OTEL_SERVICE_NAME=signup", "OTEL_RESOURCE_ATTRIBUTES=deployment.environment.name=blue,team=growth")
		Expect(export()).To(And(HaveKeyWithValue("service.name", "signup"), HaveKeyWithValue("service.version", "1.2.3"),
			HaveKeyWithValue("deployment.environment.name", "blue"), HaveKeyWithValue("team", "growth")))
	})

	DescribeTable("are sampled",
		func(ctx SpecContext, flags trace.TraceFlags, spans int, variables ...string) {
			setenv(append(variables, "OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR")...)
			tracer, stop := start(ctx)
			_, span := tracer.Start(ofTrace(ctx, 1, flags), "one")
			span.End()
			stop()
			Expect(collector.Spans()).To(HaveLen(spans))
		},
		Entry("as their parent is", trace.FlagsSampled, 1),
		Entry("unless their parent is not", trace.TraceFlags(0), 0),
		Entry("by OTEL_TRACES_SAMPLER", trace.TraceFlags(0), 1, "OTEL_TRACES_SAMPLER=always_on"),
	)

	It("log failed exports once a minute", func(ctx SpecContext) {
		closed, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		Expect(closed.Close()).To(Succeed())
		setenv("OTEL_EXPORTER_OTLP_ENDPOINT=http://"+closed.Addr().String(), "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=1")
		tracer, stop := start(ctx)
		for range 10 {
			_, span := tracer.Start(ctx, "one")
			span.End()
		}
		stop()
		Expect(strings.Split(strings.TrimSpace(out.String()), "\n")).To(HaveExactElements(And(
			ContainSubstring(`level=WARN msg="exporting traces failed"`), ContainSubstring("connection refused"))))
	})

	Describe("with Sentry", func() {
		var (
			server *sentrytest.Listener
			log    *slog.Logger
		)

		// startBoth starts traces and Sentry, and returns a function that sends everything.
		startBoth := func(ctx context.Context) (trace.Tracer, func()) {
			GinkgoHelper()
			hub := sentry.CurrentHub()
			hub.PushScope() // Sentry's state belongs to the process
			DeferCleanup(func() {
				hub.Client().Close()
				hub.PopScope()
			})
			tracer, stop := start(ctx)
			options.Sentry.Spans = true
			flush, err := telemetry.StartSentry(options.Sentry)
			Expect(err).NotTo(HaveOccurred())
			return tracer, func() {
				stop()
				flush()
			}
		}

		BeforeEach(func() {
			server = sentrytest.Start()
			log = telemetry.NewLogger(out, telemetry.LogOptions{})
			options.Sentry = telemetry.SentryOptions{DSN: server.DSN(), TracesSampleRate: 1}
			// Sentry must not get the headers and the protocol of the collector.
			setenv("OTEL_EXPORTER_OTLP_ENDPOINT=COLLECTOR", "OTEL_EXPORTER_OTLP_HEADERS=Authorization=s3cret,X-Sentry-Auth=no")
		})

		It("reach Sentry too, which gets no transactions", func(ctx SpecContext) {
			tracer, stop := startBoth(ctx)
			_, span := tracer.Start(ctx, "one")
			sentry.StartTransaction(ctx, "two").Finish()
			span.End()
			stop()
			Expect(collector.Spans()).To(ConsistOf(HaveField("Name", "one")))
			Expect(server.Spans()).To(ConsistOf(And(HaveField("Name", "one"), HaveField("ID", collector.Spans()[0].ID))))
			Expect(server.Transactions()).To(BeEmpty())
		})

		It("reach Sentry for a share of the traces", func(ctx SpecContext) {
			options.Sentry.TracesSampleRate = 0.5
			tracer, stop := startBoth(ctx)
			for n := range byte(8) {
				for range 2 {
					_, span := tracer.Start(ofTrace(ctx, n<<5, trace.FlagsSampled), "one")
					span.End()
				}
			}
			stop()
			Expect(collector.Spans()).To(HaveLen(16))
			traces := map[string]int{}
			for _, span := range server.Spans() {
				traces[span.Trace]++
			}
			Expect(traces).To(And(HaveLen(4), HaveEach(2)))
		})

		It("do not reach Sentry at a rate of 0", func(ctx SpecContext) {
			options.Sentry.TracesSampleRate = 0
			tracer, stop := startBoth(ctx)
			_, span := tracer.Start(ctx, "one")
			span.End()
			stop()
			Expect(collector.Spans()).To(HaveLen(1))
			Expect(server.Spans()).To(BeEmpty())
		})

		It("contain the errors that Sentry receives", func(ctx SpecContext) {
			tracer, stop := startBoth(ctx)
			inSpan, span := tracer.Start(ctx, "one")
			log.ErrorContext(inSpan, "failed", "err", errors.New("no"))
			span.End()
			stop()
			Expect(server.Errors()).To(HaveLen(1))
			linked := server.Errors()[0].Contexts.Trace
			Expect(linked.TraceID).To(Equal(span.SpanContext().TraceID().String()))
			Expect(linked.SpanID).To(Equal(span.SpanContext().SpanID().String()))
		})
	})
})

// ofTrace returns a context with a remote parent. first is the first byte of the part of the
// trace id that decides about the share.
func ofTrace(ctx context.Context, first byte, flags trace.TraceFlags) context.Context {
	return trace.ContextWithRemoteSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{0: 1, 8: first}, SpanID: trace.SpanID{1}, TraceFlags: flags, Remote: true,
	}))
}
