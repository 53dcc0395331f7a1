package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jmoiron/sqlx"
)

// ErrHistoryChanged says that the server's identity or timeline has changed since the
// batches were written: PostgreSQL failed over or was restored. Cut returns it once. All
// waiting events are then unverified, so the relay resolves them before it inserts them.
var ErrHistoryChanged = errors.New("postgresql's history has changed (a failover or a restore)")

// markUnverified records the change of history.
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

// unverifiedSeconds is the time during which an insert of a lost history may still be in
// flight.
func (s *Store) unverifiedSeconds() float64 { return (s.o.FlushTimeout + unverifiedMargin).Seconds() }
