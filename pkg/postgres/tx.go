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

// ErrOutcomeUnknown means that the connection was lost during a commit. The
// transaction is either committed or rolled back.
var ErrOutcomeUnknown = errors.New("connection lost during commit, outcome unknown")

// InTx runs fn in a READ COMMITTED transaction and commits it. If fn fails or panics,
// InTx rolls the transaction back and returns the error of fn unchanged.
//
// If the server did not reply to the commit, the error wraps ErrOutcomeUnknown. After
// any other error, nothing is committed.
func InTx(ctx context.Context, db *sqlx.DB, fn func(tx *sqlx.Tx) error) error {
	tx, err := db.BeginTxx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	// Rollback has no effect after a commit. Its error does not matter because the
	// server rolls back the transaction of a lost connection.
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

// IsPooled returns whether a pooler may share the sessions of the pool among clients. It
// returns false for a pool without Options.Session.
func IsPooled(ctx context.Context, db *sqlx.DB) (bool, error) {
	conn, err := db.Connx(ctx)
	if err != nil {
		return false, err //nolint:wrapcheck // the error says that it could not connect
	}
	defer conn.Close()
	return pqdriver.IsShared(ctx, conn.Conn)
}

// Session executes the statement of InSession.
type Session interface {
	sqlx.QueryerContext
	sqlx.ExecerContext
}

// InSession runs fn, which executes one statement with the settings of the pool. On a
// connection with its own session, the statement is its own transaction. If a pooler shares
// the session among clients, InSession runs fn in a READ COMMITTED transaction, because
// only a transaction has the settings of the pool then.
//
// InSession returns the error of fn unchanged. If fn returns sql.ErrNoRows, the statement
// has its effect nevertheless. After any other error, the caller cannot tell whether the
// statement has run.
func InSession(ctx context.Context, db *sqlx.DB, fn func(s Session) error) error {
	conn, err := db.Connx(ctx)
	if err != nil {
		return err //nolint:wrapcheck // the error says that it could not connect
	}
	defer conn.Close()
	shared, err := pqdriver.IsShared(ctx, conn.Conn)
	if err != nil {
		return err
	}
	if !shared {
		return fn(conn)
	}
	tx, err := conn.BeginTxx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	result := fn(tx)
	if result != nil && !errors.Is(result, sql.ErrNoRows) {
		return result
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return result
}

// InStatement runs fn. fn executes one statement as its own transaction. This takes one
// round trip instead of the three of InTx. The isolation level is the session's
// default.
// fn must read all rows of the statement.
//
// The returned error wraps ErrOutcomeUnknown if the statement was sent and the server
// did not reply. After any other error, nothing is committed.
func InStatement(ctx context.Context, db *sqlx.DB, fn func(s *Statement) error) error {
	// With an explicit connection, database/sql does not retry the statement after
	// the connection is lost.
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

// Statement executes the statement of InStatement.
type Statement struct {
	conn *sqlx.Conn
	sent bool
}

// QueryContext executes the query as (*sql.Tx).QueryContext does. The query must be a
// constant because the connection keeps it prepared, unless it connects to a pooler.
func (s *Statement) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	s.sent = true
	return s.conn.QueryContext(ctx, query, args...) //nolint:wrapcheck // InStatement wraps it
}

// mayHaveRun reports whether a statement that returned err may have committed. Only an
// error of the server proves that the statement did not commit.
func mayHaveRun(err error) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return !ok || fromPooler(server)
}

// fromPooler reports whether a pooler may have created the error.
func fromPooler(err *pq.Error) bool {
	return class(err) == connectionException || err.Code == pqerror.TRStatementCompletionUnknown
}

// mayBeCommitted reports whether a commit that returned err may have succeeded. An
// error of the server proves that the commit failed. The listed errors of database/sql
// and lib/pq prove that the commit was not sent.
func mayBeCommitted(err error) bool {
	if server, ok := errors.AsType[*pq.Error](err); ok {
		return fromPooler(server)
	}
	return !errors.Is(err, sql.ErrTxDone) && !errors.Is(err, pq.ErrInFailedTransaction) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}
