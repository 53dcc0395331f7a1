package pqdriver

import (
	"context"
	"database/sql/driver"
	"net"
)

// Dial dials the socket of a connection.
func Dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := dialer{abort: ctx}.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return conn.(*abortableConn).Conn, nil
}

// BackendPID returns the process id that the server sent to a connection of this package.
func BackendPID(c driver.Conn) (int64, bool) {
	return backendPID(c.(*conn).pqConn)
}
