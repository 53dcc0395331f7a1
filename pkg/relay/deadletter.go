package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

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
