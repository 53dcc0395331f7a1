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

// Options configures a connector.
type Options struct {
	// DSN is a postgres:// URL or key=value pairs, as lib/pq accepts them. The PG*
	// environment variables supply missing parameters.
	DSN string
	// PasswordFile is the path of a file with the password. It is read for each connection.
	// If it is empty, the DSN has the password.
	PasswordFile string
	// ApplicationName appears in pg_stat_activity, unless the DSN sets
	// application_name.
	ApplicationName string
	// Setup is SQL that each new connection with its own session executes in one round
	// trip: any number of statements without parameters.
	Setup string
	// SharedSetup is SQL that runs at the start of each transaction, in the same round
	// trip as BEGIN, if a pooler shares the session among clients.
	SharedSetup string
	// KeepStatements makes each connection keep its statements with parameters
	// prepared, unless it connects to a pooler.
	KeepStatements bool
}

// DefaultConnectTimeout limits the time to connect: dialing, TLS and authentication.
// The DSN can override it.
const DefaultConnectTimeout = 10 * time.Second

// NewConnector returns a connector for database/sql. It returns an error if the DSN is
// invalid. The error contains no secrets of the DSN.
func NewConnector(o Options) (driver.Connector, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	base, err := pq.NewConnector(dsn)
	if err != nil {
		return nil, dsnError(err)
	}
	return &connector{
		dsn: dsn, passwordFile: o.PasswordFile, base: base,
		setup: o.Setup, sharedSetup: o.SharedSetup, keepsAll: o.KeepStatements,
	}, nil
}

// connector is lib/pq's connector with the workarounds of this package.
type connector struct {
	dsn, passwordFile  string
	base               *pq.Connector // without the password of the file
	setup, sharedSetup string
	keepsAll           bool
}

// Connect implements driver.Connector. It returns when ctx ends, although lib/pq
// ignores ctx after dialing: https://github.com/lib/pq/blob/v1.12.3/conn.go#L246.
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
	// lib/pq dials several times if the DSN names several hosts. It also dials to cancel a
	// statement.
	var (
		last   atomic.Pointer[writeRecorder]
		pooled atomic.Bool
	)
	base := *c.base
	if c.passwordFile != "" {
		dsn, err := withPassword(c.dsn, c.passwordFile)
		if err != nil {
			return nil, err
		}
		withOwn, err := pq.NewConnector(dsn)
		if err != nil {
			return nil, dsnError(err)
		}
		base = *withOwn
	}
	base.Dialer(dialer{abort: w.alive, pooled: &pooled, dialed: func(socket net.Conn) net.Conn {
		recorder := &writeRecorder{Conn: socket}
		last.Store(recorder)
		return recorder
	}})
	connected, err := base.Connect(ctx)
	if err != nil {
		return nil, last.Load().explain(err)
	}
	made := connected.(pqConn) //nolint:forcetypeassert // the type of all lib/pq connections
	conn := &conn{
		pqConn:      made,
		socket:      last.Load().Conn,
		watchdog:    w,
		session:     session{conn: made},
		sharedSetup: c.sharedSetup,
	}
	conn.statements = statements{conn: made, session: &conn.session, keepsAll: c.keepsAll}
	if c.setup == "" {
		return conn, nil
	}
	// If ctx ends, Connect closes the socket. A cancel request could bring a pooler down.
	own, err := conn.session.isOwn(context.WithoutCancel(ctx))
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("set up the session: %w", err)
	}
	if !own { // the settings would become those of another client
		pooled.Store(true)
		return conn, nil
	}
	// Without parameters lib/pq sends a simple query, which can contain several
	// statements.
	if _, err := made.ExecContext(ctx, c.setup, nil); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("set up the session: %w", err)
	}
	return conn, nil
}

// Driver implements driver.Connector.
func (c *connector) Driver() driver.Driver { return c.base.Driver() }
