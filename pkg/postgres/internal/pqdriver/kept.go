package pqdriver

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"reflect"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// KeepStatements makes the connection keep the statements that it runs prepared
// until it is returned to its pool. Their texts are a program's few constants. A
// connection of another driver is left as it is.
func KeepStatements(connection *sql.Conn) error {
	return connection.Raw(func(driverConn any) error { //nolint:wrapcheck // a driver's own
		if c, ok := driverConn.(*conn); ok {
			c.keepsEach = true
		}
		return nil
	})
}

// kept are the statements that a connection has prepared and keeps, by their
// texts: of a small statement with many clauses, parsing and planning are most of
// what it costs the server.
//
// They belong to the server's session, by names that lib/pq gives them ("1", "2",
// …). Behind a pooler which shares its sessions, a name may be another client's
// statement, so nothing is kept there.
type kept struct {
	known      bool // whether the session is the connection's own
	own        bool
	statements map[string]keptStatement
}

// keptStatement is what lib/pq's statements are.
type keptStatement interface {
	driver.Stmt
	driver.StmtExecContext
	driver.StmtQueryContext
}

// keeps reports whether to keep a statement prepared.
func (c *conn) keeps(ctx context.Context, hasParameters bool) (bool, error) {
	if !c.keepsEach && (!c.keepsAll || !hasParameters) {
		return false, nil
	}
	return c.ownsSession(ctx)
}

// runKept runs the query as a statement that the connection keeps. It takes
// effect at most once: where it runs again, the server has refused it before.
func runKept[T any](ctx context.Context, c *conn, query string, run func(keptStatement) (T, error)) (result T, err error) {
	if c.kept.statements[query] == nil {
		if err := c.keep(ctx, query); err != nil {
			return result, err
		}
	}
	result, err = run(c.kept.statements[query])
	if !isStale(err) {
		return result, err
	}
	_ = c.kept.statements[query].Close() // of no use any more
	if again := c.keep(ctx, query); again != nil {
		// In a transaction, which has failed: the next one prepares it.
		return result, fmt.Errorf("%w; prepare it again: %w", err, again)
	}
	return run(c.kept.statements[query])
}

func (c *conn) keep(ctx context.Context, query string) error {
	delete(c.kept.statements, query)
	prepared, err := c.pqConn.PrepareContext(ctx, query)
	if err != nil {
		return err //nolint:wrapcheck // a driver's own
	}
	if c.kept.statements == nil {
		c.kept.statements = make(map[string]keptStatement)
	}
	c.kept.statements[query] = prepared.(keptStatement) //nolint:forcetypeassert // what they are
	return nil
}

// preparedOnce is a statement that somebody prepares and closes, and that the
// connection keeps.
type preparedOnce struct {
	conn  *conn
	query string
}

var (
	_ driver.StmtExecContext  = preparedOnce{}
	_ driver.StmtQueryContext = preparedOnce{}
)

// Close implements driver.Stmt.
func (preparedOnce) Close() error { return nil }

// NumInput implements driver.Stmt: the server counts.
func (preparedOnce) NumInput() int { return -1 }

// Exec implements driver.Stmt.
func (preparedOnce) Exec([]driver.Value) (driver.Result, error) { return nil, errors.ErrUnsupported }

// Query implements driver.Stmt.
func (preparedOnce) Query([]driver.Value) (driver.Rows, error) { return nil, errors.ErrUnsupported }

// ExecContext implements driver.StmtExecContext.
func (s preparedOnce) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	return s.conn.ExecContext(ctx, s.query, args)
}

// QueryContext implements driver.StmtQueryContext.
func (s preparedOnce) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	return s.conn.QueryContext(ctx, s.query, args)
}

// isStale reports whether the server refuses a statement for what it was prepared
// as: its columns have changed since, or it is gone.
func isStale(err error) bool {
	refused, ok := errors.AsType[*pq.Error](err)
	return ok && (refused.Code == pqerror.FeatureNotSupported || refused.Code == pqerror.InvalidSQLStatementName)
}

// ownsSession reports whether the session is the connection's own from its
// beginning to its end. A pooler that shares sessions makes up the process id that
// a connection is told at its beginning, since that is what a cancellation names.
func (c *conn) ownsSession(ctx context.Context) (bool, error) {
	if c.kept.known {
		return c.kept.own, nil
	}
	rows, err := c.pqConn.QueryContext(ctx, "SELECT pg_backend_pid()", nil)
	if err != nil {
		return false, err //nolint:wrapcheck // a driver's own
	}
	defer rows.Close()
	pid := make([]driver.Value, 1)
	if err := rows.Next(pid); err != nil {
		return false, fmt.Errorf("ask for the session's process: %w", err)
	}
	told, ok := toldPID(c.pqConn)
	c.kept.known, c.kept.own = true, ok && pid[0] == told
	return c.kept.own, nil
}

// toldPID returns the process id that the connection was told. lib/pq keeps it to
// itself; a version that keeps it elsewhere has nothing kept prepared.
func toldPID(c pqConn) (int64, bool) {
	if field := reflect.Indirect(reflect.ValueOf(c)).FieldByName("pid"); field.IsValid() && field.CanInt() {
		return field.Int(), true
	}
	return 0, false
}
