package relay

import (
	"context"
	"errors"
	"time"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

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
