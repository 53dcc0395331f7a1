package pqdriver

import (
	"context"
	"net"
	"time"
)

// DeadAfter is about how long it takes to notice that a server has gone
// without closing its connections, whether an answer or a sent byte's
// acknowledgement is waited for. The kernel's own default is two hours.
const DeadAfter = 15 * time.Second

// dialer is pq's Dialer and DialerContext.
type dialer struct {
	// abort, where given, closes the connections when it is canceled, whatever
	// is being waited for on them.
	abort context.Context //nolint:containedctx // pq.Listener takes a dialer and no context
	// dialed, where given, gets each connection that is made and that abort closes.
	dialed func(*abortableConn)
}

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
	if d.abort != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(d.abort, cancel)() //nolint:contextcheck // either context ends the dialing
	}
	dialer := net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{
			Enable:   true,
			Idle:     DeadAfter / 3,
			Interval: DeadAfter / 3,
			Count:    2,
		},
		Control: setUserTimeout,
	}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil || d.abort == nil {
		return conn, err //nolint:wrapcheck // lib/pq says what it was doing
	}
	abortable := &abortableConn{Conn: conn, keep: context.AfterFunc(d.abort, func() { _ = conn.Close() })} //nolint:contextcheck // outlives the dialing
	if d.dialed != nil {
		d.dialed(abortable)
	}
	return abortable, nil
}

type abortableConn struct {
	net.Conn

	keep func() bool
	// unwritten is the error of the last write, or nil.
	unwritten error
}

// Write implements net.Conn.
func (c *abortableConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.unwritten = err
	return n, err //nolint:wrapcheck // a net.Conn's own
}

// Close implements net.Conn.
func (c *abortableConn) Close() error {
	c.keep()
	return c.Conn.Close() //nolint:wrapcheck // a net.Conn's own
}
