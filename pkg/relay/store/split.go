package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Refused is an event that the sink can never store.
type Refused struct {
	ID    int64
	Cause error
}

// Outcome contains the id of each event of a batch once. The ids of each slice are in
// ascending order.
type Outcome struct {
	// Delivered events are present at the sink and are deleted.
	Delivered []int64
	// Refused events become dead letters.
	Refused []Refused
	// Remaining events stay in the batch.
	Remaining []int64
	// Failing says that the remaining events may be the cause of the failure too.
	Failing bool
	// Parts are the events of new batches, which have new tokens. The new batches are
	// failing, because some of their events may be the cause of the failure.
	Parts [][]int64
}

func (o Outcome) events() int {
	n := len(o.Delivered) + len(o.Refused) + len(o.Remaining)
	for _, part := range o.Parts {
		n += len(part)
	}
	return n
}

// Shrink removes events from the batch. The caller has checked that no insert of the
// batch is in flight, and which of its events are present. The remaining events keep the
// token. The sink may have recorded the token for other events of the batch. The next
// attempt resolves the remaining events before it inserts them. If an insert of the
// original batch begins late, the token keeps it from adding rows again.
//
// A late insert must not add the events of outcome.Parts either, although they leave the
// token. So either the sink has recorded the token in all of their partitions, or it
// refuses every insert of the batch because of its data. cause is the error of the
// batch, for the operator, or nil.
func (l *Lease) Shrink(ctx context.Context, outcome Outcome, cause error) error {
	return l.finish(endingShrink, func() error {
		if events := outcome.events(); events != l.Events {
			return fmt.Errorf("%w: the outcome names %d of %d events", ErrLeaseLost, events, l.Events)
		}
		if err := l.deleteEvents(ctx, multirange(outcome.Delivered), len(outcome.Delivered)); err != nil {
			return err
		}
		if err := l.deadLetter(ctx, outcome.Refused); err != nil {
			return err
		}
		failpoint.At(failpoint.ShrinkDeleted)
		if err := l.keep(ctx, outcome.Remaining, outcome.Failing, 0, cause); err != nil {
			return err
		}
		return l.insertParts(ctx, outcome.Parts, cause)
	})
}

// keep leaves only the remaining events in the batch. unsent is the number of its attempts
// that no longer count. cause may be nil.
func (l *Lease) keep(ctx context.Context, remaining []int64, failing bool, unsent int, cause error) error {
	if len(remaining) == 0 {
		return l.deleteBatch(ctx)
	}
	var events int
	if err := l.tx.GetContext(ctx, &events, l.store.sql(shrinkBatchSQL), multirange(remaining), l.ID, failing, unsent, reason(cause)); err != nil {
		return fmt.Errorf("write the batch: %w", err)
	}
	return l.expectEvents(events, len(remaining))
}

// insertParts writes the new batches. The order of the ids remains the order of the
// batches after further splits. All batches of the first part are delivered before the
// second part begins, so that few batches exist at a time.
func (l *Lease) insertParts(ctx context.Context, parts [][]int64, cause error) error {
	if len(parts) == 0 {
		return nil
	}
	var failing int
	if err := l.tx.GetContext(ctx, &failing, l.store.sql(failingSQL)); err != nil {
		return fmt.Errorf("count the failing batches: %w", err)
	}
	if failing >= maxParted {
		parts = [][]int64{slices.Sorted(slices.Values(slices.Concat(parts...)))}
	}
	at := batchTime(l.ID).Add(time.Microsecond)
	for _, ids := range parts {
		if err := l.insertBatch(ctx, at, ids, cause, false); err != nil {
			return err
		}
		at = at.Add(time.Duration(2*len(ids)) * time.Microsecond)
	}
	return nil
}

// insertBatch writes a failing batch with an id of the time at. If quarantined is true,
// the batch waits and collects events.
func (l *Lease) insertBatch(ctx context.Context, at time.Time, ids []int64, cause error, quarantined bool) error {
	var events int
	if err := l.tx.GetContext(ctx, &events, l.store.sql(insertBatchSQL), multirange(ids), newBatchID(at),
		l.store.o.MaxDelay.Seconds(), l.store.longestQuarantine(), reason(cause), quarantined); err != nil {
		return fmt.Errorf("write a batch: %w", err)
	}
	return l.expectEvents(events, len(ids))
}
