package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// split halves a batch that the sink refuses for its data, down to the event
// that is the cause.
func (d *delivery) split(ctx context.Context, records []store.Record, ids []int64, cause error) (string, error) {
	if len(ids) == 1 {
		return d.deadLetter(ctx, records, store.Part{Dead: []store.Dead{{ID: ids[0], Cause: cause}}})
	}
	if err := d.lease.Split(ctx, ids, len(ids)/2, cause); err != nil {
		return "", err
	}
	d.logOf(records).WarnContext(ctx, "the sink refuses the batch for its data: it is split", "err", cause)
	d.work.send(2)
	return resultSplit, nil
}
