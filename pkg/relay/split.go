package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// split halves a batch that the sink refuses because of its data. A batch of one
// event becomes a dead letter.
func (d *delivery) split(ctx context.Context, records []store.Record, ids []int64, cause error) (string, error) {
	if len(ids) == 1 {
		return d.deadLetter(ctx, records, store.Outcome{Refused: []store.Refused{{ID: ids[0], Cause: cause}}})
	}
	if err := d.lease.Split(ctx, ids, len(ids)/2, cause); err != nil {
		return "", err
	}
	d.logWithTraces(records).WarnContext(ctx, "splitting refused batch", "err", cause)
	d.work.send(2)
	return resultSplit, nil
}
