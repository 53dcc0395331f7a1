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
	// maxTraces bounds the transactions that a batch reports to Sentry. Its events may
	// come from 50,000 requests.
	maxTraces = 100
	// maxTypes bounds the event types that a transaction names.
	maxTypes = 10
	// maxLoggedTraces bounds the traces that one line of the log names.
	maxLoggedTraces = 10
)

// delivered is what metrics and traces need of events after they are settled.
type delivered struct {
	published []int64 // in microseconds since 1970, by the database's clock
	traces    traces
}

func newDelivered(events int) *delivered {
	return &delivered{published: make([]int64, 0, events), traces: newTraces()}
}

func (e *delivered) add(record *store.Record) {
	e.published = append(e.published, record.PublishedAt.UnixMicro())
	e.traces.add(record)
}

func (e *delivered) addAll(records []store.Record) *delivered {
	for i := range records {
		e.add(&records[i])
	}
	return e
}

// traces are the first maxTraces traces of the events that the publisher has sampled.
type traces struct {
	byID    map[string]*trace // nil if Sentry is off
	inOrder []*trace
}

// trace is one trace, with the batch's events of it.
type trace struct {
	id, parent string
	events     int
	types      []string
	published  time.Time // when the first of the events was published
}

func newTraces() traces {
	client := sentry.CurrentHub().Client()
	if !client.IsEnabled() || !client.Options().EnableTracing {
		return traces{}
	}
	return traces{byID: make(map[string]*trace)}
}

func (t *traces) add(record *store.Record) {
	if t.byID == nil {
		return
	}
	traceparent, err := outbox.ParseTraceparent(record.Traceparent)
	if err != nil || !traceparent.Sampled() {
		return
	}
	id := traceparent.TraceID()
	found := t.byID[id]
	if found == nil {
		if len(t.inOrder) == maxTraces {
			return
		}
		found = &trace{id: id, parent: traceparent.ParentID(), published: record.PublishedAt}
		t.byID[id] = found
		t.inOrder = append(t.inOrder, found)
	}
	found.events++
	if record.PublishedAt.Before(found.published) {
		found.published = record.PublishedAt
	}
	if len(found.types) < maxTypes && !slices.Contains(found.types, record.EventType) {
		found.types = append(found.types, record.EventType)
	}
}

// report adds the delivery to each trace, as a transaction that begins when the
// first of the trace's events was published. It continues that event's request with
// its sampling decision. A new decision would complete only 1 % of the traces if
// 10 % are sampled.
func (d *delivery) report(t *traces, acknowledged time.Time) {
	if len(t.inOrder) == 0 {
		return
	}
	// In the delivery's context these would be spans of its transaction. The workers'
	// common hub keeps the transaction that was last started on it.
	ctx := sentry.SetHubOnContext(context.Background(), sentry.CurrentHub().Clone())
	for _, trace := range t.inOrder {
		published := trace.published.Add(-d.skew)
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
func (d *delivery) logWithTraces(records []store.Record) *slog.Logger {
	var ids []string
	for i := range records {
		traceparent, err := outbox.ParseTraceparent(records[i].Traceparent)
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
