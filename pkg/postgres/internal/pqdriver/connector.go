package pqdriver

import (
	"context"
	"database/sql/driver"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// Options configure a connector.
type Options struct {
	// DSN is a postgres:// URL or key=value pairs, as lib/pq takes them. What it
	// leaves out comes from the PG* environment variables.
	DSN string
	// ApplicationName is what the server's pg_stat_activity shows, unless the DSN
	// names another.
	ApplicationName string
	// Setup is SQL that each new connection runs, in one round trip: any number of
	// statements without parameters.
	Setup string
	// KeepStatements makes each connection keep the statements that it runs with
	// parameters prepared, each text once, unless it leads to a pooler.
	KeepStatements bool
}

// DefaultConnectTimeout bounds the making of a connection, dialing, TLS and
// authentication, unless the DSN says otherwise.
const DefaultConnectTimeout = 10 * time.Second

// NewConnector returns a connector for database/sql's pool. The only error is a DSN
// that cannot be used. Its text holds no part of the DSN that could be a secret.
func NewConnector(o Options) (driver.Connector, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	base, err := pq.NewConnector(dsn)
	if err != nil {
		return nil, dsnError(err)
	}
	return &connector{base: base, setup: o.Setup, keepsAll: o.KeepStatements}, nil
}

// connector is lib/pq's connector with the workarounds of this package.
type connector struct {
	base     *pq.Connector
	setup    string
	keepsAll bool
}

// Connect implements driver.Connector. It ends when ctx ends. lib/pq ignores ctx after
// it has dialed: https://github.com/lib/pq/blob/v1.12.3/conn.go#L246.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	alive, abandon := context.WithCancel(context.WithoutCancel(ctx))
	made := context.AfterFunc(ctx, abandon)
	conn, err := c.connect(ctx, watchdog{alive: alive, abandon: abandon})
	if inTime := made(); err == nil && !inTime {
		_ = conn.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		abandon()
		return nil, fmt.Errorf("connect to postgresql: %w", err)
	}
	return conn, nil
}

func (c *connector) connect(ctx context.Context, w watchdog) (*conn, error) {
	// lib/pq dials more than once if the DSN names several hosts, and later to cancel a
	// statement.
	var last atomic.Pointer[writeRecorder]
	base := *c.base
	base.Dialer(dialer{abort: w.alive, dialed: func(socket net.Conn) net.Conn {
		recorder := &writeRecorder{Conn: socket}
		last.Store(recorder)
		return recorder
	}})
	connected, err := base.Connect(ctx)
	if err != nil {
		return nil, last.Load().explain(err)
	}
	made := connected.(pqConn) //nolint:forcetypeassert // what lib/pq's connections are
	conn := &conn{
		pqConn:     made,
		socket:     last.Load().Conn,
		watchdog:   w,
		statements: statements{conn: made, keepsAll: c.keepsAll},
	}
	if c.setup == "" {
		return conn, nil
	}
	// A statement without parameters is a simple query, which may hold several.
	if _, err := made.ExecContext(ctx, c.setup, nil); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("set up the session: %w", err)
	}
	return conn, nil
}

// Driver implements driver.Connector.
func (c *connector) Driver() driver.Driver { return c.base.Driver() }
