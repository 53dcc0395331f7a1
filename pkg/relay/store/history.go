package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jmoiron/sqlx"
)

// ErrHistoryChanged says that the server's identity or timeline is no longer the one
// that the batches were written under: PostgreSQL failed over or was restored. Cut
// returns it once. All events that waited are unverified then: they are resolved
// before they are inserted.
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

// unverifiedSeconds is how long an insert of a lost history may still be in flight.
func (s *Store) unverifiedSeconds() float64 { return (s.o.FlushTimeout + unverifiedMargin).Seconds() }
