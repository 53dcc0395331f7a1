package relay

import (
	"context"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// settle deletes a delivered batch from the outbox and records its delivery.
func (d *delivery) settle(ctx context.Context, events *delivered) error {
	if err := d.lease.Settle(ctx); err != nil {
		return err
	}
	d.postgres.succeeded(ctx, d.Relay.log)
	d.record(events)
	return nil
}

// record puts the delivery of the events into metrics and traces.
func (d *delivery) record(events *delivered) {
	now := time.Now()
	d.metrics.observe(events.published, now.Add(d.skew))
	d.report(&events.traces, now)
}

// settleResolved settles a batch of which all events are present at the sink.
func (d *delivery) settleResolved(ctx context.Context, records []store.Record) (string, error) {
	if err := d.settle(ctx, newDelivered(len(records)).addAll(records)); err != nil {
		return "", err
	}
	return resultResolved, nil
}

// settlePresent settles the events that are present at the sink. The absent ones
// stay in the batch.
func (d *delivery) settlePresent(ctx context.Context, records []store.Record, present, absent []int64) (string, error) {
	d.log.InfoContext(ctx, "settling events that are present", "present", len(present), "absent", len(absent))
	if err := d.lease.Shrink(ctx, store.Outcome{Delivered: present, Remaining: absent}); err != nil {
		return "", err
	}
	d.record(newDelivered(len(present)).addAll(among(records, present)))
	d.work.send(1)
	return resultSplit, nil
}

// among returns the records with these ids. Both are in ascending order.
func among(records []store.Record, ids []int64) []store.Record {
	found := make([]store.Record, 0, len(ids))
	for _, record := range records {
		if len(found) < len(ids) && record.ID == ids[len(found)] {
			found = append(found, record)
		}
	}
	return found
}
