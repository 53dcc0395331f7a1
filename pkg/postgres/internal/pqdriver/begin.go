package pqdriver

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"strings"
)

// begin begins a transaction and executes the statements of setup in the same round trip.
// It replaces BeginTx of lib/pq, which has three bugs:
//   - It requests READ WRITE unless the transaction is read-only. That overrides
//     default_transaction_read_only, which an operator may have set:
//     https://github.com/lib/pq/pull/619.
//   - It ignores its context until the server replies to BEGIN:
//     https://github.com/lib/pq/issues/1393.
//   - Commit and Rollback call the finish function of an earlier transaction again:
//     https://github.com/lib/pq/blob/v1.12.3/conn.go#L504. Therefore no transaction
//     of a connection may use BeginTx of lib/pq.
func begin(ctx context.Context, c pqConn, o driver.TxOptions, setup string) error {
	statement := "BEGIN"
	switch level := sql.IsolationLevel(o.Isolation); level {
	case sql.LevelDefault:
	case sql.LevelReadUncommitted, sql.LevelReadCommitted, sql.LevelRepeatableRead, sql.LevelSerializable:
		statement += " ISOLATION LEVEL " + strings.ToUpper(level.String())
	default:
		return fmt.Errorf("postgresql has no isolation level %s", level)
	}
	if o.ReadOnly {
		statement += " READ ONLY"
	}
	if setup != "" {
		statement += "; " + setup
	}
	_, err := c.ExecContext(ctx, statement, nil)
	return err //nolint:wrapcheck // drivers return plain errors
}
