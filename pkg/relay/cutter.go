package relay

import (
	"context"
	"errors"
	"time"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// minCutInterval is the least time between two looks for a full batch while
// the linger runs or a batch waits.
const minCutInterval = 250 * time.Millisecond

// cutUntil cuts batches until ctx ends. Most of the time it waits: for a
// wake-up, for the rest of the linger, for room, or for the poll.
func (r *Relay) cutUntil(ctx context.Context) error {
	lastLook := time.Time{}
	for {
		if err := r.circuit.awaitClosed(ctx); err != nil {
			return err
		}
		// The poll also finds what the store's hints hide, so it is due even
		// if wake-ups keep coming.
		work := true
		var err error
		if time.Since(lastLook) >= r.o.PollInterval {
			if work, err = r.o.Store.Look(ctx); err == nil {
				lastLook = time.Now()
				if work {
					r.work.send(r.o.Workers)
				}
			}
		}
		var cut outbox.Cut
		if work && err == nil {
			cut, err = r.o.Store.Cut(ctx, r.linger())
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err() //nolint:wrapcheck // the end that was asked for
		case errors.Is(err, outbox.ErrHistoryChanged):
			r.log.ErrorContext(ctx, "batches will be resolved before they are sent", "err", err)
			continue
		case err != nil:
			failures := r.postgres.failed(ctx, r.log, err)
			pause(ctx, r.backoff.delay(failures))
			continue
		}
		r.postgres.succeeded(ctx, r.log)
		if cut.Batches > 0 {
			r.work.send(cut.Batches)
			if cut.More {
				continue
			}
		}
		r.awaitCut(ctx, cut, time.Until(lastLook.Add(r.o.PollInterval)))
	}
}

// awaitCut waits until it makes sense to try again after cut.
func (r *Relay) awaitCut(ctx context.Context, cut outbox.Cut, untilPoll time.Duration) {
	var room, wake <-chan struct{}
	wait := untilPoll
	switch {
	case cut.More: // batches wait, perhaps of another relay, whose workers are busy
		r.work.send(1)
		room = r.room
		if cut.Wait > 0 { // who claims them makes room here or there
			wait = min(wait, max(cut.Wait, minCutInterval))
		}
	case cut.Wait > minCutInterval: // a full batch need not wait for the linger
		pause(ctx, minCutInterval)
		wait, wake = min(wait, cut.Wait-minCutInterval), r.o.Published
	case cut.Wait > 0:
		wait = min(wait, cut.Wait)
	default:
		wake = r.o.Published
	}
	select {
	case <-ctx.Done():
	case <-room:
	case <-wake:
	case <-time.After(max(0, wait)):
	}
}
