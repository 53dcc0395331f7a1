package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
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

// InStatement runs fn, whose one statement is a transaction by itself: it takes
// one round trip where InTx takes three. Its isolation is the server's default.
// fn reads the statement's rows to their end.
//
// fn's error wraps ErrOutcomeUnknown where the statement was sent and the server
// did not answer; where it did, or nothing was sent, nothing was committed.
func InStatement(ctx context.Context, db *sqlx.DB, fn func(s *Statement) error) error {
	// On one connection, so that database/sql does not send the statement again
	// when that is lost.
	conn, err := db.Connx(ctx)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer conn.Close()
	if err := pqdriver.KeepStatements(conn.Conn); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	s := &Statement{conn: conn}
	if err := fn(s); err != nil {
		if s.sent && mayHaveRun(err) {
			return fmt.Errorf("commit: %w: %w", ErrOutcomeUnknown, err)
		}
		return err
	}
	return nil
}

// Statement is the one that a function runs in InStatement.
type Statement struct {
	conn *sqlx.Conn
	sent bool
}

// QueryContext runs it, as (*sql.Tx).QueryContext does. The query is a constant:
// the connection keeps it prepared, unless it leads to a pooler.
func (s *Statement) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	s.sent = true
	return s.conn.QueryContext(ctx, query, args...) //nolint:wrapcheck // a driver's own
}

// mayHaveRun reports whether a statement that returned err may have run to its
// end: only the server's own error says that it did not.
func mayHaveRun(err error) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return !ok || madeUp(server)
}

// madeUp reports whether the error is one that a pooler makes up in the server's
// name.
func madeUp(err *pq.Error) bool {
	return class(err) == connectionException || err.Code == pqerror.TRStatementCompletionUnknown
}

// mayBeCommitted reports whether a commit that returned err may have happened.
// The server's own errors, unless a pooler has made them up, say that it did not,
// and these of database/sql and lib/pq that it was never sent.
func mayBeCommitted(err error) bool {
	if server, ok := errors.AsType[*pq.Error](err); ok {
		return madeUp(server)
	}
	return !errors.Is(err, sql.ErrTxDone) && !errors.Is(err, pq.ErrInFailedTransaction) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}
