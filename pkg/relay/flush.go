package relay

import (
	"context"
	"errors"
	"time"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// flush reads the batch's events and inserts them.
func (d *delivery) flush(ctx context.Context) (*delivered, error) {
	events := &sink.Events{}
	events.Grow(d.lease.Events)
	inserted := newDelivered(d.lease.Events)
	err := d.lease.Read(ctx, func(record store.Record) error {
		events.EventID = append(events.EventID, record.EventID)
		events.EventType = append(events.EventType, record.EventType)
		events.EventDateTime = append(events.EventDateTime, record.EventDateTime)
		events.Environment = append(events.Environment, record.Environment)
		events.EventContext = append(events.EventContext, record.EventContext)
		events.MetadataVersion = append(events.MetadataVersion, uint64(record.MetadataVersion)) //nolint:gosec // never negative
		inserted.add(&record)
		return nil
	})
	if err != nil {
		return nil, err
	}
	// The deadline counts from before the lease is verified. A process that is
	// suspended here must not insert late: meanwhile another may deliver the batch
	// and the sink forget its token.
	start := time.Now()
	if err := d.lease.Verify(ctx); err != nil {
		return nil, err
	}
	insertCtx, cancel := context.WithDeadline(ctx, start.Add(d.o.FlushTimeout))
	defer cancel()
	failpoint.At(failpoint.FlushRead)
	err = d.o.Sink.Insert(insertCtx, sink.Batch{Token: d.lease.Token, Events: events})
	if _, unsent := errors.AsType[*sink.BadEventsError](err); !unsent {
		d.metrics.flush.Observe(time.Since(start).Seconds())
		d.metrics.attempted.Add(float64(d.lease.Events))
	}
	if err != nil {
		return nil, sinkError{err}
	}
	failpoint.At(failpoint.FlushAcknowledged)
	d.metrics.rows.Observe(float64(d.lease.Events))
	d.circuit.succeeded(ctx)
	d.lowerBackpressure()
	return inserted, nil
}
