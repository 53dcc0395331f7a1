package store

import (
	"context"
	"fmt"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Settle deletes the batch and its events. The caller has proof that all these events are
// present at the sink.
func (l *Lease) Settle(ctx context.Context) error {
	return l.finish(ending{"settle the batch", failpoint.SettleBeforeCommit, failpoint.SettleCommitted}, func() error {
		if err := l.deleteEvents(ctx, l.EventIDs, l.Events); err != nil {
			return err
		}
		failpoint.At(failpoint.SettleDeleted)
		return l.deleteBatch(ctx)
	})
}

func (l *Lease) expectEvents(events, expected int) error {
	if events != expected {
		return fmt.Errorf("%w: found %d of %d events", ErrLeaseLost, events, expected)
	}
	return nil
}

func (l *Lease) deleteEvents(ctx context.Context, ids string, events int) error {
	result, err := l.tx.ExecContext(ctx, l.store.sql(deleteEventsSQL), ids)
	if err != nil {
		return fmt.Errorf("delete the events: %w", err)
	}
	deleted, err := result.RowsAffected()
	if err != nil {
		return fmt.Errorf("delete the events: %w", err)
	}
	return l.expectEvents(int(deleted), events)
}

func (l *Lease) deleteBatch(ctx context.Context) error {
	if _, err := l.tx.ExecContext(ctx, l.store.sql(deleteBatchSQL), l.ID); err != nil {
		return fmt.Errorf("delete the batch: %w", err)
	}
	return nil
}
