package telemetry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"testing"
	"time"

	"github.com/getsentry/sentry-go"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/sentrytest"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

func TestTelemetry(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "telemetry")
}

var _ = Describe("The log", func() {
	It("writes one JSON object per record, with durations in seconds", func(ctx SpecContext) {
		var out bytes.Buffer
		log := telemetry.NewLogger(&out, telemetry.LogOptions{Level: slog.LevelInfo})
		log.DebugContext(ctx, "left out")
		log.With("batch_id", 7).InfoContext(ctx, "flushed", "duration", 1500*time.Millisecond, "err", errors.New("no"))
		var record map[string]any
		Expect(json.Unmarshal(out.Bytes(), &record)).To(Succeed())
		Expect(record).To(HaveKeyWithValue("level", "INFO"))
		Expect(record).To(HaveKeyWithValue("msg", "flushed"))
		Expect(record).To(HaveKeyWithValue("batch_id", 7.0))
		Expect(record).To(HaveKeyWithValue("duration", 1.5))
		Expect(record).To(HaveKeyWithValue("err", "no"))
	})

	It("writes text", func(ctx SpecContext) {
		var out bytes.Buffer
		log := telemetry.NewLogger(&out, telemetry.LogOptions{Level: slog.LevelDebug, Format: telemetry.Text})
		log.DebugContext(ctx, "flushed", "duration", 1500*time.Millisecond)
		Expect(out.String()).To(HaveSuffix("level=DEBUG msg=flushed duration=1.5s\n"))
	})

	DescribeTable("parses the level", func(name string, level slog.Level) {
		Expect(telemetry.ParseLevel(name)).To(Equal(level))
	},
		Entry(nil, "debug", slog.LevelDebug), Entry(nil, "info", slog.LevelInfo),
		Entry(nil, "warn", slog.LevelWarn), Entry(nil, "error", slog.LevelError),
	)

	It("refuses an unknown level", func() {
		_, err := telemetry.ParseLevel("INFO")
		Expect(err).To(MatchError(`unknown level "INFO": must be debug, info, warn or error`))
	})
})

