package relay

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/getsentry/sentry-go"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// deliverUntil claims batches and delivers them until ctx ends; what it has
// claimed by then it goes on with until sending ends.
func (r *Relay) deliverUntil(ctx, sending context.Context) error {
	for {
		if err := r.circuit.admit(ctx); err != nil {
			return err
		}
		lease, err := r.claim(sending)
		switch {
		case err != nil:
			failures := r.postgres.failed(ctx, r.log, err)
			pause(ctx, r.backoff.delay(failures))
		case lease == nil:
			r.circuit.idle(ctx)
			select {
			case <-ctx.Done():
			case <-r.work:
			case <-r.o.BatchesCut:
			}
		default:
			r.busy.Add(1)
			r.room.send(1)
			r.work.send(1) // where one batch was, there may be more
			r.deliver(sending, lease)
			r.budget.give(lease.Bytes)
			r.busy.Add(-1)
			r.room.send(1)
			r.work.send(1) // there is memory again
		}
		r.circuit.idle(ctx)
	}
}

func (r *Relay) claim(ctx context.Context) (lease *store.Lease, err error) {
	err = r.budget.take(ctx, func(ctx context.Context, maxBytes int64) (int64, error) {
		var err error
		lease, err = r.o.Store.Claim(ctx, maxBytes)
		if lease == nil {
			return 0, err
		}
		return lease.Bytes, nil
	})
	return lease, err
}

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

// insert reads the batch's events and sends them.
func (d *delivery) insert(ctx context.Context) (*delivered, error) {
	events := &sink.Events{}
	events.Grow(d.lease.Events)
	sent := newDelivered(d.lease.Events)
	err := d.lease.Read(ctx, func(record store.Record) error {
		events.EventID = append(events.EventID, record.EventID)
		events.EventType = append(events.EventType, record.EventType)
		events.EventDateTime = append(events.EventDateTime, record.EventDateTime)
		events.Environment = append(events.Environment, record.Environment)
		events.EventContext = append(events.EventContext, record.EventContext)
		events.MetadataVersion = append(events.MetadataVersion, uint64(record.MetadataVersion)) //nolint:gosec // never negative
		sent.add(&record)
		return nil
	})
	if err != nil {
		return nil, err
	}
	// The deadline counts from before the lease was last seen to hold: whoever is
	// stopped from here on, and goes on when another has delivered the batch and
	// the sink has forgotten its token, sends nothing.
	start := time.Now()
	if err := d.lease.Verify(ctx); err != nil {
		return nil, err
	}
	flush, cancel := context.WithDeadline(ctx, start.Add(d.o.FlushTimeout))
	defer cancel()
	failpoint.At(failpoint.FlushRead)
	err = d.o.Sink.Insert(flush, sink.Batch{Token: d.lease.Token, Events: events})
	if _, unsent := errors.AsType[*sink.BadEventsError](err); !unsent {
		d.metrics.flush.Observe(time.Since(start).Seconds())
		d.metrics.sent.Add(float64(d.lease.Events))
	}
	if err != nil {
		return nil, sinkError{err}
	}
	failpoint.At(failpoint.FlushAcknowledged)
	d.metrics.rows.Observe(float64(d.lease.Events))
	d.circuit.succeeded(ctx)
	d.relieved()
	return sent, nil
}

func (d *delivery) settle(ctx context.Context, events *delivered) error {
	if err := d.lease.Settle(ctx); err != nil {
		return err
	}
	d.postgres.succeeded(ctx, d.Relay.log)
	d.acknowledged(events)
	return nil
}

func (d *delivery) acknowledged(events *delivered) {
	now := time.Now()
	d.metrics.observe(events.published, now.Add(d.skew))
	d.report(&events.traces, now)
}

// errStillRunning is why a batch is put off: an earlier send of it has not
// ended at the sink.
var errStillRunning = errors.New("an earlier send of the batch is still running at the sink")

const inFlightPoll = 250 * time.Millisecond

// awaitInserts waits until no send of the batch is running at the sink, for one
// flush's time at most. It begins with a sign of life in the lease: the server
// ends one that is idle for much longer than a flush takes.
func (d *delivery) awaitInserts(ctx context.Context) error {
	if err := d.lease.Verify(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.o.FlushTimeout)
	defer cancel()
	for {
		running, err := d.o.Sink.InFlight(ctx, d.lease.Token)
		switch {
		case err != nil:
			return sinkError{err}
		case !running:
			return nil
		}
		pause(ctx, inFlightPoll)
		if ctx.Err() != nil {
			return sinkError{errStillRunning}
		}
	}
}

// ask returns the ids of the batch's events that the sink holds, and of those
// that it does not.
func (d *delivery) ask(ctx context.Context, records []store.Record) (there, missing []int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.o.FlushTimeout)
	defer cancel()
	keys := make([]sink.Key, len(records))
	for i, record := range records {
		keys[i] = sink.Key{EventID: record.EventID, EventType: record.EventType, Time: record.EventDateTime}
	}
	present, err := d.o.Sink.Present(ctx, keys)
	if err != nil {
		return nil, nil, sinkError{err}
	}
	for i, record := range records {
		if present[i] {
			there = append(there, record.ID)
		} else {
			missing = append(missing, record.ID)
		}
	}
	return there, missing, nil
}

