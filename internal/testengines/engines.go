// Package testengines gives a Ginkgo suite one real PostgreSQL and one real ClickHouse
// for all of its parallel processes, and each spec databases of its own, migrated.
//
// The servers are those that DIEHARD_TEST_POSTGRES_DSN and DIEHARD_TEST_CLICKHOUSE_DSN
// name, or else engines that the devstack program runs for the suite.
package testengines

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

const (
	// PostgresEnv names a server for the suites, by the DSN of a database of it. Its
	// user has to be a superuser, or the owner of databases and roles.
	PostgresEnv = "DIEHARD_TEST_POSTGRES_DSN"
	// ClickHouseEnv names a server for the suites: one DSN, or one for each protocol
	// with a space between them.
	ClickHouseEnv = "DIEHARD_TEST_CLICKHOUSE_DSN"
)

// Engines are the servers that a suite asked for. Its methods are for use in specs.
type Engines struct {
	servers   []*process // in the first process only, and only if it has started them
	shared    shared
	lasting   string // the DSN of the process's database, once there is one
	databases atomic.Int32
}

// shared is what every process knows. The DSNs lead to the servers' own databases.
type shared struct {
	Prefix   string `json:"prefix"` // of the names of databases, which others may have, too
	Postgres string `json:"postgres"`
	Native   string `json:"native"`
	HTTP     string `json:"http"`
	Prepared string `json:"prepared"`
}

// Schema is what both programs need in PostgreSQL.
var Schema = postgres.Schema{Sets: []postgres.Set{postgres.Outbox, postgres.Users}}

// Options say what a suite needs.
type Options struct {
	// Postgres and ClickHouse start a server.
	Postgres, ClickHouse bool
	// Prepare is called once for the suite. Prepared returns its result in every
	// process.
	Prepare func(ctx context.Context) string
}

// Start registers the suite's nodes that start the engines, and stop them in the end.
func Start(o Options) *Engines {
	e := &Engines{}
	SynchronizedBeforeSuite(func(ctx SpecContext) []byte {
		e.shared.Prefix = "spec_" + strings.ToLower(rand.Text()[:8])
		if o.Prepare != nil {
			e.shared.Prepared = o.Prepare(ctx)
		}
		if o.Postgres {
			e.startPostgres(ctx)
		}
		if o.ClickHouse {
			e.startClickHouse(ctx)
		}
		encoded, err := json.Marshal(e.shared)
		Expect(err).NotTo(HaveOccurred())
		return encoded
	}, func(encoded []byte) {
		Expect(json.Unmarshal(encoded, &e.shared)).To(Succeed())
	})
	SynchronizedAfterSuite(func(ctx SpecContext) {
		if e.lasting != "" {
			e.dropPostgres(ctx, e.lasting)
		}
	}, func(ctx SpecContext) {
		if o.Postgres && e.shared.Postgres != "" {
			e.dropPostgres(ctx, e.template())
		}
		for _, server := range e.servers {
			Expect(server.end(syscall.SIGTERM)).To(Succeed())
		}
	})
	return e
}

func (e *Engines) startPostgres(ctx context.Context) {
	GinkgoHelper()
	e.shared.Postgres = os.Getenv(PostgresEnv)
	if e.shared.Postgres == "" {
		server := newPostgres(map[string]string{"max_connections": "300"})
		Expect(server.start(ctx)).To(Succeed())
		e.servers = append(e.servers, server)
		e.shared.Postgres = server.addresses["dsn"]
	}
	Query(ctx, "postgres", e.shared.Postgres, "CREATE DATABASE "+e.template())
	db, err := postgres.Open(postgres.Options{DSN: withDatabase(e.shared.Postgres, e.template())})
	Expect(err).NotTo(HaveOccurred())
	Expect(Schema.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
	Expect(db.Close()).To(Succeed())
}

func (e *Engines) startClickHouse(ctx context.Context) {
	GinkgoHelper()
	for dsn := range strings.FieldsSeq(os.Getenv(ClickHouseEnv)) {
		if strings.HasPrefix(dsn, "http") {
			e.shared.HTTP = dsn
		} else {
			e.shared.Native = dsn
		}
	}
	switch {
	case e.shared.HTTP != "" && e.shared.Native != "":
	case e.shared.HTTP != "":
		e.shared.Native = e.shared.HTTP
		sayOnce(ClickHouseEnv + " names no address of the native protocol: its specs use HTTP")
	case e.shared.Native != "":
		e.shared.HTTP = e.shared.Native
		sayOnce(ClickHouseEnv + " names no address of the HTTP interface: its specs use the native protocol")
	default:
		server := &process{
			args: []string{"clickhouse", "--user", "diehard"},
			env:  []string{"DIEHARD_DEVSTACK_CLICKHOUSE_PASSWORD=s3cret"},
		}
		Expect(server.start(ctx)).To(Succeed())
		e.servers = append(e.servers, server)
		e.shared.Native, e.shared.HTTP = server.addresses["native_dsn"], server.addresses["http_dsn"]
	}
}

func sayOnce(line string) { fmt.Fprintln(os.Stderr, line) }

// Prepared is what Options.Prepare has returned.
func (e *Engines) Prepared() string { return e.shared.Prepared }

// template is the migrated database that the others are copies of.
func (e *Engines) template() string { return e.shared.Prefix + "_template" }

func (e *Engines) newName() string {
	return fmt.Sprintf("%s_%d_%d", e.shared.Prefix, GinkgoParallelProcess(), e.databases.Add(1))
}

// PostgresDSN returns the DSN of a new, migrated database, which is dropped after the
// spec.
func (e *Engines) PostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	return e.postgresDatabase(ctx, e.template())
}

