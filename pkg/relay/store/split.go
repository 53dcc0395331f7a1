package store

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

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
}

// Shrink removes events from the batch. The caller has checked that no insert of the
// batch is in flight, and which of its events are present. The remaining events keep the
// token. The sink may have recorded the token for other events of the batch. The next
// attempt resolves the remaining events before it inserts them. If an insert of the
// original batch begins late, the token keeps it from adding rows again.
func (l *Lease) Shrink(ctx context.Context, outcome Outcome) error {
	return l.finish(ending{"shrink the batch", failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted}, func() error {
		if events := len(outcome.Delivered) + len(outcome.Refused) + len(outcome.Remaining); events != l.Events {
			return fmt.Errorf("%w: the outcome names %d of %d events", ErrLeaseLost, events, l.Events)
		}
		if err := l.deleteEvents(ctx, multirange(outcome.Delivered), len(outcome.Delivered)); err != nil {
			return err
		}
		if err := l.deadLetter(ctx, outcome.Refused); err != nil {
			return err
		}
		failpoint.At(failpoint.ShrinkDeleted)
		if len(outcome.Remaining) == 0 {
			return l.deleteBatch(ctx)
		}
		var events int
		if err := l.tx.GetContext(ctx, &events, l.sql(shrinkBatchSQL), multirange(outcome.Remaining), l.ID); err != nil {
			return fmt.Errorf("write the batch: %w", err)
		}
		return l.expectEvents(events, len(outcome.Remaining))
	})
}

// Split replaces a batch that the sink refuses because of its data by two batches with
// new tokens. One has the first n of the batch's ascending ids, the other has the rest.
// The caller has checked that no insert of the batch is in flight, and that all events
// are absent.
func (l *Lease) Split(ctx context.Context, ids []int64, n int, cause error) error {
	return l.finish(ending{"split the batch", failpoint.SplitBeforeCommit, failpoint.SplitCommitted}, func() error {
		if err := l.expectEvents(len(ids), l.Events); err != nil {
			return err
		}
		if err := l.deleteBatch(ctx); err != nil {
			return err
		}
		failpoint.At(failpoint.SplitDeleted)
		// The order of the ids remains the order of the events after further splits. All
		// batches of the first half are delivered before the second half begins, so that
		// few batches exist at a time.
		first := batchTime(l.ID).Add(time.Microsecond)
		second := first.Add(time.Duration(2*n) * time.Microsecond)
		if err := l.insertBatch(ctx, newBatchID(first), ids[:n], cause); err != nil {
			return err
		}
		return l.insertBatch(ctx, newBatchID(second), ids[n:], cause)
	})
}

func (l *Lease) insertBatch(ctx context.Context, id uuid.UUID, ids []int64, cause error) error {
	var events int
	if err := l.tx.GetContext(ctx, &events, l.sql(insertBatchSQL), multirange(ids), id, reason(cause), l.Failures+1); err != nil {
		return fmt.Errorf("write a batch: %w", err)
	}
	return l.expectEvents(events, len(ids))
}
