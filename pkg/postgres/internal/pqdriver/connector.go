package pqdriver

import (
	"context"
	"database/sql/driver"
	"fmt"
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

// connector gives each connection the settings of its session.
type connector struct {
	base     *pq.Connector
	setup    string
	keepsAll bool
}

// Connect implements driver.Connector.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	abandoned, abandon := context.WithCancel(context.WithoutCancel(ctx))
	// Nothing of the making outlasts ctx; lib/pq heeds it while dialing only.
	made := context.AfterFunc(ctx, abandon)
	conn, err := c.connect(ctx, abandoned, abandon)
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

func (c *connector) connect(ctx, abandoned context.Context, abandon func()) (*conn, error) {
	base := *c.base
	var dialed *abortableConn // the last, where the DSN allows two ways
	base.Dialer(dialer{abort: abandoned, dialed: func(conn *abortableConn) { dialed = conn }})
	connected, err := base.Connect(ctx)
	if err != nil {
		if dialed != nil && dialed.unwritten != nil {
			err = unwrappingError{error: err, cause: dialed.unwritten}
		}
		return nil, err
	}
	made := connected.(pqConn) //nolint:forcetypeassert // what lib/pq's connections are
	conn := &conn{
		pqConn:     made,
		socket:     dialed.Conn,
		watchdog:   watchdog{socket: abandoned, abandon: abandon},
		statements: statements{conn: made, keepsAll: c.keepsAll},
	}
	if c.setup == "" {
		return conn, nil
	}
	// lib/pq sends a statement without parameters as a simple query, which may
	// hold several.
	if _, err := conn.pqConn.ExecContext(ctx, c.setup, nil); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("set up the session: %w", err)
	}
	return conn, nil
}

// unwrappingError says what lib/pq says, of all hosts, and unwraps to the cause
// too, which lib/pq's does not where a write has failed.
type unwrappingError struct {
	error

	cause error
}

func (e unwrappingError) Unwrap() []error { return []error{e.error, e.cause} }

// Driver implements driver.Connector.
func (c *connector) Driver() driver.Driver { return c.base.Driver() }
