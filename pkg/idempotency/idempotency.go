// Package idempotency lets a client repeat a request whose answer it has lost.
// The answer to a request that changed something is kept under the client's
// key, in the transaction of the change: there is no effect without its key and
// no key without its effect, wherever the process dies.
package idempotency

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// DefaultTTL is how long an answer is kept where Options do not say.
const DefaultTTL = 24 * time.Hour

// MaxKeyBytes bounds a key.
const MaxKeyBytes = 255

var (
	// ErrInProgress says that another request with the key is being worked on.
	ErrInProgress = errors.New("a request with this idempotency key is being worked on")
	// ErrMismatch says that the key belongs to a request that asked for
	// something else.
	ErrMismatch = errors.New("the idempotency key was used for another request")
)

// Options configure a Keeper. DB is required.
type Options struct {
	DB  *sqlx.DB
	Log *slog.Logger
	// TTL is how long an answer is kept; DefaultTTL by default.
	TTL time.Duration
	// Schema is the schema of the table of keys. If it is empty, the table is found by
	// the session's search_path.
	Schema string
}

// Keeper keeps answers under keys. It is safe for concurrent use by any number
// of processes on one database.
type Keeper struct {
	db  *sqlx.DB
	log *slog.Logger
	ttl time.Duration
	sql func(string) string // puts the schema into a statement
}

// NewKeeper returns a Keeper.
func NewKeeper(o Options) *Keeper {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.TTL <= 0 {
		o.TTL = DefaultTTL
	}
	return &Keeper{db: o.DB, log: o.Log, ttl: o.TTL, sql: postgres.InSchema(o.Schema)}
}

// Key is a client's key, and what it was used for.
type Key struct {
	// Value is 1 to MaxKeyBytes long.
	Value string
	// Fingerprint is a hash of what the request asks for.
	Fingerprint [32]byte
}

// Answer is what a client was told.
type Answer struct {
	Status   int    `db:"status"`
	Location string `db:"location"` // may be empty
	Body     []byte `db:"body"`
}

// Do does the work in tx, once for a key, and keeps its answer in tx: later
// calls get that answer, and replayed is true. Nothing is kept of work that
// fails. It returns ErrInProgress while another transaction has the key, and
// ErrMismatch where the key has another fingerprint.
func (k *Keeper) Do(ctx context.Context, tx *sqlx.Tx, key Key, work func() (Answer, error)) (answer Answer, replayed bool, err error) {
	answer, replayed, err = k.take(ctx, tx, key)
	if err != nil || replayed {
		return answer, replayed, err
	}
	failpoint.At(failpoint.KeyTaken)
	if answer, err = work(); err != nil {
		return Answer{}, false, err
	}
	result, err := tx.ExecContext(ctx, k.sql(keepSQL), key.Value, key.Fingerprint[:], answer.Status, answer.Location,
		answer.Body, k.ttl.Seconds())
	if err != nil {
		return Answer{}, false, fmt.Errorf("keep the answer: %w", err)
	}
	rows, err := result.RowsAffected()
	if err != nil {
		return Answer{}, false, fmt.Errorf("keep the answer: %w", err)
	}
	if rows != 1 { // somebody has kept one meanwhile, who had no lock
		return Answer{}, false, ErrInProgress
	}
	failpoint.At(failpoint.KeyKept)
	return answer, false, nil
}

// The lock is the transaction's, so that a process that dies leaves none behind.
const lockSQL = `SELECT pg_try_advisory_xact_lock(hashtextextended('diehard idempotency key ' || $1::text, 0))`

// A statement of its own after the lock: its snapshot holds what the lock's
// owner before has committed.
const selectSQL = `
SELECT fingerprint, status, location, body
FROM {schema}idempotency_keys
WHERE key = $1 AND expires_at > clock_timestamp()`

const keepSQL = `
INSERT INTO {schema}idempotency_keys (key, fingerprint, status, location, body, expires_at)
VALUES ($1, $2, $3, $4, $5, clock_timestamp() + $6 * interval '1 second')
ON CONFLICT (key) DO UPDATE
SET fingerprint = excluded.fingerprint, status = excluded.status, location = excluded.location,
    body = excluded.body, expires_at = excluded.expires_at
WHERE {schema}idempotency_keys.expires_at <= clock_timestamp()`

// take locks the key until tx ends, and returns the answer that is kept under
// it, if there is one.
func (k *Keeper) take(ctx context.Context, tx *sqlx.Tx, key Key) (answer Answer, found bool, err error) {
	var locked bool
	if err := tx.GetContext(ctx, &locked, lockSQL, key.Value); err != nil {
		return Answer{}, false, fmt.Errorf("lock the idempotency key: %w", err)
	}
	if !locked {
		return Answer{}, false, ErrInProgress
	}
	var kept struct {
		Fingerprint []byte `db:"fingerprint"`
		Answer
	}
	err = tx.GetContext(ctx, &kept, k.sql(selectSQL), key.Value)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return Answer{}, false, nil
	case err != nil:
		return Answer{}, false, fmt.Errorf("look for the idempotency key: %w", err)
	case !bytes.Equal(kept.Fingerprint, key.Fingerprint[:]):
		return Answer{}, false, ErrMismatch
	}
	return kept.Answer, true, nil
}

const (
	// cleanInterval is how often expired answers are removed.
	cleanInterval = time.Minute
	// cleanRows bounds one statement, so that it holds its locks for a moment
	// only.
	cleanRows = 1000
)

// Of several processes each removes rows of its own.
const cleanSQL = `
DELETE FROM {schema}idempotency_keys
WHERE key IN (
    SELECT key FROM {schema}idempotency_keys
    WHERE expires_at <= clock_timestamp()
    ORDER BY expires_at
    LIMIT $1
    FOR UPDATE SKIP LOCKED)`

// Run removes expired answers until ctx ends, and returns nil then.
func (k *Keeper) Run(ctx context.Context) error {
	for {
		if err := k.Clean(ctx); err != nil && ctx.Err() == nil && !postgres.IsUnavailable(err) {
			k.log.WarnContext(ctx, "expired idempotency keys cannot be removed", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(cleanInterval):
		}
	}
}

// Clean removes what has expired.
func (k *Keeper) Clean(ctx context.Context) error {
	for {
		result, err := k.db.ExecContext(ctx, k.sql(cleanSQL), cleanRows)
		if err != nil {
			return fmt.Errorf("remove expired idempotency keys: %w", err)
		}
		if rows, err := result.RowsAffected(); err != nil || rows < cleanRows {
			return err //nolint:wrapcheck // never, with lib/pq
		}
	}
}
