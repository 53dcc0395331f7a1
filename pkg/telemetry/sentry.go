package telemetry

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/getsentry/sentry-go"
	"go.opentelemetry.io/otel/trace"
)

// flushTimeout limits how long a program waits for Sentry before it exits.
const flushTimeout = 3 * time.Second

// SentryOptions configures StartSentry.
type SentryOptions struct {
	// DSN is the DSN of the Sentry project. If it is empty, Sentry is off.
	DSN string
	// Environment and Release are attached to all reports.
	Environment, Release string
	// TracesSampleRate is the fraction of transactions to send, from 0 to 1. All
	// errors are sent.
	TracesSampleRate float64
	// Spans says that the program has spans of OpenTelemetry. Errors then belong to these
	// spans, and Sentry gets no transactions: see TracesOptions.
	Spans bool
}

// StartSentry turns Sentry on for the process. Loggers of this package then report
// errors, and sentry.StartTransaction reports transactions. The program must call flush
// before it exits; flush sends pending reports within 3 seconds. Without a DSN,
// StartSentry and flush do nothing. Reports contain no personal data and no data beyond
// the logged attributes.
func StartSentry(o SentryOptions) (flush func(), err error) {
	if o.DSN == "" {
		// sentry.Init would read the DSN from SENTRY_DSN.
		return func() {}, nil
	}
	if err := CheckSentryDSN(o.DSN); err != nil {
		return nil, err
	}
	if o.Spans {
		o.TracesSampleRate = 0
	}
	err = sentry.Init(sentry.ClientOptions{
		Dsn:              o.DSN,
		Environment:      o.Environment,
		Release:          o.Release,
		EnableTracing:    o.TracesSampleRate > 0,
		TracesSampleRate: o.TracesSampleRate,
		AttachStacktrace: true,
		Integrations:     withoutModules,
		// By default Sentry drops transactions with status 404.
		TraceIgnoreStatusCodes: [][]int{},
	})
	if err != nil {
		return nil, errors.New("start sentry: invalid options") // the error of Init can quote the DSN
	}
	if o.Spans {
		sentry.CurrentHub().Client().SetExternalContextTraceResolver(spanIDs)
	}
	return func() { sentry.Flush(flushTimeout) }, nil
}

// spanIDs returns the ids of the context's span of OpenTelemetry.
func spanIDs(ctx context.Context) (sentry.TraceID, sentry.SpanID, bool) {
	span := trace.SpanContextFromContext(ctx)
	return sentry.TraceID(span.TraceID()), sentry.SpanID(span.SpanID()), span.IsValid()
}

// withoutModules removes the list of Go modules from events. The release identifies
// them.
func withoutModules(integrations []sentry.Integration) []sentry.Integration {
	return slices.DeleteFunc(integrations, func(i sentry.Integration) bool { return i.Name() == "Modules" })
}

// CheckSentryDSN returns an error if the DSN is invalid. The error does not quote the
// DSN.
func CheckSentryDSN(dsn string) error {
	if _, err := sentry.NewDsn(dsn); err != nil {
		return errors.New("not a Sentry DSN: use https://KEY@HOST/PROJECT")
	}
	return nil
}

// ErrorKey is the key of the attribute with the error of a record.
const ErrorKey = "err"

// sentryHandler passes every record to the next handler and reports records of the
// level ERROR to Sentry. sentry-go's own slog handler creates entries of Sentry's log
// store instead of error events.
type sentryHandler struct {
	next slog.Handler
	// err and attrs come from WithAttrs. prefix is the names of the groups, each
	// followed by a dot.
	err    error
	attrs  []slog.Attr
	prefix string
}

// Enabled implements slog.Handler.
func (h *sentryHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

// WithAttrs implements slog.Handler.
func (h *sentryHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.next = h.next.WithAttrs(attrs)
	with.attrs = slices.Clone(h.attrs)
	for _, attr := range attrs {
		if err := errorOf(attr); err != nil {
			with.err = err
			continue
		}
		attr.Key = h.prefix + attr.Key
		with.attrs = append(with.attrs, attr)
	}
	return &with
}

// WithGroup implements slog.Handler.
func (h *sentryHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	with := *h
	with.next = h.next.WithGroup(name)
	with.prefix = h.prefix + name + "."
	return &with
}

// Handle implements slog.Handler.
func (h *sentryHandler) Handle(ctx context.Context, record slog.Record) error {
	if record.Level >= slog.LevelError {
		h.report(ctx, record)
	}
	return h.next.Handle(ctx, record) //nolint:wrapcheck // the error of the next handler
}

func (h *sentryHandler) report(ctx context.Context, record slog.Record) {
	hub := sentry.GetHubFromContext(ctx)
	if hub == nil {
		hub = sentry.CurrentHub()
	}
	client := hub.Client()
	if client == nil {
		return
	}
	// The event belongs to the span of ctx. Another goroutine can set its span on the
	// shared hub.
	hub = hub.Clone()
	hub.Scope().SetSpan(sentry.SpanFromContext(ctx))

	attributes, err := sentry.Context{}, h.err
	for _, attr := range h.attrs {
		addAttribute(attributes, "", attr)
	}
	record.Attrs(func(attr slog.Attr) bool {
		if cause := errorOf(attr); cause != nil {
			err = cause
		} else {
			addAttribute(attributes, h.prefix, attr)
		}
		return true
	})

	var event *sentry.Event
	if err != nil {
		event = client.EventFromException(err, sentry.LevelError)
		event.Message = record.Message
	} else {
		event = client.EventFromMessage(record.Message, sentry.LevelError)
	}
	event.Timestamp = record.Time
	event.Logger = "slog"
	if len(attributes) > 0 {
		event.Contexts["log"] = attributes
	}
	for i := range event.Exception {
		dropOwnFrames(event.Exception[i].Stacktrace)
	}
	for i := range event.Threads {
		dropOwnFrames(event.Threads[i].Stacktrace)
	}
	hub.CaptureEventWithHint(event, &sentry.EventHint{Context: ctx, OriginalException: err})
}

// errorOf returns the error in the attribute err, in any group, or nil.
func errorOf(attr slog.Attr) error {
	if attr.Key != ErrorKey {
		return nil
	}
	err, _ := attr.Value.Any().(error)
	return err
}

func addAttribute(to sentry.Context, prefix string, attr slog.Attr) {
	if attr.Equal(slog.Attr{}) {
		return // a slog.Handler must ignore an empty attribute
	}
	key, value := prefix+attr.Key, attr.Value.Resolve()
	switch value.Kind() {
	case slog.KindGroup:
		if attr.Key != "" {
			key += "."
		}
		for _, member := range value.Group() {
			addAttribute(to, key, member)
		}
	case slog.KindBool, slog.KindInt64, slog.KindUint64:
		to[key] = value.Any()
	case slog.KindFloat64:
		if number := value.Float64(); math.IsNaN(number) || math.IsInf(number, 0) {
			to[key] = value.String() // JSON cannot represent it, and the event would be lost
		} else {
			to[key] = number
		}
	default:
		to[key] = value.String()
	}
}

var ownPackage = reflect.TypeFor[sentryHandler]().PkgPath()

// dropOwnFrames removes the frames of the logger from the end of the stack.
func dropOwnFrames(stack *sentry.Stacktrace) {
	if stack == nil {
		return
	}
	for len(stack.Frames) > 0 {
		last := stack.Frames[len(stack.Frames)-1]
		if last.Module != ownPackage && !strings.HasPrefix(last.Module, "log/slog") {
			return
		}
		stack.Frames = stack.Frames[:len(stack.Frames)-1]
	}
}
