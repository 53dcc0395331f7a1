package relay

import (
	"context"
	"errors"
	"time"

	"github.com/lib/pq"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// The spans follow these conventions, but have no texts of errors and no queries, because
// both can contain data of events:
// https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
// https://opentelemetry.io/docs/specs/semconv/db/database-spans/

// recordCut records a cut that began at start as a span, unless it found nothing to do or
// the relay stops. So an idle relay makes no spans.
func (r *Relay) recordCut(ctx context.Context, start time.Time, cut store.Cut, err error) {
	if cut.Batches == 0 && (err == nil || ctx.Err() != nil) {
		return
	}
	_, span := r.tracer.Start(ctx, "cut outbox_events", trace.WithTimestamp(start), trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(
			semconv.DBSystemNamePostgreSQL, semconv.DBCollectionName("outbox_events"), semconv.DBOperationName("INSERT"),
			attribute.Int("diehard.batches", cut.Batches), attribute.Int("diehard.events", cut.Events),
		))
	defer span.End()
	recordError(span, err)
}

// attemptAttributes describe an attempt at a batch.
func attemptAttributes(lease *store.Lease) trace.SpanStartEventOption {
	return trace.WithAttributes(
		semconv.MessagingSystemKey.String("diehard"),
		semconv.MessagingDestinationName("outbox_events"),
		semconv.MessagingOperationName("deliver"),
		semconv.MessagingOperationTypeProcess,
		semconv.MessagingBatchMessageCount(lease.Events),
		attribute.String("diehard.batch.id", lease.ID.String()),
		attribute.Int("diehard.batch.attempt", lease.Attempts),
	)
}

// inFlushSpan runs an insert of the events in a span. The span links to the requests of the
// events.
func (d *delivery) inFlushSpan(ctx context.Context, events *store.Events, insert func(ctx context.Context) error) error {
	links := d.links
	if events != d.events { // a sample
		links = linksTo(ctx, events)
	}
	return d.inSinkSpan(ctx, "flush", func(ctx context.Context, _ trace.Span) error { return insert(ctx) }, trace.WithLinks(links...),
		trace.WithAttributes(semconv.DBOperationName("INSERT"), semconv.DBOperationBatchSize(len(events.ID))))
}

// inSinkSpan runs an operation of the sink in a span.
func (d *delivery) inSinkSpan(
	ctx context.Context, operation string, run func(ctx context.Context, span trace.Span) error, options ...trace.SpanStartOption,
) error {
	ctx, span := d.tracer.Start(ctx, operation+targetOf(d.o.SinkAttributes), append(options,
		trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(d.o.SinkAttributes.ToSlice()...))...)
	defer span.End()
	err := run(ctx, span)
	recordError(span, err)
	return err
}

// targetOf returns the suffix of the names of the sink's spans.
func targetOf(sinkAttributes attribute.Set) string {
	if name, ok := sinkAttributes.Value(semconv.DBCollectionNameKey); ok {
		return " " + name.AsString()
	}
	return ""
}

// inSettleSpan runs settle in a span. delivered is the number of events that leave the
// outbox.
func (d *delivery) inSettleSpan(ctx context.Context, delivered int, settle func(ctx context.Context) error) error {
	ctx, span := d.tracer.Start(ctx, "settle outbox_events", trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
		semconv.DBSystemNamePostgreSQL, semconv.DBCollectionName("outbox_events"), semconv.DBOperationName("DELETE"),
		semconv.DBOperationBatchSize(delivered),
	))
	defer span.End()
	err := settle(ctx)
	recordError(span, err)
	return err
}

// recordError sets the status of the span, and the type of the error.
func recordError(span trace.Span, err error) {
	if err == nil || !span.IsRecording() {
		return
	}
	span.SetStatus(codes.Error, "")
	if server, ok := errors.AsType[*pq.Error](err); ok {
		span.SetAttributes(semconv.ErrorTypeKey.String(string(server.Code)), semconv.DBResponseStatusCode(string(server.Code)))
		return
	}
	span.SetAttributes(semconv.ErrorTypeKey.String(sink.ClassOf(err).String()))
}

// maxLinks bounds the links of a span. It is below the default of
// OTEL_SPAN_LINK_COUNT_LIMIT, which is 128.
const maxLinks = 100

// link links the attempt to the requests of the events.
func (d *delivery) link(ctx context.Context, events *store.Events) {
	if d.links != nil {
		return // an earlier step has linked it
	}
	d.links = linksTo(ctx, events)
	span := trace.SpanFromContext(ctx)
	for _, link := range d.links {
		span.AddLink(link)
	}
}

// linksTo returns links to the sampled traces of the events, at most maxLinks. It returns
// none if the context's span is not recorded.
func linksTo(ctx context.Context, events *store.Events) (links []trace.Link) {
	if !trace.SpanFromContext(ctx).IsRecording() {
		return nil
	}
	seen := map[string]bool{}
	for i := range events.Traceparent.Len() {
		traceparent, err := outbox.ParseTraceparent(string(events.Traceparent.At(i)))
		if err != nil || !traceparent.Sampled() || seen[traceparent.TraceID()] {
			continue
		}
		seen[traceparent.TraceID()] = true
		links = append(links, linkTo(traceparent))
		if len(links) == maxLinks {
			break
		}
	}
	return links
}

func linkTo(t outbox.Traceparent) trace.Link {
	traceID, _ := trace.TraceIDFromHex(t.TraceID()) // a valid traceparent has valid ids
	parentID, _ := trace.SpanIDFromHex(t.ParentID())
	return trace.Link{SpanContext: trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: traceID, SpanID: parentID, TraceFlags: trace.FlagsSampled, Remote: true,
	})}
}
