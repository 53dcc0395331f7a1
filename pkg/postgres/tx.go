package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// ErrOutcomeUnknown says that the connection was lost while a transaction was
// being committed: it may have been committed or not.
var ErrOutcomeUnknown = errors.New("the connection was lost during a commit, whose outcome is unknown")

// InTx runs fn in a transaction of the READ COMMITTED level, whatever the
// server's default, and commits it. If fn fails or panics it is rolled back,
// and fn's error is returned as it is.
//
// An error of the commit itself wraps ErrOutcomeUnknown where the server did
// not answer; where it did, nothing was committed.
func InTx(ctx context.Context, db *sqlx.DB, fn func(tx *sqlx.Tx) error) error {
	tx, err := db.BeginTxx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	// Of no effect after a commit. An error changes nothing: the server rolls
	// back what loses its connection.
	defer func() { _ = tx.Rollback() }()

	if err := fn(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		if mayBeCommitted(err) {
			return fmt.Errorf("commit: %w: %w", ErrOutcomeUnknown, err)
		}
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// mayBeCommitted reports whether a commit that returned err may have happened.
// The server's own errors say that it did not, save for those that a pooler
// makes up in its name, and these of database/sql and lib/pq that it was never
// sent.
func mayBeCommitted(err error) bool {
	if server, ok := errors.AsType[*pq.Error](err); ok {
		return class(server) == connectionException || server.Code == pqerror.TRStatementCompletionUnknown
	}
	return !errors.Is(err, sql.ErrTxDone) && !errors.Is(err, pq.ErrInFailedTransaction) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}
