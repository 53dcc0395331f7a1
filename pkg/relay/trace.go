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
	// maxTraces bounds what a batch costs at Sentry: it may be of 50,000 requests.
	maxTraces = 100
	// maxTypes bounds the event types that a transaction names.
	maxTypes = 10
	// maxLoggedTraces bounds the traces that one line of the log names.
	maxLoggedTraces = 10
)

// delivered gathers what is told of events once the sink holds them and the
// outbox does not any more.
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

// traces are those that the delivery is shown in: where the publisher says that
// it has recorded its part, the first maxTraces of them.
type traces struct {
	byID    map[string]*trace // nil where none is shown
	inOrder []*trace
}

// trace is one of them, with what the batch has of it.
type trace struct {
	id, parent string
	events     int
	types      []string
	published  time.Time // the first of the events
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

// report shows the delivery in each of the traces, as a transaction that begins
// when the first of the trace's events was published. It goes on from that
// event's request, and with its sampling decision: to decide again would leave
// 1 % of the traces whole where 10 % are recorded.
func (d *delivery) report(t *traces, acknowledged time.Time) {
	if len(t.inOrder) == 0 {
		return
	}
	// Not the context of the delivery, whose transaction these would be spans of,
	// nor the hub of all workers, which keeps the last transaction begun on it.
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

// logOf is the log with the traces that the events are of, recorded or not, the
// first maxLoggedTraces of them.
func (d *delivery) logOf(records []store.Record) *slog.Logger {
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
