package relay

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/getsentry/sentry-go"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

const (
	// maxTraces bounds the transactions that a batch reports to Sentry. The events of a
	// batch may come from 50,000 requests.
	maxTraces = 100
	// maxTypes bounds the event types that a transaction names.
	maxTypes = 10
	// maxLoggedTraces bounds the traces that one log line names.
	maxLoggedTraces = 10
)

// sampledTrace is one trace, with the batch's events that belong to it.
type sampledTrace struct {
	id, parent string
	events     int
	types      []string
	published  int64 // when the first of the events was published, in microseconds since 1970
}

// sampledTraces returns the events' sampled traces, at most maxTraces. The publisher has
// decided which traces are sampled. If Sentry's tracing is off, sampledTraces returns
// none.
func sampledTraces(events *store.Events) []*sampledTrace {
	client := sentry.CurrentHub().Client()
	if !client.IsEnabled() || !client.Options().EnableTracing {
		return nil
	}
	var traces []*sampledTrace
	byID := make(map[string]*sampledTrace)
	for i, published := range events.PublishedAt {
		traceparent, err := outbox.ParseTraceparent(string(events.Traceparent.At(i)))
		if err != nil || !traceparent.Sampled() {
			continue
		}
		id := traceparent.TraceID()
		found := byID[id]
		if found == nil {
			if len(traces) == maxTraces {
				continue
			}
			found = &sampledTrace{id: id, parent: traceparent.ParentID(), published: published}
			byID[id] = found
			traces = append(traces, found)
		}
		found.events++
		found.published = min(found.published, published)
		if eventType := events.EventType.At(i); len(found.types) < maxTypes && !slices.Contains(found.types, eventType) {
			found.types = append(found.types, eventType)
		}
	}
	return traces
}

// report adds the delivery to each trace of the events, as a transaction. The transaction
// begins when the first event of the trace was published. It continues the request of
// that event and keeps the request's sampling decision. If each delivery made its own
// decision, a sample rate of 10 % would leave only 1 % of the traces complete.
func (d *delivery) report(events *store.Events, acknowledged time.Time) {
	traces := sampledTraces(events)
	if len(traces) == 0 {
		return
	}
	// In the delivery's context Sentry would add these transactions to the delivery's
	// transaction, as spans. They also need their own hub: a started transaction stays in
	// its hub, and all workers share one hub.
	ctx := sentry.SetHubOnContext(context.Background(), sentry.CurrentHub().Clone())
	for _, trace := range traces {
		published := time.UnixMicro(trace.published).Add(-d.skew)
		transaction := sentry.StartTransaction(ctx, "deliver",
			sentry.ContinueFromHeaders(trace.id+"-"+trace.parent+"-1", ""),
			sentry.WithOpName("queue.process"),
			sentry.WithTransactionSource(sentry.SourceTask),
			func(span *sentry.Span) { span.StartTime = published },
		)
		transaction.Status = sentry.SpanStatusOK
		transaction.SetData("batch_id", d.lease.ID.String())
		transaction.SetData("events", trace.events)
		transaction.SetData("event_types", trace.types)
		transaction.SetData("attempt", d.lease.Attempts)
		// https://docs.sentry.io/platforms/go/tracing/instrumentation/custom-instrumentation/queues-module/
		transaction.SetData("messaging.destination.name", "outbox_events")
		transaction.SetData("messaging.message.receive.latency", max(0, d.start.Sub(published).Milliseconds()))
		transaction.EndTime = acknowledged
		transaction.Finish()
	}
}

// logWithTraces returns the log with the first maxLoggedTraces traces of the events,
// sampled or not.
func (d *delivery) logWithTraces(events *store.Events) *slog.Logger {
	var ids []string
	for i := range events.Traceparent.Len() {
		traceparent, err := outbox.ParseTraceparent(string(events.Traceparent.At(i)))
		if err != nil || slices.Contains(ids, traceparent.TraceID()) {
			continue
		}
		ids = append(ids, traceparent.TraceID())
		if len(ids) == maxLoggedTraces {
			break
		}
	}
	if ids == nil {
		return d.log
	}
	return d.log.With("trace_ids", ids)
}
