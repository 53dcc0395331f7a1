package relay

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/getsentry/sentry-go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// deliver makes one attempt at the batch and ends its lease. It returns the number of
// consecutive failures of PostgreSQL, or 0.
func (r *Relay) deliver(ctx context.Context, lease *store.Lease) (failures int) {
	defer lease.Release()
	// Each attempt has its own hub, because a hub keeps its last started transaction, and
	// the workers deliver at the same time.
	ctx = sentry.SetHubOnContext(ctx, sentry.CurrentHub().Clone())
	transaction := sentry.StartTransaction(ctx, "relay batch", sentry.WithOpName("queue.process"))
	defer transaction.Finish()
	ctx, span := r.tracer.Start(transaction.Context(), "deliver outbox_events", trace.WithSpanKind(trace.SpanKindConsumer), attemptAttributes(lease))
	defer span.End()
	events, _ := r.events.Get().(*store.Events)
	if events == nil {
		events = &store.Events{}
	}
	defer r.events.Put(events)
	d := &delivery{
		Relay: r, lease: lease, events: events,
		log:   r.log.With("batch_id", lease.ID, "events", lease.Events, "attempt", lease.Attempts),
		start: time.Now(),
		skew:  time.Until(lease.DatabaseTime),
	}
	result, err := d.run(ctx)
	failure := err
	transaction.Status = sentry.SpanStatusOK
	if err != nil {
		transaction.Status = sentry.SpanStatusInternalError
		result, err = d.retry(ctx, err)
	}
	if err != nil { // PostgreSQL failed: the lease is lost, and the next claim resolves the batch
		result = resultReleased
		if ctx.Err() == nil {
			r.metrics.errors.WithLabelValues(classPostgreSQL).Inc()
			failures = r.postgres.failed(ctx, r.log, err)
		}
	}
	r.metrics.batches.WithLabelValues(result).Inc()
	span.SetAttributes(attribute.String("diehard.batch.result", result))
	recordError(span, failure)
	d.log.DebugContext(ctx, "batch attempt ended", "result", result, "duration", time.Since(d.start))
	return failures
}

// delivery is one attempt at one batch.
type delivery struct {
	*Relay
	lease  *store.Lease
	events *store.Events // the memory of the attempt
	links  []trace.Link  // to the requests of the events
	log    *slog.Logger
	start  time.Time
	skew   time.Duration // the database's clock minus the relay's clock
}

// previousAttempt returns the time of the previous attempt by the relay's clock, or the
// zero time.
func (d *delivery) previousAttempt() time.Time {
	if !d.lease.PreviousAttemptAt.Valid {
		return time.Time{}
	}
	return d.lease.PreviousAttemptAt.Time.Add(-d.skew)
}

// sinkError marks an error of the sink. All other errors come from the outbox.
type sinkError struct{ error }

func (e sinkError) Unwrap() error { return e.error }

// run inserts the batch if this is its first attempt, and otherwise resolves the
// earlier attempts. If it returns an error, the lease is still open.
func (d *delivery) run(ctx context.Context) (result string, err error) {
	if d.lease.Attempts > 1 {
		return d.resolve(ctx, nil)
	}
	if err := d.lease.Read(ctx, d.events); err != nil {
		return "", err
	}
	d.link(ctx, d.events)
	if aside, err := d.setAside(ctx); aside || err != nil {
		return resultSplit, err
	}
	if err := d.insert(ctx, d.events); err != nil {
		return d.insertFailed(ctx, err)
	}
	// Only the acknowledgement of a token's first insert proves that the events
	// are present.
	if err := d.settle(ctx, d.events); err != nil {
		return "", err
	}
	d.took.Store(int64(time.Since(d.start)))
	return resultSettled, nil
}

// insertFailed decides how the delivery continues after a failed insert. Only an error
// that the data caused changes the batch.
func (d *delivery) insertFailed(ctx context.Context, err error) (string, error) {
	if bad, ok := errors.AsType[*sink.BadEventsError](err); ok {
		return d.deadLetterBadEvents(ctx, bad)
	}
	if sink.ClassOf(err) == sink.Permanent {
		return d.resolve(ctx, err)
	}
	return "", err
}