var _ = Describe("Sentry", func() {
	var (
		server *sentrytest.Listener
		out    *bytes.Buffer
		log    *slog.Logger
		flush  func()
	)

	start := func(o telemetry.SentryOptions) {
		GinkgoHelper()
		// StartSentry changes the state of the process, so each spec restores it.
		hub := sentry.CurrentHub()
		hub.PushScope()
		DeferCleanup(func() {
			hub.Client().Close()
			hub.PopScope()
		})
		var err error
		flush, err = telemetry.StartSentry(o)
		Expect(err).NotTo(HaveOccurred())
	}

	BeforeEach(func() {
		server = sentrytest.Start()
		out = &bytes.Buffer{}
		log = telemetry.NewLogger(out, telemetry.LogOptions{Level: slog.LevelInfo})
	})

	It("receives an error with its cause, its attributes and the stack of the log call", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN(), Environment: "Staging", Release: "diehard@1.2.3", TracesSampleRate: 1})
		cause := &net.AddrError{Err: "connection refused", Addr: "x"}
		log.With("batch_id", "b").WithGroup("sink").With("table", "t").
			LogAttrs(ctx, slog.LevelError, "the flush failed", slog.Any("err", fmt.Errorf("flush: %w", cause)),
				slog.Int("attempt", 3), slog.Group("of", "rows", 5), slog.Duration("took", 1500*time.Millisecond),
				slog.Float64("rate", 0.5), slog.Float64("share", math.NaN()), slog.Bool("last", true), slog.Attr{})
		flush()

		Expect(server.Errors()).To(HaveLen(1))
		event := server.Errors()[0]
		Expect(event.Level).To(Equal("error"))
		Expect(event.Message).To(Equal("the flush failed"))
		Expect(event.Environment).To(Equal("Staging"))
		Expect(event.Release).To(Equal("diehard@1.2.3"))
		Expect(event.Exception).To(HaveLen(2))
		Expect(event.Exception[0].Type).To(Equal("*net.AddrError"))
		Expect(event.Exception[0].Value).To(Equal("address x: connection refused"))
		Expect(event.Exception[1].Type).To(Equal("*fmt.wrapError"))
		Expect(event.Exception[1].Value).To(Equal("flush: address x: connection refused"))
		expectToEndHere(event.Exception[1].Stacktrace)
		Expect(event.Contexts.Log).To(Equal(map[string]any{
			"batch_id": "b", "sink.table": "t", "sink.attempt": 3.0, "sink.of.rows": 5.0,
			"sink.took": "1.5s", "sink.rate": 0.5, "sink.last": true, "sink.share": "NaN",
		}))
		Expect(out.String()).To(ContainSubstring("the flush failed"), "also in the log")
	})

	It("receives an error that was added to the logger", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN()})
		log.WithGroup("sink").With("err", errors.New("connection refused")).ErrorContext(ctx, "the flush failed")
		flush()
		Expect(server.Errors()).To(HaveLen(1))
		event := server.Errors()[0]
		Expect(event.Exception).To(ConsistOf(HaveField("Value", "connection refused")))
		Expect(event.Contexts.Log).To(BeEmpty())
	})

	It("receives no user, no request and no modules", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN(), TracesSampleRate: 1})
		log.ErrorContext(ctx, "failed", "err", errors.New("no"))
		sentry.StartTransaction(ctx, "one").Finish()
		flush()
		events := append(server.Errors(), server.Transactions()...)
		Expect(events).To(HaveLen(2))
		for _, event := range events {
			var members map[string]any
			Expect(json.Unmarshal(event.Raw, &members)).To(Succeed())
			Expect(members).NotTo(Or(HaveKey("modules"), HaveKey("user"), HaveKey("request"), HaveKey("breadcrumbs")))
		}
	})

	It("receives an error without a cause", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN()})
		log.ErrorContext(ctx, "that should not be")
		flush()
		Expect(server.Errors()).To(HaveLen(1))
		event := server.Errors()[0]
		Expect(event.Message).To(Equal("that should not be"))
		Expect(event.Exception).To(BeEmpty())
		Expect(event.Threads).To(HaveLen(1))
		expectToEndHere(event.Threads[0].Stacktrace)
	})

	It("receives no warnings and no records below the log's level", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN()})
		log.WarnContext(ctx, "look", "err", errors.New("no harm"))
		telemetry.NewLogger(out, telemetry.LogOptions{Level: slog.LevelError + 1}).ErrorContext(ctx, "quiet")
		flush()
		Expect(server.Errors()).To(BeEmpty())
	})

	It("joins the error to the transaction of its context", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN(), TracesSampleRate: 1})
		one := sentry.StartTransaction(ctx, "one")
		other := sentry.StartTransaction(ctx, "other") // later, on the same hub
		log.ErrorContext(one.Context(), "failed")
		other.Finish()
		one.Finish()
		flush()
		Expect(server.Transactions()).To(ConsistOf(HaveField("Transaction", "one"), HaveField("Transaction", "other")))
		Expect(server.Errors()).To(HaveLen(1))
		trace := server.Errors()[0].Contexts.Trace
		Expect(trace.TraceID).To(Equal(one.TraceID.String()))
		Expect(trace.SpanID).To(Equal(one.SpanID.String()))
		Expect(trace.TraceID).NotTo(Equal(other.TraceID.String()))
	})

	It("receives all transactions at a rate of 1, including those with status 404", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN(), TracesSampleRate: 1})
		for _, status := range []int{200, 404, 500} {
			transaction := sentry.StartTransaction(ctx, fmt.Sprint("status ", status))
			transaction.SetData("http.response.status_code", status)
			transaction.Finish()
		}
		flush()
		Expect(server.Transactions()).To(ConsistOf(HaveField("Transaction", "status 200"),
			HaveField("Transaction", "status 404"), HaveField("Transaction", "status 500")))
	})

	It("receives pending reports when the program ends", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN()})
		const many = 50
		for range many {
			log.ErrorContext(ctx, "failed")
		}
		flush()
		Expect(server.Errors()).To(HaveLen(many))
	})

	It("receives the tags of the context's hub", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN()})
		hub := sentry.CurrentHub().Clone()
		hub.Scope().SetTag("request_id", "r-1")
		log.ErrorContext(sentry.SetHubOnContext(ctx, hub), "failed")
		log.ErrorContext(ctx, "failed elsewhere")
		flush()
		Expect(server.Errors()).To(ConsistOf(
			And(HaveField("Message", "failed"), HaveField("Tags", HaveKeyWithValue("request_id", "r-1"))),
			And(HaveField("Message", "failed elsewhere"), HaveField("Tags", Not(HaveKey("request_id")))),
		))
	})

	It("receives no transactions at a rate of 0", func(ctx SpecContext) {
		start(telemetry.SentryOptions{DSN: server.DSN()})
		sentry.StartTransaction(ctx, "one").Finish()
		log.ErrorContext(ctx, "failed")
		flush()
		Expect(server.Transactions()).To(BeEmpty())
		Expect(server.Errors()).To(HaveLen(1))
	})

	It("is off without a DSN, even if SENTRY_DSN is set", func(ctx SpecContext) {
		GinkgoT().Setenv("SENTRY_DSN", server.DSN())
		start(telemetry.SentryOptions{})
		log.ErrorContext(ctx, "failed")
		sentry.StartTransaction(ctx, "one").Finish()
		flush()
		Expect(sentry.CurrentHub().Client().IsEnabled()).To(BeFalse())
		Expect(server.Errors()).To(BeEmpty())
		Expect(server.Transactions()).To(BeEmpty())
	})

	It("refuses an invalid DSN without quoting it", func() {
		for _, dsn := range []string{"https://s3cret@", "s3cret", "https://s3cret@host/"} {
			_, err := telemetry.StartSentry(telemetry.SentryOptions{DSN: dsn})
			Expect(err).To(MatchError(ContainSubstring("not a Sentry DSN")))
			Expect(err.Error()).NotTo(ContainSubstring("s3cret"))
		}
		Expect(telemetry.CheckSentryDSN(server.DSN())).To(Succeed())
	})
})

// expectToEndHere expects the stack to end in the spec that logged the error.
func expectToEndHere(stack sentrytest.Stacktrace) {
	GinkgoHelper()
	Expect(stack.Frames).NotTo(BeEmpty())
	Expect(stack.Frames[len(stack.Frames)-1].Module).To(HaveSuffix("/telemetry_test"))
}
