package relay

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/getsentry/sentry-go"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// deliver brings the batch as far as it gets and ends its lease.
func (r *Relay) deliver(ctx context.Context, lease *store.Lease) {
	defer lease.Release()
	// A hub of its own: a hub keeps the transaction that was last begun on it, and
	// batches are delivered side by side.
	ctx = sentry.SetHubOnContext(ctx, sentry.CurrentHub().Clone())
	transaction := sentry.StartTransaction(ctx, "relay batch", sentry.WithOpName("queue.process"))
	defer transaction.Finish()
	ctx = transaction.Context()
	d := &delivery{
		Relay: r, lease: lease,
		log:   r.log.With("batch_id", lease.ID, "events", lease.Events, "attempt", lease.Attempts),
		start: time.Now(),
		skew:  time.Until(lease.DatabaseTime),
	}
	result, err := d.run(ctx)
	transaction.Status = sentry.SpanStatusOK
	if err != nil {
		transaction.Status = sentry.SpanStatusInternalError
		result, err = d.giveBack(ctx, err)
	}
	if err != nil { // PostgreSQL's: the lease is lost, and the next claimer resolves the batch
		result = resultReleased
		if ctx.Err() == nil {
			r.postgres.failed(ctx, r.log, err)
		}
	}
	r.metrics.batches.WithLabelValues(result).Inc()
	d.log.DebugContext(ctx, "the batch was worked on", "result", result, "duration", time.Since(d.start))
}

// delivery is one attempt at one batch.
type delivery struct {
	*Relay
	lease *store.Lease
	log   *slog.Logger
	start time.Time
	skew  time.Duration // the database's clock ahead of ours
}

// sinkError marks what the sink returned, as against the outbox.
type sinkError struct{ error }

func (e sinkError) Unwrap() error { return e.error }

// run sends the batch if nobody has, and otherwise finds out what became of
// the earlier sends first. An error that it returns has left the lease open.
func (d *delivery) run(ctx context.Context) (result string, err error) {
	if d.lease.Attempts > 1 {
		return d.resolve(ctx, nil)
	}
	events, err := d.insert(ctx)
	if err != nil {
		return d.failed(ctx, err)
	}
	// The first send under its token, acknowledged: the one "ok" that is a
	// proof.
	if err := d.settle(ctx, events); err != nil {
		return "", err
	}
	d.took.Store(int64(time.Since(d.start)))
	return resultSettled, nil
}

// failed decides what follows an insert that failed: only an error that has
// the data as its cause changes the batch.
func (d *delivery) failed(ctx context.Context, err error) (string, error) {
	if bad, ok := errors.AsType[*sink.BadEventsError](err); ok {
		return d.deadLetterBad(ctx, bad)
	}
	if sink.ClassOf(err) == sink.Permanent {
		return d.resolve(ctx, err)
	}
	return "", err
}

// giveBack ends a delivery that failed. What is the sink's state opens the
// circuit; what may be the batch's own puts the batch off. An error that it
// returns is PostgreSQL's.
func (d *delivery) giveBack(ctx context.Context, err error) (string, error) {
	if errors.Is(err, store.ErrEventsMissing) {
		delay := d.backoff.delay(d.lease.Attempts)
		d.log.ErrorContext(ctx, "the batch cannot be delivered as long as events of it are missing in the outbox",
			"err", err, "delay", delay)
		if err := d.lease.Retry(ctx, err, delay); err != nil {
			return "", err
		}
		return resultRetried, nil
	}
	failure, fromSink := errors.AsType[sinkError](err)
	if !fromSink {
		return "", err
	}
	if ctx.Err() != nil { // the stop's deadline ended the send
		return "", err
	}
	cause, delay := failure.error, time.Duration(0)
	class := sink.ClassOf(cause)
	if _, unfit := errors.AsType[*sink.MisconfiguredError](cause); unfit {
		class = sink.Unavailable
	}
	switch class {
	case sink.Unavailable, sink.Overloaded:
		if class == sink.Overloaded {
			d.strained()
		}
		d.circuit.failed(ctx, cause)
		if d.lease.Attempts > 1 {
			// It may be this batch that the sink fails over: another one is
			// the next trial.
			delay = d.backoff.delay(d.lease.Attempts)
			d.log.WarnContext(ctx, "the batch has failed again", "err", cause, "delay", delay)
		}
	case sink.Unknown, sink.Permanent:
		delay = d.backoff.delay(d.lease.Attempts)
		if !errors.Is(cause, errStillRunning) {
			d.circuit.failedUnknown(ctx, cause)
			d.log.ErrorContext(ctx, "the batch was not delivered and is tried again", "err", cause, "delay", delay)
		}
		time.AfterFunc(delay, func() { d.work.send(1) })
	}
	if err := d.lease.Retry(ctx, cause, delay); err != nil {
		return "", err
	}
	return resultRetried, nil
}
