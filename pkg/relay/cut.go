package relay

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
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
			if work, err = r.o.Store.Poll(ctx); err == nil {
				lastLook = time.Now()
				if work {
					r.work.send(r.o.Workers)
				}
			}
		}
		select {
		case <-r.room: // what follows sees it
		default:
		}
		linger := r.pace()
		var cut store.Cut
		if work && err == nil {
			cut, err = r.o.Store.Cut(ctx, linger)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err() //nolint:wrapcheck // the end that was asked for
		case errors.Is(err, store.ErrHistoryChanged):
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
		r.awaitCut(ctx, cut, linger > r.linger(), time.Until(lastLook.Add(r.o.PollInterval)))
	}
}

// fullOnly is a linger that never passes.
const fullOnly = time.Duration(math.MaxInt64)

// pace is the linger of the next cut, longer while batches are sent. Where no worker
// is free, what does not fill a batch would only wait in one, and what comes later in
// another. And inserts that overlap mostly slow each other down: while a batch is under
// way, the next is put off for as long as the last one took that was settled at once,
// so that one which hangs holds nothing up for longer.
func (r *Relay) pace() time.Duration {
	switch busy := int(r.busy.Load()); busy {
	case 0:
		return r.linger()
	case r.o.Workers:
		return fullOnly
	default:
		return max(r.linger(), time.Duration(r.took.Load()))
	}
}

// awaitCut waits until it makes sense to try again after cut. paced says that a
// worker which becomes free is a reason to.
func (r *Relay) awaitCut(ctx context.Context, cut store.Cut, paced bool, untilPoll time.Duration) {
	var room, wake <-chan struct{}
	if paced {
		room = r.room
	}
	wait := untilPoll
	switch {
	case cut.More: // batches wait, perhaps of another relay, whose workers are busy
		r.work.send(1)
		room = r.room
		if cut.Wait > 0 { // who claims them makes room here or there
			wait = min(wait, max(cut.Wait, minCutInterval))
		}
	case cut.Wait > minCutInterval: // a full batch need not wait for the linger
		select {
		case <-ctx.Done():
		case <-room:
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
	case <-room:
	case <-wake:
	case <-time.After(max(0, wait)):
	}
}
