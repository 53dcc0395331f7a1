package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// deadLetterBadEvents takes the events that the sink can never store out of the
// batch. The batch is absent from the sink: this attempt has sent nothing, and
// earlier attempts were resolved.
func (d *delivery) deadLetterBadEvents(ctx context.Context, bad *sink.BadEventsError) (string, error) {
	records, err := d.lease.Keys(ctx)
	if err != nil {
		return "", err
	}
	causes := make(map[int]error, len(bad.Events))
	for _, event := range bad.Events {
		causes[event.Index] = event.Err
	}
	var outcome store.Outcome
	for i, record := range records {
		if cause, isBad := causes[i]; isBad {
			outcome.Refused = append(outcome.Refused, store.Refused{ID: record.ID, Cause: cause})
		} else {
			outcome.Remaining = append(outcome.Remaining, record.ID)
		}
	}
	return d.deadLetter(ctx, records, outcome)
}

// deadLetter makes dead letters of the refused events. The remaining events stay
// in the batch.
func (d *delivery) deadLetter(ctx context.Context, records []store.Record, outcome store.Outcome) (string, error) {
	if err := d.lease.Shrink(ctx, outcome); err != nil {
		return "", err
	}
	d.metrics.events.WithLabelValues(resultDeadLettered).Add(float64(len(outcome.Refused)))
	ids := make([]int64, len(outcome.Refused))
	for i := range outcome.Refused {
		ids[i] = outcome.Refused[i].ID
	}
	d.logWithTraces(among(records, ids)).ErrorContext(ctx, "events dead-lettered",
		"dead_lettered", len(ids), "err", outcome.Refused[0].Cause)
	d.work.send(1)
	return resultSplit, nil
}
