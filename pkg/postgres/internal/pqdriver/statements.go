package pqdriver

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// KeepStatements makes the connection keep its statements prepared until it is returned
// to the pool. Use it only with a small set of constant statements. It has no effect on
// a connection of another driver.
func KeepStatements(connection *sql.Conn) error {
	return connection.Raw(func(driverConn any) error { //nolint:wrapcheck // the caller wraps it
		if c, ok := driverConn.(*conn); ok {
			c.statements.keepsEach = true
		}
		return nil
	})
}

// statements is a connection's cache of prepared statements. lib/pq has none:
// https://github.com/lib/pq/blob/v1.12.3/conn.go#L887. If a pooler shares the session
// among clients, the cache is off. lib/pq names statements by number
// (https://github.com/lib/pq/blob/v1.12.3/conn.go#L577), so the names of two clients
// would collide. See docs/adr/0002-keep-statements-prepared.md.
type statements struct {
	conn      pqConn
	session   *session
	keepsAll  bool // Options.KeepStatements
	keepsEach bool // KeepStatements, until the connection is returned
	prepared  map[string]pqStatement
}

// pqStatement is the interface of lib/pq's statements.
type pqStatement interface {
	driver.Stmt
	driver.StmtExecContext
	driver.StmtQueryContext
}

// keeps reports whether the connection keeps a statement prepared.
func (s *statements) keeps(ctx context.Context, hasParameters bool) (bool, error) {
	if !s.keepsEach && (!s.keepsAll || !hasParameters) {
		return false, nil
	}
	return s.session.isOwn(ctx)
}

// runKept runs a statement and keeps it prepared. It repeats the statement only if the
// server refused the first run, so the statement takes effect at most once.
func runKept[T any](ctx context.Context, s *statements, query string, run func(pqStatement) (T, error)) (result T, err error) {
	if s.prepared[query] == nil {
		if err := s.prepare(ctx, query); err != nil {
			return result, err
		}
	}
	result, err = run(s.prepared[query])
	if !isStale(err) {
		return result, err
	}
	_ = s.prepared[query].Close() // the statement is unusable
	if again := s.prepare(ctx, query); again != nil {
		// The transaction has failed. The next transaction prepares the statement.
		return result, fmt.Errorf("%w; prepare it again: %w", err, again)
	}
	return run(s.prepared[query])
}

func (s *statements) prepare(ctx context.Context, query string) error {
	delete(s.prepared, query)
	prepared, err := s.conn.PrepareContext(ctx, query)
	if err != nil {
		return err //nolint:wrapcheck // drivers return plain errors
	}
	if s.prepared == nil {
		s.prepared = make(map[string]pqStatement)
	}
	s.prepared[query] = prepared.(pqStatement) //nolint:forcetypeassert // the type of all lib/pq statements
	return nil
}

// isStale reports whether the server refused a prepared statement because its columns
// have changed (https://github.com/lib/pq/issues/1151) or because it no longer exists.
func isStale(err error) bool {
	refused, ok := errors.AsType[*pq.Error](err)
	return ok && (refused.Code == pqerror.FeatureNotSupported || refused.Code == pqerror.InvalidSQLStatementName)
}

// preparedOnce is a statement that the connection keeps prepared after the caller
// closes it.
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

// NumInput implements driver.Stmt. The server checks the number of parameters.
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
