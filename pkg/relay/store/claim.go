package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Claim marks a batch that is due as sent once more and leases it: the oldest,
// but every other time the oldest of those that have failed before, so that
// neither these nor the others wait for all of the others. It returns nil where
// no batch is due, or the one whose turn it is has more than maxBytes.
func (s *Store) Claim(ctx context.Context, maxBytes int64) (*Lease, error) {
	failpoint.At(failpoint.ClaimBefore)
	var batch Batch
	err := s.db.GetContext(ctx, &batch, s.sql(claimSQL), s.batchHint(), maxBytes, s.claims.Add(1)%2 == 0)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil //nolint:nilnil // to find nothing is no error
	}
	if err != nil {
		return nil, fmt.Errorf("claim a batch: %w", err)
	}
	failpoint.At(failpoint.ClaimMarked)
	tx, err := s.begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("lease a batch: %w", err)
	}
	var ours int
	for _, statement := range []string{s.sql(leaseSQL), s.sql(awaitLeaseSQL)} {
		err = tx.GetContext(ctx, &ours, statement, batch.ID, batch.Token, batch.Attempts, batch.AttemptedAt)
		if !errors.Is(err, sql.ErrNoRows) {
			break
		}
	}
	if err != nil {
		_ = tx.Rollback() // nothing was written
		if errors.Is(err, sql.ErrNoRows) {
			return nil, nil //nolint:nilnil // another worker was faster
		}
		return nil, fmt.Errorf("lease a batch: %w", err)
	}
	failpoint.At(failpoint.ClaimLeased)
	return &Lease{Batch: batch, tx: tx, sql: s.sql}, nil
}