// LastingPostgresDSN returns the DSN of a migrated database that all specs of this
// process have one after the other, and empties it: making one for each spec takes
// longer than most specs.
func (e *Engines) LastingPostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	if e.lasting == "" {
		name := e.newName()
		Query(ctx, "postgres", e.shared.Postgres, "CREATE DATABASE "+name+" TEMPLATE "+e.template())
		e.lasting = name
	}
	dsn := withDatabase(e.shared.Postgres, e.lasting)
	Query(ctx, "postgres", dsn, "TRUNCATE users, outbox_events, outbox_batches, outbox_dead_letters, idempotency_keys")
	return dsn
}

// EmptyPostgresDSN is PostgresDSN without the migrations.
func (e *Engines) EmptyPostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	return e.postgresDatabase(ctx, "template1")
}

// ServerPostgresDSN returns the DSN of a database of the server that no spec changes.
func (e *Engines) ServerPostgresDSN() string { return e.shared.Postgres }

// ServerClickHouseDSNs returns the DSNs of the server's default database.
func (e *Engines) ServerClickHouseDSNs() (native, http string) { return e.shared.Native, e.shared.HTTP }

func (e *Engines) postgresDatabase(ctx context.Context, template string) string {
	GinkgoHelper()
	name := e.newName()
	Query(ctx, "postgres", e.shared.Postgres, "CREATE DATABASE "+name+" TEMPLATE "+template)
	DeferCleanup(func(ctx SpecContext) { e.dropPostgres(ctx, name) })
	return withDatabase(e.shared.Postgres, name)
}

func (e *Engines) dropPostgres(ctx context.Context, name string) {
	GinkgoHelper()
	Query(ctx, "postgres", e.shared.Postgres, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
}

// OpenPostgres opens dsn, with the given session settings, for as long as the
// spec runs.
func OpenPostgres(dsn string, session map[string]string) *sqlx.DB {
	GinkgoHelper()
	return open(postgres.Options{DSN: dsn, Session: session})
}

// OpenStore opens dsn as the relay does, which keeps its statements prepared, for
// as long as the spec runs.
func OpenStore(dsn string, session map[string]string) *sqlx.DB {
	GinkgoHelper()
	return open(postgres.Options{DSN: dsn, Session: session, KeepStatements: true})
}

func open(o postgres.Options) *sqlx.DB {
	GinkgoHelper()
	db, err := postgres.Open(o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { _ = db.Close() }) // the server may be gone
	return db
}

// ClickHouseDSNs leads to one database over each protocol.
type ClickHouseDSNs struct {
	Native, HTTP string
}

// ClickHouseDSNs returns the DSNs of a new, migrated database whose merges are
// stopped: they would hide an event that is there twice.
func (e *Engines) ClickHouseDSNs(ctx context.Context) ClickHouseDSNs {
	GinkgoHelper()
	created := e.EmptyClickHouseDSNs(ctx)
	Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: created.Native}, slog.New(slog.DiscardHandler))).To(Succeed())
	Query(ctx, "clickhouse", created.HTTP, "SYSTEM STOP MERGES event_log")
	return created
}

// EmptyClickHouseDSNs is ClickHouseDSNs without the migrations.
func (e *Engines) EmptyClickHouseDSNs(ctx context.Context) ClickHouseDSNs {
	GinkgoHelper()
	name := e.newName()
	Query(ctx, "clickhouse", e.shared.HTTP, "CREATE DATABASE "+name)
	DeferCleanup(func(ctx SpecContext) { Query(ctx, "clickhouse", e.shared.HTTP, "DROP DATABASE "+name) })
	return ClickHouseDSNs{Native: withDatabase(e.shared.Native, name), HTTP: withDatabase(e.shared.HTTP, name)}
}

// Query runs a statement on a server that driver, postgres or clickhouse,
// leads to.
func Query(ctx context.Context, driver, dsn, statement string) {
	GinkgoHelper()
	db, err := sql.Open(driver, dsn)
	Expect(err).NotTo(HaveOccurred())
	defer func() { Expect(db.Close()).To(Succeed()) }()
	_, err = db.ExecContext(ctx, statement)
	Expect(err).NotTo(HaveOccurred())
}

// Scan runs a ClickHouse query that returns one row, into dest.
func Scan(ctx context.Context, dsn, query string, dest ...any) error {
	db, err := sql.Open("clickhouse", dsn)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.QueryRowContext(ctx, query).Scan(dest...)
}

// portOf returns the port of a DSN.
func portOf(dsn string) string {
	GinkgoHelper()
	parsed, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	return parsed.Port()
}

func withDatabase(dsn, name string) string {
	GinkgoHelper()
	parsed, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	parsed.Path = "/" + name
	return parsed.String()
}
