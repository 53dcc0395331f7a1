package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

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
