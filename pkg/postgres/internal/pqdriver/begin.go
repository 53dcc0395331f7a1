package pqdriver

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"strings"
)

// begin begins a transaction. It replaces BeginTx of lib/pq, which has three faults:
//   - It asks for READ WRITE unless the transaction is read-only. So it writes
//     to a server that an operator has set to read-only
//     (default_transaction_read_only): https://github.com/lib/pq/pull/619.
//   - It ignores its context until BEGIN is answered:
//     https://github.com/lib/pq/issues/1393.
//   - Commit and Rollback call the function that ends the watch of an earlier
//     transaction's context again: https://github.com/lib/pq/blob/v1.12.3/conn.go#L504.
//     So no transaction of a connection may begin by BeginTx of lib/pq.
func begin(ctx context.Context, c pqConn, o driver.TxOptions) error {
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
	_, err := c.ExecContext(ctx, statement, nil)
	return err //nolint:wrapcheck // a driver's own
}
