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
)

// flushTimeout bounds how long a program that ends waits for Sentry.
const flushTimeout = 3 * time.Second

// SentryOptions configure StartSentry.
type SentryOptions struct {
	// DSN is the project's; empty turns Sentry off.
	DSN string
	// Environment and Release are shown with everything that is reported.
	Environment, Release string
	// TracesSampleRate is the share of the transactions that are sent, from 0,
	// none, to 1, all. Errors are all sent.
	TracesSampleRate float64
}

// StartSentry turns Sentry on for the process: loggers of this package report
// to it, and sentry.StartTransaction works. Before the program ends it calls
// flush, which sends what is left within some seconds. Without a DSN both do
// nothing. Nothing is collected but what is reported; no personal data.
func StartSentry(o SentryOptions) (flush func(), err error) {
	if o.DSN == "" {
		// Not left to sentry.Init, which would take a DSN from SENTRY_DSN.
		return func() {}, nil
	}
	if err := CheckSentryDSN(o.DSN); err != nil {
		return nil, err
	}
	err = sentry.Init(sentry.ClientOptions{
		Dsn:              o.DSN,
		Environment:      o.Environment,
		Release:          o.Release,
		EnableTracing:    o.TracesSampleRate > 0,
		TracesSampleRate: o.TracesSampleRate,
		AttachStacktrace: true,
		Integrations:     withoutModules,
		// None: by default a transaction that was answered with 404 is dropped.
		TraceIgnoreStatusCodes: [][]int{},
	})
	if err != nil {
		return nil, errors.New("sentry cannot be started with these options") // its error may quote the DSN
	}
	return func() { sentry.Flush(flushTimeout) }, nil
}

// withoutModules keeps the list of all Go modules out of every event: the
// release says it.
func withoutModules(integrations []sentry.Integration) []sentry.Integration {
	return slices.DeleteFunc(integrations, func(i sentry.Integration) bool { return i.Name() == "Modules" })
}

// CheckSentryDSN returns an error where the DSN is none. Its text holds no part
// of the DSN.
func CheckSentryDSN(dsn string) error {
	if _, err := sentry.NewDsn(dsn); err != nil {
		return errors.New("not a Sentry DSN: use https://KEY@HOST/PROJECT")
	}
	return nil
}

// ErrorKey is the attribute whose error a record reports.
const ErrorKey = "err"

// sentryHandler passes every record on to the next handler, and reports those
// of errors to Sentry. (sentry-go's own slog handler makes no error events,
// only entries of Sentry's log store.)
type sentryHandler struct {
	next slog.Handler
	// err and attrs are the logger's own, and prefix is its groups' names, joined
	// and ended by dots.
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
	return h.next.Handle(ctx, record) //nolint:wrapcheck // passes the record on
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
	// The event belongs to the context's span, whatever another goroutine has
	// begun on the same hub.
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

// errorOf returns the error that the attribute reports, in whatever group, or
// nil.
func errorOf(attr slog.Attr) error {
	if attr.Key != ErrorKey {
		return nil
	}
	err, _ := attr.Value.Any().(error)
	return err
}

func addAttribute(to sentry.Context, prefix string, attr slog.Attr) {
	if attr.Equal(slog.Attr{}) {
		return // as slog.Handler asks
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
			to[key] = value.String() // JSON has none, and the event would be lost
		} else {
			to[key] = number
		}
	default:
		to[key] = value.String()
	}
}

var ownPackage = reflect.TypeFor[sentryHandler]().PkgPath()

// dropOwnFrames has the stack end where the error was logged.
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
