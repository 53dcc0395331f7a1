package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// deliverUntil claims batches and delivers them until ctx ends; what it has
// claimed by then it goes on with until sending ends.
func (r *Relay) deliverUntil(ctx, sending context.Context) error {
	for {
		if err := r.circuit.admit(ctx); err != nil {
			return err
		}
		lease, err := r.claim(sending)
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
			r.room.send(1)
			r.work.send(1) // where one batch was, there may be more
			r.deliver(sending, lease)
			r.budget.give(lease.Bytes)
			r.busy.Add(-1)
			r.room.send(1)
			r.work.send(1) // there is memory again
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
