package store

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Dead is an event that the sink can never take.
type Dead struct {
	ID    int64
	Cause error
}

// Part says what becomes of each of a batch's events. Its ids ascend in each
// slice and are, together, the batch's.
type Part struct {
	// Delivered events are at the sink and are removed.
	Delivered []int64
	// Dead events become dead letters.
	Dead []Dead
	// Rest stays the batch.
	Rest []int64
}

// Shrink takes events out of the batch. The caller has made sure that no send of
// the batch is running, and which of its events are at the sink. The rest keeps
// the token, which the sink may know with other events of the batch: a send of
// the whole that begins late adds nothing where the token is known, and the
// rest is asked for before it is sent.
func (l *Lease) Shrink(ctx context.Context, part Part) error {
	return l.finish(ending{"shrink the batch", failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted}, func() error {
		if events := len(part.Delivered) + len(part.Dead) + len(part.Rest); events != l.Events {
			return fmt.Errorf("%w: %d of its %d events have a place", ErrLeaseLost, events, l.Events)
		}
		if err := l.deleteEvents(ctx, multirange(part.Delivered), len(part.Delivered)); err != nil {
			return err
		}
		if err := l.deadLetter(ctx, part.Dead); err != nil {
			return err
		}
		failpoint.At(failpoint.ShrinkDeleted)
		if len(part.Rest) == 0 {
			return l.deleteBatch(ctx)
		}
		var events int
		if err := l.tx.GetContext(ctx, &events, l.sql(shrinkBatchSQL), multirange(part.Rest), l.ID); err != nil {
			return fmt.Errorf("shrink the manifest: %w", err)
		}
		return l.expectEvents(events, len(part.Rest))
	})
}

// Split puts two batches, each under a token of its own, in the place of one
// that the sink refuses for its data: the first n of the ids, which ascend and
// are the batch's, and the others. The caller has made sure that no send of the
// batch is running and that none of its events are at the sink.
func (l *Lease) Split(ctx context.Context, ids []int64, n int, cause error) error {
	return l.finish(ending{"split the batch", failpoint.SplitBeforeCommit, failpoint.SplitCommitted}, func() error {
		if err := l.expectEvents(len(ids), l.Events); err != nil {
			return err
		}
		if err := l.deleteBatch(ctx); err != nil {
			return err
		}
		failpoint.At(failpoint.SplitDeleted)
		// In the order of their events, whatever they are split into later: the
		// parts of one half are done before the other half begins, so that they
		// are never many.
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
	if err := l.tx.GetContext(ctx, &events, l.sql(insertBatchSQL), multirange(ids), id, reason(cause)); err != nil {
		return fmt.Errorf("write a manifest: %w", err)
	}
	return l.expectEvents(events, len(ids))
}
