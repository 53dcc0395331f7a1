package relay

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// resolve determines the outcome of the batch's earlier attempts and continues the
// delivery. If cause is nil, an absent batch is inserted again, or sampled if it is
// suspected. Otherwise cause is the permanent error of the last insert, and an absent
// batch is sampled.
func (d *delivery) resolve(ctx context.Context, cause error) (string, error) {
	keys, err := d.lease.Keys(ctx)
	if err != nil {
		return "", err
	}
	failpoint.At(failpoint.ResolveRead)
	if err := d.checkDestination(ctx); err != nil {
		return "", err
	}
	d.link(ctx, keys)
	present, absent, err := d.outcome(ctx, keys, failpoint.ResolveWaited, failpoint.ResolveChecked)
	switch {
	case err != nil:
		return "", err
	case len(present) > 0 && d.isUndecided():
		if cause != nil { // the next attempt inserts the batch
			return "", sinkError{cause}
		}
		return d.reinsert(ctx, keys)
	case len(present) > 0 && d.mayRemove():
		return d.awaitDecision(ctx)
	case len(absent) == 0:
		d.reportFailedInsert(ctx, keys, cause)
		return d.settleResolved(ctx, keys)
	case len(present) > 0:
		d.reportFailedInsert(ctx, keys.Select(present), cause)
		return d.settlePresent(ctx, keys, present, absent)
	case cause != nil && len(keys.ID) == 1:
		return d.deadLetterOne(ctx, keys, 0, cause)
	case cause != nil && d.isUndecided():
		return "", sinkError{cause} // the batch is sampled when it is older
	case cause != nil:
		return d.sample(ctx, keys, cause)
	case d.isSuspected():
		return d.sample(ctx, keys, errors.New(d.lease.LastError))
	}
	return d.reinsert(ctx, keys)
}

// outcome waits for inserts in flight, and then returns the result of checkPresence. It
// runs in a span.
func (d *delivery) outcome(ctx context.Context, keys *store.Events, waited, checked failpoint.Point) (present, absent []int, err error) {
	err = d.inSinkSpan(ctx, "resolve", func(ctx context.Context, span trace.Span) (err error) {
		if err := d.awaitInserts(ctx); err != nil {
			return err
		}
		failpoint.At(waited)
		present, absent, err = d.checkPresence(ctx, keys)
		failpoint.At(checked)
		span.SetAttributes(attribute.Int("diehard.events.present", len(present)), attribute.Int("diehard.events.absent", len(absent)))
		return err
	}, trace.WithAttributes(semconv.DBOperationName("SELECT")))
	return present, absent, err
}

// isUndecided returns whether the sink may remove rows that a presence check finds, and
// still remembers the batch's token. The same rows under the same token then let the sink
// decide. If the sink has forgotten the token, it would store the rows twice. The window
// of tokens outlasts the time limit of an insert, by any relay, from the first attempt. The
// token of an unverified batch cannot decide, because the rows may have another token.
func (d *delivery) isUndecided() bool {
	age := d.lease.TokenAge()
	return d.o.Sink.Undecided() && !d.lease.Unverified && age >= 0 && age < max(d.o.FlushTimeout, d.lease.LongestInsert())
}

// decisionTime is the time after an insert in which a sink that is undecided may remove
// the rows of the insert. ClickHouse asks Keeper after 5 minutes.
const decisionTime = 6 * time.Minute

// mayRemove returns whether the sink may remove rows of the previous attempt that a
// presence check finds. For an old batch, an attempt under the same token cannot let the
// sink decide, because the sink may have forgotten the token.
func (d *delivery) mayRemove() bool {
	if !d.o.Sink.Undecided() || !d.lease.PreviousAttemptAt.Valid {
		return false
	}
	age := d.lease.DatabaseTime.Sub(d.lease.PreviousAttemptAt.Time) // negative if the clock was set back
	return age >= 0 && age < decisionTime+max(d.o.FlushTimeout, d.lease.LongestInsert())
}

