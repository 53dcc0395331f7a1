package pqdriver

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
)

// session tells whether a connection has its own session. A pooler in transaction mode
// executes SET on one of its sessions, and the next transaction on another.
type session struct {
	conn       pqConn
	known, own bool
}

// IsShared returns whether a pooler may share the session of the connection among clients.
func IsShared(ctx context.Context, connection *sql.Conn) (shared bool, err error) {
	err = connection.Raw(func(driverConn any) error {
		c, ok := driverConn.(*conn)
		if !ok || c.sharedSetup == "" {
			return nil
		}
		own, err := c.session.isOwn(ctx)
		shared = !own
		return err
	})
	return shared, err //nolint:wrapcheck // the caller wraps it
}

// isOwn reports whether the connection has its own session. A pooler that shares sessions
// sends its clients a random process id: https://github.com/pgbouncer/pgbouncer/pull/945.
func (s *session) isOwn(ctx context.Context) (bool, error) {
	if s.known {
		return s.own, nil
	}
	rows, err := s.conn.QueryContext(ctx, "SELECT pg_backend_pid()", nil)
	if err != nil {
		return false, err //nolint:wrapcheck // drivers return plain errors
	}
	defer rows.Close()
	pid := make([]driver.Value, 1)
	if err := rows.Next(pid); err != nil {
		return false, fmt.Errorf("read the process id of the session: %w", err)
	}
	sent, ok := backendPID(s.conn)
	s.known, s.own = true, ok && pid[0] == sent
	return s.own, nil
}
