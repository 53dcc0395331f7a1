package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Lease is an open transaction that has locked a batch's row for one worker. It ends
// with the first of Settle, Retry, Fail, Postpone, Hold, SetAside, RenewToken, Shrink or Release, or with the
// worker's connection. It is not safe for concurrent use.
type Lease struct {
	Batch

	store *Store
	tx    *sqlx.Tx
}

// ErrLeaseLost says that the worker no longer holds the batch: its connection is lost,
// or events of the batch were deleted. The next claim resolves the batch.
var ErrLeaseLost = errors.New("the lease of the batch is lost")

// Verify returns an error if the lease is lost. It also restarts the server's idle
// timeout of the lease.
func (l *Lease) Verify(ctx context.Context) error {
	if _, err := l.tx.ExecContext(ctx, "SELECT 1"); err != nil {
		return fmt.Errorf("%w: %w", ErrLeaseLost, err)
	}
	return nil
}

// Retry releases the batch and stores the cause for the operator. The batch is due again
// after the delay.
func (l *Lease) Retry(ctx context.Context, cause error, delay time.Duration) error {
	return l.retry(ctx, cause, delay, 0, sql.NullTime{})
}

// Fail is like Retry, for a cause that may be the batch's data. The batch is failing from
// then on.
func (l *Lease) Fail(ctx context.Context, cause error, delay time.Duration) error {
	return l.retry(ctx, cause, delay, 1, sql.NullTime{})
}

// Postpone is like Retry, for an attempt that has inserted nothing. The next attempt gets
// the PreviousAttemptAt of this attempt.
func (l *Lease) Postpone(ctx context.Context, cause error, delay time.Duration) error {
	return l.retry(ctx, cause, delay, 0, l.PreviousAttemptAt)
}

func (l *Lease) retry(ctx context.Context, cause error, delay time.Duration, failures int, lastInsert sql.NullTime) error {
	return l.finish(endingRetry, func() error {
		_, err := l.tx.ExecContext(ctx, l.store.sql(retryBatchSQL), l.ID, reason(cause), delay.Seconds(), failures, lastInsert)
		return err //nolint:wrapcheck // finish adds the operation
	})
}

// Release ends the lease and changes nothing. The batch is due again within a second. If
// the lease has already ended, Release does nothing.
func (l *Lease) Release() { _ = l.tx.Rollback() }

// ending is one way to end a lease.
type ending struct {
	name              string
	before, committed failpoint.Point
}

var (
	endingRetry  = ending{"release the batch for a retry", failpoint.RetryBeforeCommit, failpoint.RetryCommitted}
	endingShrink = ending{"shrink the batch", failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted}
)

// finish executes the last statements of the lease and commits them.
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

// reason returns the error's text for last_error. The text is valid for PostgreSQL, and
// short enough to stay in the row. It is empty if there is no error.
func reason(err error) string {
	const maxBytes = 1000
	if err == nil {
		return ""
	}
	text := strings.ReplaceAll(err.Error(), "\x00", "")
	if len(text) > maxBytes {
		text = text[:maxBytes]
	}
	return strings.ToValidUTF8(text, "")
}