// retry ends a failed attempt. An error caused by the state of the sink opens the circuit
// breaker. An error that the batch may have caused delays the batch's next attempt. retry
// returns only PostgreSQL's errors.
func (d *delivery) retry(ctx context.Context, err error) (string, error) {
	if errors.Is(err, store.ErrEventsMissing) {
		delay := d.backoff.delay(d.lease.Attempts)
		d.log.ErrorContext(ctx, "events missing from outbox", "err", err, "delay", delay)
		if err := d.lease.Fail(ctx, err, delay); err != nil {
			return "", err
		}
		return resultRetried, nil
	}
	failure, fromSink := errors.AsType[sinkError](err)
	if !fromSink {
		return "", err
	}
	if ctx.Err() != nil { // the shutdown timeout has ended the insert
		return "", err
	}
	cause, delay, release := failure.error, time.Duration(0), d.lease.Retry
	if blind, ok := errors.AsType[*sink.BlindError](cause); ok {
		d.blind.failed(ctx, d.log, d.lease.ID, blind)
		return d.retryAfter(ctx, d.lease.Fail, cause, d.backoff.delay(d.lease.Attempts))
	}
	if errors.Is(cause, errOtherDestination) {
		d.log.WarnContext(ctx, "batch belongs to another destination", "destination", d.lease.Destination)
		if err := d.lease.Retry(ctx, cause, 0); err != nil {
			return "", err
		}
		if err := d.checkElsewhere(ctx); err != nil {
			return "", err
		}
		return resultRetried, nil
	}
	d.metrics.errors.WithLabelValues(errorClass(cause)).Inc()
	class := sink.ClassOf(cause)
	if _, misconfigured := errors.AsType[*sink.MisconfiguredError](cause); misconfigured {
		class = sink.Unavailable
	}
	switch class {
	case sink.Unavailable, sink.Overloaded:
		if class == sink.Overloaded {
			d.raiseBackpressure()
		}
		d.circuit.failed(ctx, cause)
		if d.lease.Attempts > 1 {
			// This batch may be the cause. The next trial takes another batch.
			delay = d.backoff.delay(d.lease.Attempts)
			d.log.WarnContext(ctx, "batch failed again", "err", cause, "delay", delay)
		}
	case sink.TooLarge:
		// Half of the batch may pass. Larger batches would fail too.
		if limit := d.lease.Bytes / 2; d.lease.Events > 1 && d.o.Store.LimitBytes(limit) {
			d.log.WarnContext(ctx, "limiting size of batches", "bytes", limit, "err", cause)
		}
		fallthrough
	case sink.Unknown, sink.Permanent:
		delay = d.backoff.delay(d.lease.Attempts)
		if !errors.Is(cause, errInsertInFlight) && !errors.Is(cause, errUndecided) {
			release = d.lease.Fail
			d.failed(ctx, cause, delay)
		}
		return d.retryAfter(ctx, release, cause, delay)
	}
	if err := release(ctx, cause, delay); err != nil {
		return "", err
	}
	return resultRetried, nil
}

// failed reports a failure that the batch or the sink may have caused. A batch that fails
// again proves nothing about the sink.
func (d *delivery) failed(ctx context.Context, cause error, delay time.Duration) {
	if d.lease.Failures > 0 {
		d.log.WarnContext(ctx, "batch failed again", "err", cause, "delay", delay, "failures", d.lease.Failures+1)
		return
	}
	if sink.ClassOf(cause) != sink.TooLarge {
		d.circuit.failedUnknown(ctx, cause)
	}
	d.log.ErrorContext(ctx, "batch failed", "err", cause, "delay", delay)
}

// retryAfter releases the batch. It wakes a worker after the delay, because the circuit
// breaker stays closed.
func (d *delivery) retryAfter(
	ctx context.Context, release func(context.Context, error, time.Duration) error, cause error, delay time.Duration,
) (string, error) {
	time.AfterFunc(delay, func() { d.work.send(1) })
	if err := release(ctx, cause, delay); err != nil {
		return "", err
	}
	return resultRetried, nil
}
