package relay

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// minCutInterval is the least time between two attempts to find a full batch while
// the linger runs or a batch waits.
const minCutInterval = 250 * time.Millisecond

// cutUntil cuts batches until ctx ends. Between two cuts it waits for a wake-up, the
// rest of the linger, capacity, or the next poll.
func (r *Relay) cutUntil(ctx context.Context) error {
	lastPoll := time.Time{}
	changes := 0 // consecutive changes of history
	for {
		if err := r.circuit.awaitClosed(ctx); err != nil {
			return err
		}
		r.turned(loopCut)
		// The poll also finds events that the store's hints hide, so wake-ups do not
		// postpone the poll.
		work := true
		err := r.checkPostgres(ctx)
		if err == nil && time.Since(lastPoll) >= r.o.PollInterval {
			if work, err = r.o.Store.Poll(ctx); err == nil {
				lastPoll = time.Now()
				r.checkFuse(ctx)
				r.checkPause(ctx)
				if work {
					r.work.send(r.o.Workers)
				}
				if work || r.elsewhere.err() != nil {
					err = r.checkElsewhere(ctx)
				}
			}
		}
		select {
		case <-r.capacity: // this cut uses the capacity
		default:
		}
		linger := r.linger()
		var cut store.Cut
		if work && err == nil {
			start := time.Now()
			cut, err = r.o.Store.Cut(ctx, linger)
			r.recordCut(ctx, start, cut, err)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err() //nolint:wrapcheck // the caller has ended ctx
		case errors.Is(err, store.ErrHistoryChanged):
			changes++
			r.log.ErrorContext(ctx, "resolving all batches", "err", err)
			r.postgres.forget()
			pause(ctx, r.backoff.delay(changes))
			continue
		case err != nil:
			failures := r.postgres.failed(ctx, r.log, err)
			pause(ctx, r.backoff.delay(failures))
			continue
		}
		changes = 0
		r.postgres.succeeded(ctx, r.log)
		if cut.Batches > 0 {
			r.work.send(cut.Batches)
			if cut.More {
				continue
			}
		}
		r.awaitNextCut(ctx, cut, linger > r.minLinger(), time.Until(lastPoll.Add(r.o.PollInterval)))
	}
}

// awaitNextCut waits until another cut may find events. If busy workers have extended the
// linger (extended), a worker that becomes free ends the wait.
func (r *Relay) awaitNextCut(ctx context.Context, cut store.Cut, extended bool, untilPoll time.Duration) {
	var capacity, wake <-chan struct{}
	if extended {
		capacity = r.capacity
	}
	wait := untilPoll
	switch {
	case cut.More: // batches wait; a relay with busy workers may have cut them
		r.work.send(1)
		capacity = r.capacity
		if cut.Wait > 0 { // any relay may claim them
			wait = min(wait, max(cut.Wait, minCutInterval))
		}
	case cut.Wait > minCutInterval: // a full batch does not wait for the linger
		select {
		case <-ctx.Done():
		case <-capacity:
			return
		case <-time.After(minCutInterval):
		}
		wait, wake = min(wait, cut.Wait-minCutInterval), r.o.Published
	case cut.Wait > 0:
		wait = min(wait, cut.Wait)
	default:
		wake = r.o.Published
	}
	select {
	case <-ctx.Done():
	case <-capacity:
	case <-wake:
	case <-time.After(max(0, wait)):
	}
}

// fullOnly is a linger that never passes.
const fullOnly = time.Duration(math.MaxInt64)

// linger returns the linger of the next cut. Busy workers extend it. If all workers are
// busy, a partial batch would only queue, and later events would need another batch. If
// some workers are busy, overlapping inserts would slow each other down. The cut then
// waits for the duration of the last batch that was settled at its first attempt. An
// insert that hangs does not extend this wait.
func (r *Relay) linger() time.Duration {
	switch busy := int(r.busy.Load()); busy {
	case 0:
		return r.minLinger()
	case r.o.Workers:
		return fullOnly
	default:
		return max(r.minLinger(), time.Duration(r.took.Load()))
	}
}
