package postgres

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
)

// Defaults of Options.
const (
	// DefaultMaxOpenConns bounds a pool.
	DefaultMaxOpenConns = 20
	// DefaultConnectTimeout bounds the making of a connection: dialing, TLS and
	// authentication.
	DefaultConnectTimeout = 10 * time.Second
)

const (
	// maxIdleTime gives back what a peak has opened.
	maxIdleTime = 5 * time.Minute
	// maxLifetime lets a pool find servers that were added behind one name, and
	// leave one that was demoted without closing its connections.
	maxLifetime = 30 * time.Minute
)

// Options configure a pool.
type Options struct {
	// DSN is a postgres:// URL or key=value pairs, as lib/pq takes them. What it
	// leaves out comes from the PG* environment variables.
	DSN string
	// MaxOpenConns bounds the connections; DefaultMaxOpenConns by default.
	MaxOpenConns int
	// ApplicationName is what the server's pg_stat_activity shows, unless the
	// DSN names another.
	ApplicationName string
	// Session are settings that each new connection gets, in one round trip.
	// They are no startup parameters, since poolers refuse those.
	Session map[string]string
	// KeepStatements has each connection keep prepared what it runs with parameters,
	// each text once, unless it leads to a pooler. It is for a program whose
	// statements are a few constants.
	KeepStatements bool
}

// Open returns a pool. It does not connect: the only error is a DSN that cannot
// be used, and its text holds no part of the DSN that could be a secret.
//
// Statements with parameters take one round trip and not two
// (binary_parameters), unless the DSN says otherwise; a []byte is then sent in
// its type's binary format, which is the same as text for json and text, but
// not for jsonb.
//
// An idle connection that the server has ended is not given out: whoever uses one
// that was good when it was taken does not know of a failure what it has done.
//
// A server that is gone without a word is noticed within about DeadAfter. Where
// the context of a statement or a transaction ends and the server does not
// answer, the connection is given up a second later.
func Open(o Options) (*sqlx.DB, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	base, err := pq.NewConnector(dsn)
	if err != nil {
		return nil, dsnError(err)
	}

	maxOpen := o.MaxOpenConns
	if maxOpen <= 0 {
		maxOpen = DefaultMaxOpenConns
	}
	pool := sql.OpenDB(&connector{base: base, setup: setStatements(o.Session), keepsAll: o.KeepStatements})
	pool.SetMaxOpenConns(maxOpen)
	pool.SetMaxIdleConns(maxOpen)
	pool.SetConnMaxIdleTime(maxIdleTime)
	pool.SetConnMaxLifetime(maxLifetime)
	return sqlx.NewDb(pool, "postgres"), nil
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
	made, err := base.Connect(ctx)
	if err != nil {
		if dialed != nil && dialed.unwritten != nil {
			err = unwrappingError{error: err, cause: dialed.unwritten}
		}
		return nil, err
	}
	conn := &conn{pqConn: made.(pqConn), dialed: dialed.Conn, abandoned: abandoned, abandon: abandon, keepsAll: c.keepsAll} //nolint:forcetypeassert // what lib/pq's connections are
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

func setStatements(settings map[string]string) string {
	var statements strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&statements, "SET %s = %s;", pq.QuoteIdentifier(name), pq.QuoteLiteral(settings[name]))
	}
	return statements.String()
}
