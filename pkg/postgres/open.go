package postgres

import (
	"database/sql"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

// Defaults of Options.
const (
	// DefaultMaxOpenConns is the maximum number of connections of a pool.
	DefaultMaxOpenConns = 20
	// DefaultConnectTimeout limits the time to connect: dialing, TLS and
	// authentication.
	DefaultConnectTimeout = pqdriver.DefaultConnectTimeout
)

// DeadAfter is the approximate time until a connection notices that its server died
// without closing it.
const DeadAfter = pqdriver.DeadAfter

const (
	// maxIdleTime closes connections that the pool opened for a peak load.
	maxIdleTime = 5 * time.Minute
	// maxLifetime limits the age of a connection. The pool then finds new servers
	// behind the same host name. It also leaves a demoted server that keeps its
	// connections open.
	maxLifetime = 30 * time.Minute
)

// Options configures a pool.
type Options struct {
	// DSN is a postgres:// URL or key=value pairs, as lib/pq accepts them. The PG*
	// environment variables supply missing parameters.
	DSN string
	// PasswordFile is the path of a file with the password, or empty. The pool reads it for
	// each connection, so that a password can be replaced without a restart. It overrides
	// the password of the DSN.
	PasswordFile string
	// MaxOpenConns is the maximum number of connections. The default is
	// DefaultMaxOpenConns.
	MaxOpenConns int
	// ApplicationName appears in pg_stat_activity, unless the DSN sets
	// application_name.
	ApplicationName string
	// Session holds settings for each new connection, applied in one round trip. They
	// override ALTER DATABASE and ALTER ROLE. The pool does not send them as startup
	// parameters, because poolers refuse startup parameters. If a pooler shares the
	// session among clients, only transactions have the settings: see InSession.
	Session map[string]string
	// KeepStatements makes each connection keep its statements with parameters
	// prepared, unless it connects to a pooler. Use it only in programs with a small
	// set of constant statements.
	KeepStatements bool
	// Log receives a record if parameters of the DSN are ignored. It can be nil.
	Log *slog.Logger
}

// Open returns a pool without connecting. It returns an error if the DSN is invalid.
// The error contains no secrets of the DSN.
//
// Statements with parameters take one round trip instead of two, unless the DSN sets
// binary_parameters=no. For one round trip, a []byte must be in the binary format of
// the parameter's type. For json and text, the binary format equals the text format.
// For jsonb, it differs.
//
// The pool discards idle connections that the server has closed. Otherwise the next
// statement would fail on such a connection, and after the error the caller cannot
// tell whether the statement ran.
//
// The pool detects a dead server within about DeadAfter. If the context of a statement
// or transaction ends and the server does not reply within a second, the pool closes
// the connection.
func Open(o Options) (*sqlx.DB, error) {
	connector, err := pqdriver.NewConnector(pqdriver.Options{
		DSN:             o.DSN,
		PasswordFile:    o.PasswordFile,
		ApplicationName: o.ApplicationName,
		Setup:           setStatements(o.Session, false),
		SharedSetup:     setStatements(o.Session, true),
		KeepStatements:  o.KeepStatements,
	})
	if err != nil {
		return nil, err
	}
	if ignored := pqdriver.IgnoredParameters(o.DSN); len(ignored) > 0 && o.Log != nil {
		o.Log.Warn("parameters of the postgresql DSN ignored", "parameters", ignored)
	}

	maxOpen := o.MaxOpenConns
	if maxOpen <= 0 {
		maxOpen = DefaultMaxOpenConns
	}
	pool := sql.OpenDB(connector)
	pool.SetMaxOpenConns(maxOpen)
	pool.SetMaxIdleConns(maxOpen)
	pool.SetConnMaxIdleTime(maxIdleTime)
	pool.SetConnMaxLifetime(maxLifetime)
	return sqlx.NewDb(pool, "postgres"), nil
}

// CheckDSN returns an error if the DSN is invalid. The error contains no secrets of
// the DSN.
func CheckDSN(dsn string) error { return pqdriver.CheckDSN(dsn) }

// newSettings are settings that a supported server may not know. They are set if the
// server knows them.
var newSettings = []string{"transaction_timeout"} // since version 17

// setStatements returns statements that set the settings for the session, or for the
// transaction only.
func setStatements(settings map[string]string, transaction bool) string {
	var statements strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		value := pq.QuoteLiteral(settings[name])
		switch {
		case slices.Contains(newSettings, name):
			literal := pq.QuoteLiteral(name)
			fmt.Fprintf(&statements, "SELECT set_config(%s, %s, %t) WHERE current_setting(%s, true) IS NOT NULL;",
				literal, value, transaction, literal)
		case transaction:
			fmt.Fprintf(&statements, "SET LOCAL %s = %s;", pq.QuoteIdentifier(name), value)
		default:
			fmt.Fprintf(&statements, "SET %s = %s;", pq.QuoteIdentifier(name), value)
		}
	}
	return statements.String()
}
