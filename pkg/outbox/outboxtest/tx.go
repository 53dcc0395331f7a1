package outboxtest

import (
	"context"
	"errors"
)

// Row is the single row of a query: *sql.Row or pgx.Row.
type Row interface {
	Scan(dest ...any) error
}

// Tx is the transaction that has published: *sql.Tx, *sqlx.Tx and other types that embed
// *sql.Tx, or the result of [Pgx] or [InSchema]. The interface has the method Commit so
// that it does not accept a *sql.DB. Commit is never called.
type Tx[R Row] interface {
	QueryRowContext(ctx context.Context, query string, args ...any) R
	Commit() error
}

// InSchema returns tx with the name of the schema of the outbox's tables. Without
// InSchema, PostgreSQL finds the tables by the session's search_path.
func InSchema[R Row](tx Tx[R], schema string) Tx[R] {
	return schemaTx[R]{Tx: tx, schema: schema}
}

type schemaTx[R Row] struct {
	Tx[R]

	schema string
}

// PgxTx is a pgx.Tx.
type PgxTx[R Row] interface {
	QueryRow(ctx context.Context, query string, args ...any) R
	Commit(ctx context.Context) error
}

// Pgx adapts a transaction of pgx, in any of its query execution modes.
func Pgx[R Row](tx PgxTx[R]) Tx[R] { return pgxTx[R]{tx: tx} }

type pgxTx[R Row] struct{ tx PgxTx[R] }

// QueryRowContext implements Tx.
func (p pgxTx[R]) QueryRowContext(ctx context.Context, query string, args ...any) R {
	return p.tx.QueryRow(ctx, query, args...)
}

// Commit implements Tx. It is never called, and returns an error.
func (pgxTx[R]) Commit() error { return errors.ErrUnsupported }
