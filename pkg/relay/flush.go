package relay

import (
	"context"
	"errors"
	"time"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

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
