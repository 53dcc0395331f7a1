package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// Pause is an operator's order to deliver nothing.
type Pause struct {
	At time.Time `db:"paused_at" json:"at"`
	By string    `db:"paused_by" json:"by"`
}

// notPausedSQL is true unless the fleet is paused.
const notPausedSQL = `NOT EXISTS (SELECT FROM {schema}outbox_pause WHERE paused_at IS NOT NULL)`

const (
	pauseSQL = `
WITH paused AS (
    INSERT INTO {schema}outbox_pause AS pause (paused_at, paused_by) VALUES (clock_timestamp(), $1)
    ON CONFLICT (singleton) DO UPDATE SET paused_at = excluded.paused_at, paused_by = excluded.paused_by
    WHERE pause.paused_at IS NULL
    RETURNING paused_at
)
` + auditSQL + ` FROM paused`

	resumeSQL = `
WITH resumed AS (
    UPDATE {schema}outbox_pause AS pause SET paused_at = NULL, paused_by = NULL
    WHERE pause.paused_at IS NOT NULL
    RETURNING singleton
)
` + auditSQL + ` FROM resumed`

	readPauseSQL = `SELECT paused_at, coalesce(paused_by, '') AS paused_by FROM {schema}outbox_pause WHERE paused_at IS NOT NULL`
)

// Pause pauses the whole fleet: relays finish the batches that they deliver, and then
// neither cut nor claim. It returns false if the fleet is paused already. actor is the
// operator, for the audit table.
func (s *Store) Pause(ctx context.Context, actor string) (bool, error) {
	return s.act(ctx, "pause the fleet", pauseSQL, actor, ActionPause, struct{}{})
}

// Resume ends the pause of the fleet. It returns false if the fleet is not paused.
func (s *Store) Resume(ctx context.Context, actor string) (bool, error) {
	resumed, err := s.act(ctx, "resume the fleet", resumeSQL, actor, ActionResume, struct{}{})
	if err != nil || !resumed {
		return false, err
	}
	return true, s.wakeFleet(ctx)
}

// wakeFleet makes the relays look for work. Without it, they do at their next poll.
func (s *Store) wakeFleet(ctx context.Context) error {
	return notifyFleet(ctx, s.db)
}

func notifyFleet(ctx context.Context, db sqlx.ExecerContext) error {
	if _, err := db.ExecContext(ctx, "SELECT pg_notify($1, ''), pg_notify($2, '')", BatchesChannel, outbox.Channel); err != nil {
		return fmt.Errorf("notify the fleet: %w", err)
	}
	return nil
}

// ReadPause returns the pause of the fleet, or nil.
func (s *Store) ReadPause(ctx context.Context) (*Pause, error) {
	var pause Pause
	err := s.get(ctx, &pause, readPauseSQL)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil //nolint:nilnil // no pause is not an error
	}
	if err != nil {
		return nil, fmt.Errorf("read the pause: %w", err)
	}
	pause.At = pause.At.UTC()
	return &pause, nil
}

// Paused returns the pause of the fleet at the last Poll, or nil.
func (s *Store) Paused() *Pause {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pause
}

func (s *Store) setPause(at sql.NullTime, by string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pause = nil
	if at.Valid {
		s.pause = &Pause{At: at.Time.UTC(), By: by}
	}
}
