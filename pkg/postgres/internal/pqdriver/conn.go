package pqdriver

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"net"
	"strings"
	"time"
)

// cancelGrace is how long a server has to answer that it has canceled a
// statement, or finished it, when the statement's context has ended.
const cancelGrace = time.Second

// conn is a lib/pq connection that is closed where the context of its user has
// ended and the server stays silent. lib/pq asks the server to cancel then, and
// waits for the answer to the statement for as long as the connection lives:
// with a server that hangs, or behind a pooler that does, for ever.
type conn struct {
	pqConn

	dialed    net.Conn        // what lies below it, and below TLS
	abandoned context.Context //nolint:containedctx // ends with abandon
	abandon   func()          // closes what the connection was dialed as
	release   func()          // ends the watch of the user's context; nil is none
	keepsAll  bool            // Options.KeepStatements
	keepsEach bool            // set by KeepStatements, until the connection is returned
	kept      kept
}

// pqConn is what database/sql makes use of in lib/pq's connection.
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

// BeginTx implements driver.ConnBeginTx, and never by lib/pq's own. That asks for
// READ WRITE by name, and so writes to a server that somebody has set to
// read-only. And what it remembers of the transaction's context it takes for the
// next one's, too.
func (c *conn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	c.watch(ctx)
	begin := "BEGIN"
	switch level := sql.IsolationLevel(o.Isolation); level {
	case sql.LevelDefault:
	case sql.LevelReadUncommitted, sql.LevelReadCommitted, sql.LevelRepeatableRead, sql.LevelSerializable:
		begin += " ISOLATION LEVEL " + strings.ToUpper(level.String())
	default:
		return nil, fmt.Errorf("postgresql has no isolation level %s", level)
	}
	if o.ReadOnly {
		begin += " READ ONLY"
	}
	if _, err := c.pqConn.ExecContext(ctx, begin, nil); err != nil {
		return nil, err //nolint:wrapcheck // a driver's own
	}
	return c, nil
}

// ExecContext implements driver.ExecerContext.
func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	c.watch(ctx)
	if kept, err := c.keeps(ctx, len(args) > 0); err != nil {
		return nil, err
	} else if kept {
		return runKept(ctx, c, query, func(s keptStatement) (driver.Result, error) {
			return s.ExecContext(ctx, args)
		})
	}
	return c.pqConn.ExecContext(ctx, query, args) //nolint:wrapcheck // a driver's own
}

// QueryContext implements driver.QueryerContext.
func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	c.watch(ctx)
	if kept, err := c.keeps(ctx, len(args) > 0); err != nil {
		return nil, err
	} else if kept {
		return runKept(ctx, c, query, func(s keptStatement) (driver.Rows, error) {
			return s.QueryContext(ctx, args)
		})
	}
	return c.pqConn.QueryContext(ctx, query, args) //nolint:wrapcheck // a driver's own
}

// PrepareContext implements driver.ConnPrepareContext. What the connection keeps
// is prepared when it runs for the first time.
func (c *conn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	c.watch(ctx)
	if kept, err := c.keeps(ctx, true); err != nil {
		return nil, err
	} else if kept {
		return preparedOnce{conn: c, query: query}, nil
	}
	return c.pqConn.PrepareContext(ctx, query) //nolint:wrapcheck // a driver's own
}

// ResetSession implements driver.SessionResetter. The pool asks it before it gives
// an idle connection out.
func (c *conn) ResetSession(ctx context.Context) error {
	if speaks(c.dialed) {
		return driver.ErrBadConn
	}
	return c.pqConn.ResetSession(ctx) //nolint:wrapcheck // a driver's own
}

// IsValid implements driver.Validator. The pool asks it when the connection's
// user gives it back.
func (c *conn) IsValid() bool {
	c.unwatch()
	c.keepsEach = false
	return c.abandoned.Err() == nil && c.pqConn.IsValid()
}

// Close implements driver.Conn.
func (c *conn) Close() error {
	c.unwatch()
	defer c.abandon()
	return c.pqConn.Close() //nolint:wrapcheck // a driver's own
}

// watch has the connection closed some time after ctx ends, unless it is given
// back before. Of the contexts that come while somebody has the connection the
// first counts: that of the transaction, or of the only statement.
func (c *conn) watch(ctx context.Context) {
	if c.release != nil {
		return
	}
	released, done := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		select {
		case <-released:
		case <-time.After(cancelGrace):
			c.abandon()
		}
	})
	c.release = func() {
		close(released)
		if !stop() {
			<-done
		}
	}
}

func (c *conn) unwatch() {
	if c.release != nil {
		c.release()
		c.release = nil
	}
}
