package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// deliverUntil claims batches and delivers them until ctx ends. It then finishes
// the batch that it has claimed, unless delivering ends.
func (r *Relay) deliverUntil(ctx, delivering context.Context) error {
	for {
		if err := r.circuit.admit(ctx); err != nil {
			return err
		}
		lease, err := r.claim(delivering)
		switch {
		case err != nil:
			failures := r.postgres.failed(ctx, r.log, err)
			pause(ctx, r.backoff.delay(failures))
		case lease == nil:
			r.circuit.idle(ctx)
			select {
			case <-ctx.Done():
			case <-r.work:
			case <-r.o.BatchesCut:
			}
		default:
			r.busy.Add(1)
			r.capacity.send(1)
			r.work.send(1) // more batches may wait
			failures := r.deliver(delivering, lease)
			r.budget.give(lease.Bytes)
			r.busy.Add(-1)
			r.capacity.send(1)
			r.work.send(1) // the next batch fits into memory again
			if failures > 0 {
				r.circuit.idle(ctx)
				pause(ctx, r.backoff.delay(failures))
			}
		}
		r.circuit.idle(ctx)
	}
}

func (r *Relay) claim(ctx context.Context) (lease *store.Lease, err error) {
	err = r.budget.take(ctx, func(ctx context.Context, maxBytes int64) (int64, error) {
		var err error
		lease, err = r.o.Store.Claim(ctx, maxBytes)
		if lease == nil {
			return 0, err
		}
		return lease.Bytes, nil
	})
	return lease, err
}
