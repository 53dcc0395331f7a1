package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Claim counts one more attempt for a batch that is due, and leases it. It alternately
// takes the oldest batch without a failure and the failing batch with the oldest last
// attempt, so that no batch blocks another. If failing is false, it takes no failing batch.
// It returns nil if no batch is due, or if the selected batch has more than maxBytes.
func (s *Store) Claim(ctx context.Context, maxBytes int64, failing bool) (*Lease, error) {
	failpoint.At(failpoint.ClaimBefore)
	var batch Batch
	history := s.known()
	err := s.get(ctx, &batch, claimSQL, history.incarnation, history.cuts,
		s.batchHint(), maxBytes, s.claims.Add(1)%2 == 0, failing, s.destinationName())
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil //nolint:nilnil // no batch is not an error
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
		err = tx.GetContext(ctx, &ours, statement, history.incarnation, history.cuts,
			batch.ID, batch.Token, batch.Attempts, batch.AttemptedAt)
		if !errors.Is(err, sql.ErrNoRows) {
			break
		}
	}
	if err != nil {
		_ = tx.Rollback() // the transaction has written nothing
		if errors.Is(err, sql.ErrNoRows) {
			return nil, nil //nolint:nilnil // another worker has claimed it
		}
		return nil, fmt.Errorf("lease a batch: %w", err)
	}
	failpoint.At(failpoint.ClaimLeased)
	return &Lease{Batch: batch, store: s, tx: tx}, nil
}
