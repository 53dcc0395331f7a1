package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

// FuseBlownError says that the fuse of the fleet has blown: the fleet has dead-lettered so
// many events that the sink is a more likely cause than the events. No event becomes a
// dead letter until an operator mends the fuse.
type FuseBlownError struct{ At time.Time }

// Error implements error.
func (e *FuseBlownError) Error() string {
	return fmt.Sprintf("no event becomes a dead letter since %s, because the number of dead letters in an hour has reached its bound; "+
		"to continue: correct the cause (relay dead-letters list), then run relay dead-letters resume", e.At.UTC().Format(time.RFC3339))
}

// AllowDeadLetters counts events that are about to become dead letters, in the
// transaction of the lease. If it returns false, the fuse has blown, and the events must
// stay in the outbox.
func (l *Lease) AllowDeadLetters(ctx context.Context, events int) (bool, error) {
	var counted int
	err := l.tx.GetContext(ctx, &counted, l.store.sql(fuseSQL), events, l.store.known().cuts, l.store.o.MaxDeadLetters)
	if errors.Is(err, sql.ErrNoRows) {
		_, err = l.tx.ExecContext(ctx, l.store.sql(blowFuseSQL))
		if err == nil {
			l.store.setFuse(sql.NullTime{Time: l.DatabaseTime, Valid: true})
			return false, nil
		}
	}
	if err != nil {
		return false, fmt.Errorf("count the dead letters: %w", err)
	}
	return true, nil
}

// Fuse returns a *FuseBlownError if the fuse has blown at the last Poll.
func (s *Store) Fuse() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.fuseBlownAt.Valid {
		return nil
	}
	return &FuseBlownError{s.fuseBlownAt.Time}
}

func (s *Store) setFuse(blownAt sql.NullTime) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fuseBlownAt = blownAt
}

// MendFuse lets events become dead letters again, up to the bound of a new hour. It makes
// all failing batches due. It returns false if the fuse has not blown. actor is the
// operator, for the audit table.
func (s *Store) MendFuse(ctx context.Context, actor string) (bool, error) {
	return s.act(ctx, "mend the fuse", mendFuseSQL, actor, ActionMendFuse, struct{}{})
}
