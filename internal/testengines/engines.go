// Package testengines provides a Ginkgo suite with one real PostgreSQL and one
// real ClickHouse for all its parallel processes. Each spec gets its own
// migrated databases.
//
// DIEHARD_TEST_POSTGRES_DSN and DIEHARD_TEST_CLICKHOUSE_DSN name the servers.
// Without them the devstack program runs engines for the suite.
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
	// PostgresEnv names the variable with the DSN of a server for the suites. Its user
	// must be a superuser, or must have the right to create databases and roles.
	PostgresEnv = "DIEHARD_TEST_POSTGRES_DSN"
	// ClickHouseEnv names the variable with the DSN of a server for the suites,
	// or with one DSN for each protocol, separated by a space.
	ClickHouseEnv = "DIEHARD_TEST_CLICKHOUSE_DSN"
)

// Engines holds a suite's servers. Its methods are for use in specs.
type Engines struct {
	servers   []*process // only in the first process, and only if it started them
	shared    shared
	lasting   string // name of the process's reused database, or ""
	databases atomic.Int32
}

// shared holds the values that every process knows. The DSNs lead to the servers' own
// databases.
type shared struct {
	Prefix   string `json:"prefix"` // of database names, unique because a server may be shared
	Postgres string `json:"postgres"`
	Native   string `json:"native"`
	HTTP     string `json:"http"`
	Prepared string `json:"prepared"`
}

// Schema is the PostgreSQL schema that both programs need.
var Schema = postgres.Schema{Sets: []postgres.Set{postgres.Outbox, postgres.Users}}

// Options configures a suite's servers.
type Options struct {
	// Postgres and ClickHouse request a server of this kind.
	Postgres, ClickHouse bool
	// Prepare is called once for the suite. Prepared returns its result in each
	// process.
	Prepare func(ctx context.Context) string
}

// Start registers the suite's nodes that start and stop the engines.
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
		sayOnce(ClickHouseEnv + " has no DSN for the native protocol: specs use HTTP instead")
	case e.shared.Native != "":
		e.shared.HTTP = e.shared.Native
		sayOnce(ClickHouseEnv + " has no DSN for HTTP: specs use the native protocol instead")
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

// Prepared returns the result of Options.Prepare.
func (e *Engines) Prepared() string { return e.shared.Prepared }

// template returns the name of the migrated database that is copied for specs.
func (e *Engines) template() string { return e.shared.Prefix + "_template" }

func (e *Engines) newName() string {
	return fmt.Sprintf("%s_%d_%d", e.shared.Prefix, GinkgoParallelProcess(), e.databases.Add(1))
}

// PostgresDSN returns the DSN of a new, migrated database, which is dropped
// after the spec.
func (e *Engines) PostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	return e.postgresDatabase(ctx, e.template())
}

// LastingPostgresDSN empties and returns the DSN of a migrated database that
// all specs of this process share one after the other. Creating a database for
// each spec takes longer than most specs.
func (e *Engines) LastingPostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	if e.lasting == "" {
		name := e.newName()
		Query(ctx, "postgres", e.shared.Postgres, "CREATE DATABASE "+name+" TEMPLATE "+e.template())
		e.lasting = name
		adopt(ctx, withDatabase(e.shared.Postgres, name))
	}
	dsn := withDatabase(e.shared.Postgres, e.lasting)
	Query(ctx, "postgres", dsn, "TRUNCATE users, outbox_events, outbox_batches, outbox_dead_letters, idempotency_keys")
	return dsn
}

// EmptyPostgresDSN is like PostgresDSN, but does not migrate the database.
func (e *Engines) EmptyPostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	return e.postgresDatabase(ctx, "template1")
}

// ServerPostgresDSN returns the DSN of the server's own database, which no spec
// changes.
func (e *Engines) ServerPostgresDSN() string { return e.shared.Postgres }

// ServerClickHouseDSNs returns the DSNs of the server's default database.
func (e *Engines) ServerClickHouseDSNs() (native, http string) { return e.shared.Native, e.shared.HTTP }

