package relay

import (
	"context"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

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
