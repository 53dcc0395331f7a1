package pqdriver

import (
	"context"
	"database/sql/driver"
	"net"
)

// conn is a lib/pq connection with the workarounds of this package.
type conn struct {
	pqConn

	socket      net.Conn // below TLS
	watchdog    watchdog
	session     session
	sharedSetup string // Options.SharedSetup
	statements  statements
}

// RemoteAddr returns the address of the server, or of the proxy in front of it.
func (c *conn) RemoteAddr() net.Addr { return c.socket.RemoteAddr() }

// pqConn lists the interfaces of a lib/pq connection that database/sql uses.
type pqConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.QueryerContext
	driver.SessionResetter
	driver.Tx
	driver.Validator
}

// BeginTx implements driver.ConnBeginTx.
func (c *conn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	c.watchdog.watch(ctx)
	setup := ""
	if c.sharedSetup != "" {
		own, err := c.session.isOwn(ctx)
		if err != nil {
			return nil, err
		}
		if !own {
			setup = c.sharedSetup
		}
	}
	if err := begin(ctx, c.pqConn, o, setup); err != nil {
		if setup != "" {
			c.watchdog.abandon() // a transaction may be open
		}
		return nil, err
	}
	return c, nil
}

// ExecContext implements driver.ExecerContext.
func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	c.watchdog.watch(ctx)
	if kept, err := c.statements.keeps(ctx, len(args) > 0); err != nil {
		return nil, err
	} else if kept {
		return runKept(ctx, &c.statements, query, func(s pqStatement) (driver.Result, error) {
			return s.ExecContext(ctx, args)
		})
	}
	return c.pqConn.ExecContext(ctx, query, args) //nolint:wrapcheck // drivers return plain errors
}

// QueryContext implements driver.QueryerContext.
func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	c.watchdog.watch(ctx)
	if kept, err := c.statements.keeps(ctx, len(args) > 0); err != nil {
		return nil, err
	} else if kept {
		return runKept(ctx, &c.statements, query, func(s pqStatement) (driver.Rows, error) {
			return s.QueryContext(ctx, args)
		})
	}
	return c.pqConn.QueryContext(ctx, query, args) //nolint:wrapcheck // drivers return plain errors
}

// PrepareContext implements driver.ConnPrepareContext. If the connection keeps the
// statement prepared, the first execution prepares it.
func (c *conn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	c.watchdog.watch(ctx)
	if kept, err := c.statements.keeps(ctx, true); err != nil {
		return nil, err
	} else if kept {
		return preparedOnce{conn: c, query: query}, nil
	}
	return c.pqConn.PrepareContext(ctx, query) //nolint:wrapcheck // drivers return plain errors
}

// ResetSession implements driver.SessionResetter. The pool calls it before it hands
// out an idle connection.
func (c *conn) ResetSession(ctx context.Context) error {
	if hasInput(c.socket) {
		return driver.ErrBadConn
	}
	return c.pqConn.ResetSession(ctx) //nolint:wrapcheck // drivers return plain errors
}

// IsValid implements driver.Validator. The pool calls it when the connection is
// returned.
func (c *conn) IsValid() bool {
	c.watchdog.release()
	c.statements.keepsEach = false
	return !c.watchdog.abandoned() && c.pqConn.IsValid()
}

// Close implements driver.Conn.
func (c *conn) Close() error {
	c.watchdog.release()
	defer c.watchdog.abandon()
	return c.pqConn.Close() //nolint:wrapcheck // drivers return plain errors
}
