package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// split halves a batch that the sink refuses because of its data. All events are absent.
// A batch of one event becomes a dead letter.
func (d *delivery) split(ctx context.Context, keys *store.Events, cause error) (string, error) {
	if n := len(keys.ID); n > 1 {
		if err := d.lease.Split(ctx, keys.ID, n/2, cause); err != nil {
			return "", err
		}
		d.logWithTraces(keys).WarnContext(ctx, "splitting refused batch", "err", cause)
		d.work.send(2)
		return resultSplit, nil
	}
	return d.deadLetter(ctx, keys, store.Outcome{Refused: []store.Refused{{ID: keys.ID[0], Cause: cause}}})
}