func (e *Engines) postgresDatabase(ctx context.Context, template string) string {
	GinkgoHelper()
	name := e.newName()
	Query(ctx, "postgres", e.shared.Postgres, "CREATE DATABASE "+name+" TEMPLATE "+template)
	DeferCleanup(func(ctx SpecContext) { e.dropPostgres(ctx, name) })
	dsn := withDatabase(e.shared.Postgres, name)
	if template == e.template() {
		adopt(ctx, dsn)
	}
	return dsn
}

// adopt makes a copy of the template an outbox of its own. Otherwise the relay notices that
// the outbox was copied.
func adopt(ctx context.Context, dsn string) {
	GinkgoHelper()
	Query(ctx, "postgres", dsn, `UPDATE outbox_history SET recorded_by = pg_current_xact_id()::xid,
		database_oid = (SELECT oid FROM pg_database WHERE datname = current_database())`)
}

func (e *Engines) dropPostgres(ctx context.Context, name string) {
	GinkgoHelper()
	Query(ctx, "postgres", e.shared.Postgres, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
}

// OpenPostgres opens dsn with the given session settings and closes it after
// the spec.
func OpenPostgres(dsn string, session map[string]string) *sqlx.DB {
	GinkgoHelper()
	return open(postgres.Options{DSN: dsn, Session: session})
}

// OpenStore opens dsn with prepared statements, as the relay does, and closes
// it after the spec.
func OpenStore(dsn string, session map[string]string) *sqlx.DB {
	GinkgoHelper()
	return open(postgres.Options{DSN: dsn, Session: session, KeepStatements: true})
}

func open(o postgres.Options) *sqlx.DB {
	GinkgoHelper()
	db, err := postgres.Open(o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { _ = db.Close() }) // the server may have stopped
	return db
}

// ClickHouseDSNs holds the DSNs of one database over both protocols.
type ClickHouseDSNs struct {
	Native, HTTP string
}

// ClickHouseDSNs returns the DSNs of a new, migrated database. Its merges are
// stopped, because they would hide duplicates.
func (e *Engines) ClickHouseDSNs(ctx context.Context) ClickHouseDSNs {
	GinkgoHelper()
	created := e.EmptyClickHouseDSNs(ctx)
	Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: created.Native}, slog.New(slog.DiscardHandler))).To(Succeed())
	Query(ctx, "clickhouse", created.HTTP, "SYSTEM STOP MERGES event_log")
	return created
}

// EmptyClickHouseDSNs is like ClickHouseDSNs, but does not migrate the
// database.
func (e *Engines) EmptyClickHouseDSNs(ctx context.Context) ClickHouseDSNs {
	GinkgoHelper()
	name := e.newName()
	Query(ctx, "clickhouse", e.shared.HTTP, "CREATE DATABASE "+name)
	DeferCleanup(func(ctx SpecContext) { Query(ctx, "clickhouse", e.shared.HTTP, "DROP DATABASE "+name) })
	return ClickHouseDSNs{Native: withDatabase(e.shared.Native, name), HTTP: withDatabase(e.shared.HTTP, name)}
}

// Query runs a statement on the server of dsn. The driver is postgres or
// clickhouse.
func Query(ctx context.Context, driver, dsn, statement string) {
	GinkgoHelper()
	db, err := sql.Open(driver, dsn)
	Expect(err).NotTo(HaveOccurred())
	defer func() { Expect(db.Close()).To(Succeed()) }()
	_, err = db.ExecContext(ctx, statement)
	Expect(err).NotTo(HaveOccurred())
}

// Scan runs a ClickHouse query and scans its only row into dest.
func Scan(ctx context.Context, dsn, query string, dest ...any) error {
	db, err := sql.Open("clickhouse", dsn)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.QueryRowContext(ctx, query).Scan(dest...)
}

func withDatabase(dsn, name string) string {
	GinkgoHelper()
	parsed, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	parsed.Path = "/" + name
	return parsed.String()
}
