package postgres

import (
	"database/sql"
	"fmt"
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
	// DefaultMaxOpenConns bounds a pool.
	DefaultMaxOpenConns = 20
	// DefaultConnectTimeout bounds the making of a connection: dialing, TLS and
	// authentication.
	DefaultConnectTimeout = pqdriver.DefaultConnectTimeout
)

// DeadAfter is about how long it takes to notice a server that has gone without closing
// its connections.
const DeadAfter = pqdriver.DeadAfter

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
	connector, err := pqdriver.NewConnector(pqdriver.Options{
		DSN:             o.DSN,
		ApplicationName: o.ApplicationName,
		Setup:           setStatements(o.Session),
		KeepStatements:  o.KeepStatements,
	})
	if err != nil {
		return nil, err
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

// CheckDSN returns an error if a pool cannot be opened with the DSN. Its text
// holds no part of the DSN that could be a secret.
func CheckDSN(dsn string) error { return pqdriver.CheckDSN(dsn) }

func setStatements(settings map[string]string) string {
	var statements strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&statements, "SET %s = %s;", pq.QuoteIdentifier(name), pq.QuoteLiteral(settings[name]))
	}
	return statements.String()
}
