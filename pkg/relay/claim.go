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
			if lease.Failures > 0 {
				r.failing.Store(false)
			}
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

// claim claims a batch that fits into the budget. Failing batches use one worker, so that
// the others deliver. If unknown errors have opened the circuit breaker, a failing batch can
// be its trial: a sample that the sink takes proves that the sink works. After an outage a
// failing batch is no trial, because its failure would prove nothing.
func (r *Relay) claim(ctx context.Context) (lease *store.Lease, err error) {
	if err := r.checkPostgres(ctx); err != nil {
		return nil, err
	}
	err = r.budget.take(ctx, func(ctx context.Context, maxBytes int64) (int64, error) {
		var err error
		lease, err = r.o.Store.Claim(ctx, maxBytes, !r.failing.Load() && r.circuit.admitsFailing())
		if lease == nil {
			return 0, err
		}
		if lease.Failures > 0 {
			r.failing.Store(true)
		}
		return lease.Bytes, nil
	})
	return lease, err
}
