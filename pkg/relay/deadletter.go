package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// deadLetterBadEvents moves the events that the sink can never store from the batch to
// the dead letters. The batch is absent from the sink: this attempt has sent nothing, and
// earlier attempts were resolved.
func (d *delivery) deadLetterBadEvents(ctx context.Context, bad *sink.BadEventsError) (string, error) {
	keys, err := d.lease.Keys(ctx)
	if err != nil {
		return "", err
	}
	causes := make(map[int]error, len(bad.Events))
	for _, event := range bad.Events {
		causes[event.Index] = event.Err
	}
	var (
		outcome store.Outcome
		refused []int
	)
	for i, id := range keys.ID {
		if cause, isBad := causes[i]; isBad {
			outcome.Refused = append(outcome.Refused, store.Refused{ID: id, Cause: cause})
			refused = append(refused, i)
		} else {
			outcome.Remaining = append(outcome.Remaining, id)
		}
	}
	return d.deadLetter(ctx, keys.Select(refused), outcome)
}

// deadLetter moves the refused events to the dead letters. The remaining events stay in
// the batch.
func (d *delivery) deadLetter(ctx context.Context, refused *store.Events, outcome store.Outcome) (string, error) {
	if err := d.lease.Shrink(ctx, outcome); err != nil {
		return "", err
	}
	n := len(outcome.Refused)
	d.metrics.events.WithLabelValues(resultDeadLettered).Add(float64(n))
	d.logWithTraces(refused).ErrorContext(ctx, "events dead-lettered", "dead_lettered", n, "err", outcome.Refused[0].Cause)
	d.work.send(1)
	return resultSplit, nil
}