// resolve finds out what became of the batch's sends and acts on it. cause is
// nil where their outcome is unknown, or else the permanent error that the
// last one was answered with: then the batch is split instead of sent again.
func (d *delivery) resolve(ctx context.Context, cause error) (string, error) {
	records, err := d.lease.Keys(ctx)
	if err != nil {
		return "", err
	}
	failpoint.At(failpoint.ResolveRead)
	if err := d.awaitInserts(ctx); err != nil {
		return "", err
	}
	failpoint.At(failpoint.ResolveWaited)
	there, missing, err := d.look(ctx, records)
	failpoint.At(failpoint.ResolveChecked)
	switch {
	case err != nil:
		return "", err
	case len(missing) == 0:
		return d.found(ctx, records)
	case len(there) > 0:
		return d.keepRest(ctx, records, there, missing)
	case cause != nil:
		return d.split(ctx, records, missing, cause)
	}
	return d.sendAgain(ctx, records)
}

// look asks, after another sign of life. What follows happens in the lease, or
// not at all.
func (d *delivery) look(ctx context.Context, records []store.Record) (there, missing []int64, err error) {
	if err := d.lease.Verify(ctx); err != nil {
		return nil, nil, err
	}
	return d.ask(ctx, records)
}

// sendAgain sends the same rows under the same token. Its "ok" may mean that
// the token was seen before, so only asking settles the batch.
func (d *delivery) sendAgain(ctx context.Context, records []store.Record) (string, error) {
	if err := d.check(ctx); err != nil {
		return "", err
	}
	if _, err := d.insert(ctx); err != nil {
		return d.failed(ctx, err)
	}
	failpoint.At(failpoint.ReinsertAcknowledged)
	// An earlier send may have begun late.
	if err := d.awaitInserts(ctx); err != nil {
		return "", err
	}
	failpoint.At(failpoint.ReinsertWaited)
	there, missing, err := d.look(ctx, records)
	failpoint.At(failpoint.ReinsertChecked)
	switch {
	case err != nil:
		return "", err
	case len(missing) == 0:
		return d.found(ctx, records)
	case len(there) > 0:
		return d.keepRest(ctx, records, there, missing)
	}
	// The sink knows the token, but not the rows: it died between the two.
	d.log.WarnContext(ctx, "the sink has lost the batch behind its token: it goes again under a new one")
	if err := d.lease.RenewToken(ctx, errRowsMissing); err != nil {
		return "", err
	}
	d.work.send(1)
	return resultTokenRenewed, nil
}

// check asks whether the sink still keeps its promise. From a re-send on the
// token alone guards against an earlier send that begins late, so a destination
// that was changed since the relay's start is noticed here at the latest. It
// begins with a sign of life in the lease, as awaitInserts does.
func (d *delivery) check(ctx context.Context) error {
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

var errRowsMissing = errors.New("the sink acknowledged the token without the rows")

// found settles a batch that the sink turned out to hold.
func (d *delivery) found(ctx context.Context, records []store.Record) (string, error) {
	if err := d.settle(ctx, newDelivered(len(records)).addAll(records)); err != nil {
		return "", err
	}
	return resultResolved, nil
}

// keepRest settles what the sink holds of the batch; the rest stays the batch.
func (d *delivery) keepRest(ctx context.Context, records []store.Record, there, missing []int64) (string, error) {
	d.log.InfoContext(ctx, "the sink holds a part of the batch: the rest is sent", "there", len(there))
	if err := d.lease.Shrink(ctx, store.Part{Delivered: there, Rest: missing}); err != nil {
		return "", err
	}
	d.acknowledged(newDelivered(len(there)).addAll(among(records, there)))
	d.work.send(1)
	return resultSplit, nil
}

// among returns the records with the ids, which ascend as the records do.
func among(records []store.Record, ids []int64) []store.Record {
	some := make([]store.Record, 0, len(ids))
	for _, record := range records {
		if len(some) < len(ids) && record.ID == ids[len(some)] {
			some = append(some, record)
		}
	}
	return some
}

// split halves a batch that the sink refuses for its data, down to the event
// that is the cause.
func (d *delivery) split(ctx context.Context, records []store.Record, ids []int64, cause error) (string, error) {
	if len(ids) == 1 {
		return d.deadLetter(ctx, records, store.Part{Dead: []store.Dead{{ID: ids[0], Cause: cause}}})
	}
	if err := d.lease.Split(ctx, ids, len(ids)/2, cause); err != nil {
		return "", err
	}
	d.logOf(records).WarnContext(ctx, "the sink refuses the batch for its data: it is split", "err", cause)
	d.work.send(2)
	return resultSplit, nil
}

// deadLetterBad takes the events that the sink can never hold out of the batch. Nothing
// of the batch has been sent, now or in earlier sends that were not resolved.
func (d *delivery) deadLetterBad(ctx context.Context, bad *sink.BadEventsError) (string, error) {
	records, err := d.lease.Keys(ctx)
	if err != nil {
		return "", err
	}
	causes := make(map[int]error, len(bad.Events))
	for _, event := range bad.Events {
		causes[event.Index] = event.Err
	}
	var part store.Part
	for i, record := range records {
		if cause, isBad := causes[i]; isBad {
			part.Dead = append(part.Dead, store.Dead{ID: record.ID, Cause: cause})
		} else {
			part.Rest = append(part.Rest, record.ID)
		}
	}
	return d.deadLetter(ctx, records, part)
}

func (d *delivery) deadLetter(ctx context.Context, records []store.Record, part store.Part) (string, error) {
	if err := d.lease.Shrink(ctx, part); err != nil {
		return "", err
	}
	d.metrics.events.WithLabelValues("dead").Add(float64(len(part.Dead)))
	dead := make([]int64, len(part.Dead))
	for i := range part.Dead {
		dead[i] = part.Dead[i].ID
	}
	d.logOf(among(records, dead)).ErrorContext(ctx, "events were refused for their data and are dead letters now",
		"dead", len(dead), "err", part.Dead[0].Cause)
	d.work.send(1)
	return resultSplit, nil
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
