package relay

import (
	"context"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// settle deletes a delivered batch from the outbox and records its delivery.
func (d *delivery) settle(ctx context.Context, events *store.Events) error {
	if err := d.inSettleSpan(ctx, len(events.PublishedAt), d.lease.Settle); err != nil {
		return err
	}
	d.postgres.succeeded(ctx, d.Relay.log)
	d.record(ctx, events)
	return nil
}

// record puts the delivery of the events into metrics and traces. It also ends the
// quarantine of their types.
func (d *delivery) record(ctx context.Context, events *store.Events) {
	now := time.Now()
	d.metrics.observe(events.PublishedAt, now.Add(d.skew))
	d.tidy.delivered.Add(int64(len(events.PublishedAt)))
	d.report(events, now)
	d.evidence.delivered(events)
	d.endQuarantine(ctx, events)
}

// settleResolved settles a batch whose events are all present at the sink.
func (d *delivery) settleResolved(ctx context.Context, keys *store.Events) (string, error) {
	if err := d.settle(ctx, keys); err != nil {
		return "", err
	}
	return resultResolved, nil
}

// settlePresent settles the events that are present at the sink. The absent events stay
// in the batch.
func (d *delivery) settlePresent(ctx context.Context, keys *store.Events, present, absent []int) (string, error) {
	d.log.InfoContext(ctx, "settling events that are present", "present", len(present), "absent", len(absent))
	outcome := store.Outcome{Delivered: keys.IDs(present), Remaining: keys.IDs(absent)}
	if err := d.inSettleSpan(ctx, len(present), func(ctx context.Context) error { return d.lease.Shrink(ctx, outcome, nil) }); err != nil {
		return "", err
	}
	d.record(ctx, keys.Select(present))
	d.work.send(1)
	return resultSplit, nil
}
