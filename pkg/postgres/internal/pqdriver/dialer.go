package pqdriver

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"
)

// dialer dials for lib/pq and closes its sockets when a context ends. lib/pq itself waits
// without a limit in three cases: statements (handled in watchdog.go), the time after
// dialing (connector.go), and listeners, which accept no context
// (https://github.com/lib/pq/issues/1409). dialer implements pq.Dialer and
// pq.DialerContext.
type dialer struct {
	// abort stops dialing and closes the sockets when it ends.
	abort context.Context //nolint:containedctx // lib/pq passes no context
	// dialed is called with each socket and returns its replacement. It can be nil.
	dialed func(socket net.Conn) net.Conn
	// pooled says that the connection leads to a pooler. The dialer then does not dial, so
	// that lib/pq sends no cancel request: PgBouncer 1.18 can crash because of one
	// (https://github.com/pgbouncer/pgbouncer/issues/801). It can be nil.
	pooled *atomic.Bool
}

var errPooled = errors.New("no cancel requests through a pooler")

// Dial implements pq.Dialer.
func (d dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

// DialTimeout implements pq.Dialer.
func (d dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return d.DialContext(ctx, network, address)
}

// DialContext implements pq.DialerContext.
func (d dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if d.pooled != nil && d.pooled.Load() {
		return nil, errPooled
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.abort, cancel)()
	socket, err := keptAlive.DialContext(ctx, network, address)
	if err != nil {
		return nil, err //nolint:wrapcheck // lib/pq wraps it
	}
	conn := socket
	if d.dialed != nil {
		conn = d.dialed(socket)
	}
	return &abortableConn{Conn: conn, keep: context.AfterFunc(d.abort, func() { _ = socket.Close() })}, nil
}

// abortableConn is a socket that is closed when the dialer's abort ends.
type abortableConn struct {
	net.Conn

	keep func() bool // stops watching abort
}

// Close implements net.Conn.
func (c *abortableConn) Close() error {
	c.keep()
	return c.Conn.Close() //nolint:wrapcheck // a net.Conn returns plain errors
}
