package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
)

var inFlight = []Case{
	{"a running insert is seen on every server, and only while it runs", seesInserts},
	{"a presence check is right after an aborted insert, and the batch arrives once", resolvesAbortedInsert},
}

func seesInserts(ctx context.Context, h Harness) error {
	return h.whileSlow(ctx, func() error { return seesSlowInsert(ctx, h) })
}

func seesSlowInsert(ctx context.Context, h Harness) error {
	slow := sample.Token()
	servers := slices.Concat([]sink.Sink{h.Sink}, h.Others)
	for _, server := range servers {
		if found, err := server.InFlight(ctx, slow); err != nil || found {
			return errors.Join(err, errorIf(found, "InFlight sees an insert that was never sent"))
		}
	}
	batch := sink.Batch{Token: slow, Events: sample.Events(1)}
	insertErr, err := h.during(ctx, batch, func(ctx context.Context, _ context.CancelFunc) error {
		// All servers are asked at the same time, because the insert is short.
		group, grouped := errgroup.WithContext(ctx)
		for _, server := range servers {
			group.Go(func() error {
				return h.eventually(grouped, "InFlight sees the insert", func(ctx context.Context) (bool, error) {
					if found, err := server.InFlight(ctx, sample.Token()); err != nil || found {
						return false, errors.Join(err, errorIf(found, "InFlight sees an insert that was never sent"))
					}
					return server.InFlight(ctx, slow)
				})
			})
		}
		return group.Wait()
	})
	switch {
	case err != nil:
		return err
	case insertErr != nil:
		return insertErr
	}
	return h.awaitEnd(ctx, slow)
}

// during inserts a batch and calls do meanwhile. The context of do ends with the insert. do
// can cancel the insert. during returns the error of the insert and the error of do.
func (h Harness) during(ctx context.Context, batch sink.Batch, do func(ctx context.Context, cancel context.CancelFunc) error) (insertErr, err error) {
	inserting, cancel := context.WithCancel(ctx)
	defer cancel()
	meanwhile, end := context.WithCancelCause(ctx)
	ended := make(chan error, 1)
	go func() {
		err := h.Sink.Insert(inserting, batch)
		end(fmt.Errorf("the insert has ended: %w", errOrNil(err)))
		ended <- err
	}()
	if err = do(meanwhile, cancel); err != nil {
		cancel()
	}
	return <-ended, err
}

// resolvesAbortedInsert follows the relay's resolve step after a client that has gone in
// the middle of an insert.
func resolvesAbortedInsert(ctx context.Context, h Harness) error {
	events, aborted := sample.Events(4), sample.Token()
	if err := h.whileSlow(ctx, func() error { return h.abort(ctx, sample.Batch(aborted, events)) }); err != nil {
		return err
	}
	if err := h.awaitEnd(ctx, aborted); err != nil {
		return err
	}
	stored, err := h.Stored(ctx, events.EventID)
	if err != nil {
		return err
	}
	present := func(i int) bool { return slices.Contains(stored.EventID, events.EventID[i]) }
	if err := expectPresent(ctx, h.Sink, &events.Keys, present); err != nil {
		return fmt.Errorf("after an aborted insert of which %d of %d rows are stored: %w", stored.Len(), events.Len(), err)
	}
	if err := h.insert(ctx, aborted, events); err != nil {
		return err
	}
	found, err := h.Sink.Present(ctx, &events.Keys)
	if err != nil {
		return err
	}
	// The destination may remember the token without the rows. The relay then renews the
	// token.
	if !slices.Contains(found, true) {
		if err := h.insert(ctx, sample.Token(), events); err != nil {
			return err
		}
	}
	if err := h.expectStored(ctx, events, events); err != nil {
		return fmt.Errorf("after a second insert: %w", err)
	}
	return expectPresent(ctx, h.Sink, &events.Keys, all)
}

// abort cancels an insert while the server executes it.
func (h Harness) abort(ctx context.Context, batch sink.Batch) error {
	insertErr, err := h.during(ctx, batch, func(ctx context.Context, cancel context.CancelFunc) error {
		defer cancel()
		return h.eventually(ctx, "InFlight sees the insert", func(ctx context.Context) (bool, error) {
			return h.Sink.InFlight(ctx, batch.Token)
		})
	})
	if err != nil {
		return err
	}
	return errorIf(insertErr == nil, "a cancelled insert returns no error")
}

// awaitEnd waits until no server executes an insert under the token. A server may
// acknowledge an insert before it removes the insert from its list of processes.
func (h Harness) awaitEnd(ctx context.Context, token string) error {
	for _, server := range slices.Concat([]sink.Sink{h.Sink}, h.Others) {
		err := h.eventually(ctx, "the insert is no longer in flight", func(ctx context.Context) (bool, error) {
			found, err := server.InFlight(ctx, token)
			return !found, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// errorIf returns an error with the text if the condition is true.
func errorIf(condition bool, text string) error {
	if condition {
		return errors.New(text)
	}
	return nil
}
