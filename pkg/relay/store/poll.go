package store

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Poll returns whether events may wait for a cut, or batches for a claim. It executes one
// statement and takes no lock. If it finds a late commit below the low watermark, it
// lowers the low watermark, so that the next Cut takes the event.
func (s *Store) Poll(ctx context.Context) (work bool, err error) {
	s.mu.Lock()
	lowWatermark, cuts := s.lowWatermark, s.cuts
	s.mu.Unlock()
	var seen struct {
		LateCommit  int64         `db:"late_commit"`
		AboveLow    bool          `db:"above_low_watermark"`
		OldestBatch uuid.NullUUID `db:"oldest_batch"`
		LastCutAt   sql.NullTime  `db:"last_cut_at"`
	}
	if err := s.db.GetContext(ctx, &seen, s.sql(pollSQL), lowWatermark, cuts); err != nil {
		return false, fmt.Errorf("poll for work: %w", err)
	}
	oldest := seen.OldestBatch.UUID
	if !seen.OldestBatch.Valid && seen.LastCutAt.Valid {
		// All later batches are younger, including the batches of a cut that is not
		// committed yet.
		oldest = firstBatchID(seen.LastCutAt.Time)
	}
	s.mu.Lock()
	s.oldestBatch = oldest
	s.mu.Unlock()
	if seen.LateCommit > 0 {
		if err := s.lowerWatermark(ctx, seen.LateCommit-1); err != nil {
			return false, err
		}
	}
	return seen.AboveLow || seen.OldestBatch.Valid || seen.LateCommit > 0, nil
}

// lowerWatermark makes the next cut start above lowWatermark. If another process is
// cutting, it does nothing, and the next Poll tries again.
func (s *Store) lowerWatermark(ctx context.Context, lowWatermark int64) error {
	tx, err := s.begin(ctx)
	if err != nil {
		return fmt.Errorf("lower the low watermark: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	cursor, err := s.lockCursor(ctx, tx)
	if err != nil || cursor == nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, s.sql(lowerWatermarkSQL), cursor.Cuts, lowWatermark); err != nil {
		return fmt.Errorf("lower the low watermark: %w", err)
	}
	failpoint.At(failpoint.WatermarkBeforeCommit)
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("lower the low watermark: %w", err)
	}
	return nil
}
