package outbox

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
)

// Execer executes a statement: a *sql.DB, a *sql.Tx, or an [ExecFunc].
type Execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// Tx is the caller's transaction: *sql.Tx, *sqlx.Tx and other types that embed *sql.Tx,
// or the result of [Pgx]. Publish neither commits nor rolls back. The interface has the
// method Commit so that it does not accept a *sql.DB, which would publish outside of any
// transaction.
type Tx interface {
	Execer
	Commit() error
}

// ExecFunc executes a statement in the caller's transaction. With it, any database
// library can provide a [Tx]. The caller must ensure that the function runs in a
// transaction.
type ExecFunc func(ctx context.Context, query string, args ...any) error

// ExecContext implements Execer.
func (exec ExecFunc) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	return driver.ResultNoRows, exec(ctx, query, args...)
}

// Commit implements Tx. It is never called, and returns an error.
func (ExecFunc) Commit() error { return errors.ErrUnsupported }

// PgxTx is a pgx.Tx, whose Exec returns a Tag.
type PgxTx[Tag any] interface {
	PgxExecer[Tag]
	Commit(ctx context.Context) error
}

// PgxExecer is a *pgxpool.Pool or a *pgx.Conn, whose Exec returns a Tag.
type PgxExecer[Tag any] interface {
	Exec(ctx context.Context, query string, args ...any) (Tag, error)
}

// Pgx adapts a transaction of pgx, in any of its query execution modes:
//
//	publisher.Publish(ctx, outbox.Pgx(tx), event)
func Pgx[Tag any](tx PgxTx[Tag]) Tx { return execFunc(tx) }

// PgxPool adapts a pool or a connection of pgx for a [Notifier].
func PgxPool[Tag any](pool PgxExecer[Tag]) Execer { return execFunc(pool) }

func execFunc[Tag any](pgx PgxExecer[Tag]) ExecFunc {
	return func(ctx context.Context, query string, args ...any) error {
		_, err := pgx.Exec(ctx, query, args...)
		return err
	}
}