// errUndecided delays a batch whose rows the sink may still remove.
var errUndecided = errors.New("the sink has not decided yet about the rows of the previous attempt")

// awaitDecision releases the batch until the sink has decided about its rows.
func (d *delivery) awaitDecision(ctx context.Context) (string, error) {
	d.log.InfoContext(ctx, "waiting for the sink's decision about rows")
	return d.retryAfter(ctx, d.lease.Postpone, errUndecided, d.backoff.limit)
}

// errInsertInFlight delays a batch whose earlier insert the sink still executes.
var errInsertInFlight = errors.New("an earlier insert of the batch is still in flight")

const inFlightPoll = 250 * time.Millisecond

// awaitInserts waits until the sink executes no insert of the batch, at most
// FlushTimeout. It verifies the lease first. The verification also restarts the server's
// idle timeout.
func (d *delivery) awaitInserts(ctx context.Context) error {
	if err := d.lease.Verify(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.o.FlushTimeout)
	defer cancel()
	for {
		inFlight, err := d.o.Sink.InFlight(ctx, d.lease.Token)
		switch {
		case err != nil:
			return sinkError{err}
		case !inFlight:
			return nil
		}
		pause(ctx, inFlightPoll)
		if ctx.Err() != nil {
			return sinkError{errInsertInFlight}
		}
	}
}

// checkPresence returns the indexes of the events that are present at the sink, and the
// indexes of the absent events. It verifies the lease first, because the next steps must
// happen within the lease.
func (d *delivery) checkPresence(ctx context.Context, keys *store.Events) (present, absent []int, err error) {
	if err := d.lease.Verify(ctx); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, d.o.FlushTimeout)
	defer cancel()
	found, err := d.o.Sink.Present(ctx, &keys.Keys)
	if err != nil {
		return nil, nil, sinkError{err}
	}
	d.blind.succeeded(ctx, d.log, d.lease.ID)
	for i := range found {
		if found[i] {
			present = append(present, i)
		} else {
			absent = append(absent, i)
		}
	}
	return present, absent, nil
}

// reinsert inserts the same rows under the same token. The sink may acknowledge the rows
// only because it has seen the token before. The batch is therefore settled only after a
// presence check.
func (d *delivery) reinsert(ctx context.Context, keys *store.Events) (string, error) {
	if err := d.checkSink(ctx); err != nil {
		return "", err
	}
	if err := d.lease.Read(ctx, d.events); err != nil {
		return "", err
	}
	if err := d.insert(ctx, d.events); err != nil {
		return d.insertFailed(ctx, err)
	}
	failpoint.At(failpoint.ReinsertAcknowledged)
	// An earlier insert may have begun late.
	present, absent, err := d.outcome(ctx, keys, failpoint.ReinsertWaited, failpoint.ReinsertChecked)
	switch {
	case err != nil:
		return "", err
	case len(absent) == 0:
		return d.settleResolved(ctx, keys)
	case len(present) > 0:
		return d.settlePresent(ctx, keys, present, absent)
	}
	// The sink recorded the token and died before it stored the rows.
	d.log.WarnContext(ctx, "renewing insert token", "err", errRowsAbsent)
	if err := d.lease.RenewToken(ctx, errRowsAbsent); err != nil {
		return "", err
	}
	d.work.send(1)
	return resultTokenRenewed, nil
}

var errRowsAbsent = errors.New("the sink acknowledged the token, but its rows are absent")

// checkSink checks that the sink can still keep its promises. If an earlier insert begins
// late, only the token prevents duplicates of a reinsert. The check therefore detects
// changes of the destination since the relay's start. It verifies the lease first, as
// awaitInserts does.
func (d *delivery) checkSink(ctx context.Context) error {
	if err := d.lease.Verify(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.o.FlushTimeout)
	defer cancel()
	if err := d.o.Sink.Check(ctx); err != nil {
		return sinkError{err}
	}
	return nil
}
