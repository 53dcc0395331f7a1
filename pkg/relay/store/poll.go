package store

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Poll tells whether there may be work to cut or to claim. It is the poll: one
// statement, outside of any lock. It also finds what the hints hide: an event
// that committed long after others with higher ids gets the lowWatermark lowered, so
// that the next Cut takes it.
func (s *Store) Poll(ctx context.Context) (work bool, err error) {
	s.mu.Lock()
	lowWatermark, cuts := s.lowWatermark, s.cuts
	s.mu.Unlock()
	var seen struct {
		LateCommit  int64         `db:"late_commit"`
		AboveFloor  bool          `db:"above_floor"`
		OldestBatch uuid.NullUUID `db:"oldest_batch"`
		LastCutAt   sql.NullTime  `db:"last_cut_at"`
	}
	if err := s.db.GetContext(ctx, &seen, s.sql(pollSQL), lowWatermark, cuts); err != nil {
		return false, fmt.Errorf("look for work: %w", err)
	}
	oldest := seen.OldestBatch.UUID
	if !seen.OldestBatch.Valid && seen.LastCutAt.Valid {
		// Whatever is cut from now on is younger, also where a cut is under way.
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
	return seen.AboveFloor || seen.OldestBatch.Valid || seen.LateCommit > 0, nil
}

// lowerWatermark makes the next cut look from above floor; where another process
// cuts right now, the next Poll tries again.
func (s *Store) lowerWatermark(ctx context.Context, lowWatermark int64) error {
	tx, err := s.begin(ctx)
	if err != nil {
		return fmt.Errorf("lower the lowWatermark: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing
	cursor, err := s.lockCursor(ctx, tx)
	if err != nil || cursor == nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, s.sql(lowerWatermarkSQL), cursor.Cuts, lowWatermark); err != nil {
		return fmt.Errorf("lower the lowWatermark: %w", err)
	}
	failpoint.At(failpoint.WatermarkBeforeCommit)
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("lower the lowWatermark: %w", err)
	}
	return nil
}
