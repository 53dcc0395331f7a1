package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Batch is a manifest: which events one insert carries, and under which token.
type Batch struct {
	ID     uuid.UUID `db:"batch_id"`
	Events int       `db:"event_count"`
	Bytes  int64     `db:"byte_count"`
	Token  string    `db:"token"`
	// Sends counts the sends under Token that have happened or may have,
	// with the one that the claim allows. Only if it is 1 does an "ok" of the
	// sink prove that the events are there.
	Attempts int `db:"attempts"`

	EventIDs     string    `db:"event_ids"` // an int8multirange
	AttemptedAt  time.Time `db:"last_attempt_at"`
	DatabaseTime time.Time `db:"database_time"`
}

// Lease is one worker's hold on one batch: an open transaction with the
// manifest's row locked in it. It ends with the first of Settle, Retry,
// RenewToken, Shrink, Split or Release, and by itself when the worker's connection
// dies. It is not safe for concurrent use.
type Lease struct {
	Batch

	tx  *sqlx.Tx
	sql func(string) string // the store's
}

// ErrLeaseLost says that the batch is no longer this worker's: its connection
// was lost, or events of the batch are gone. Whatever was sent, the next
// claimer resolves it.
var ErrLeaseLost = errors.New("the lease of the batch is lost")

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

// Verify fails unless the lease still holds. It also restarts the time that
// the server lets the lease be idle for.
func (l *Lease) Verify(ctx context.Context) error {
	if _, err := l.tx.ExecContext(ctx, "SELECT 1"); err != nil {
		return fmt.Errorf("%w: %w", ErrLeaseLost, err)
	}
	return nil
}

// Retry gives the batch back, to be claimed again after the delay, and keeps
// the cause for the operator.
func (l *Lease) Retry(ctx context.Context, cause error, delay time.Duration) error {
	return l.finish(ending{"give the batch back", failpoint.RetryBeforeCommit, failpoint.RetryCommitted}, func() error {
		_, err := l.tx.ExecContext(ctx, l.sql(retryBatchSQL), l.ID, reason(cause), delay.Seconds())
		return err //nolint:wrapcheck // finish does
	})
}

// RenewToken gives the batch back under a new token. The caller has made sure
// that no send under the old one is running and that none of the events are
// at the sink.
func (l *Lease) RenewToken(ctx context.Context, cause error) error {
	return l.finish(ending{"give the batch a new token", failpoint.RenewTokenBeforeCommit, failpoint.RenewTokenCommitted}, func() error {
		_, err := l.tx.ExecContext(ctx, l.sql(renewTokenSQL), l.ID, uuid.NewString(), reason(cause))
		return err //nolint:wrapcheck // finish does
	})
}

// Release ends a lease that nothing else has ended, and changes nothing. The
// batch is due again within a second.
func (l *Lease) Release() { _ = l.tx.Rollback() }

// ending is one of the ways in which a lease ends.
type ending struct {
	name              string
	before, committed failpoint.Point
}

// finish runs the last statements of the lease and commits them, all or none.
func (l *Lease) finish(how ending, statements func() error) error {
	defer l.Release()
	if err := statements(); err != nil {
		return fmt.Errorf("%s: %w", how.name, err)
	}
	failpoint.At(how.before)
	if err := l.tx.Commit(); err != nil {
		return fmt.Errorf("%s: commit: %w", how.name, err)
	}
	failpoint.At(how.committed)
	return nil
}

// reason is the error as the operator finds it in last_error: text that
// PostgreSQL takes, of a length that it keeps in line.
func reason(err error) string {
	const maxBytes = 1000
	text := strings.ReplaceAll(err.Error(), "\x00", "")
	if len(text) > maxBytes {
		text = text[:maxBytes]
	}
	return strings.ToValidUTF8(text, "")
}
