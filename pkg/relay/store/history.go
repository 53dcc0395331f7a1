package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jmoiron/sqlx"
)

// ErrHistoryChanged is what Cut returns once when it finds that the server's
// identity or timeline is not the one that the batches were written under:
// after a failover or a restore. It has arranged for everything that was there
// to be asked for at the sink before it is sent.
var ErrHistoryChanged = errors.New("postgresql's history has changed (a failover or a restore): " +
	"what waits is looked up at the sink before it is sent")

func (s *Store) markUnverified(ctx context.Context, tx *sqlx.Tx) error {
	if _, err := tx.ExecContext(ctx, s.sql(unverifiedBatchesSQL), s.unverifiedSeconds()); err != nil {
		return fmt.Errorf("record the change of history: %w", err)
	}
	if _, err := tx.ExecContext(ctx, s.sql(recordHistorySQL)); err != nil {
		return fmt.Errorf("record the change of history: %w", err)
	}
	s.forgetBatches()
	return ErrHistoryChanged
}

// unverifiedSeconds is how long an insert that was begun in a lost history may
// still run.
func (s *Store) unverifiedSeconds() float64 { return (s.o.FlushTimeout + unverifiedMargin).Seconds() }
