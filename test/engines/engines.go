// Package engines gives a Ginkgo suite one real PostgreSQL and one real
// ClickHouse engine for all of its parallel processes, and each spec databases
// of its own, migrated.
package engines

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"sync/atomic"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// Engines are what a suite asked for. Its methods are for use in specs.
type Engines struct {
	postgres   *devstack.Postgres   // in the first process only
	clickHouse *devstack.ClickHouse // likewise
	shared     shared
	lasting    string // the DSN of the process's database, once there is one
	databases  atomic.Int32
}

// shared is what every process knows: the DSNs lead to the servers' own
// databases.
type shared struct {
	Postgres string `json:"postgres"`
	Native   string `json:"native"`
	HTTP     string `json:"http"`
	Prepared string `json:"prepared"`
}

// Schema is what both programs need in PostgreSQL.
var Schema = postgres.Schema{Sets: []postgres.Set{postgres.Outbox, postgres.Users}}

const template = "diehard_template"

// Options say what a suite needs beside PostgreSQL.
type Options struct {
	ClickHouse bool
	// Prepare is called once for the suite; Prepared returns its result in every
	// process.
	Prepare func(ctx context.Context) string
}

// Start registers the suite's nodes that start the engines, and stop them in
// the end.
func Start(o Options) *Engines {
	e := &Engines{}
	SynchronizedBeforeSuite(func(ctx SpecContext) []byte {
		var err error
		e.postgres, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{
			Settings: map[string]string{"max_connections": "300"},
		})
		Expect(err).NotTo(HaveOccurred())
		templateDSN, err := e.postgres.CreateDatabase(ctx, template)
		Expect(err).NotTo(HaveOccurred())
		db, err := postgres.Open(postgres.Options{DSN: templateDSN})
		Expect(err).NotTo(HaveOccurred())
		Expect(Schema.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
		Expect(db.Close()).To(Succeed())
		shared := shared{Postgres: e.postgres.DSN("postgres")}
		if o.Prepare != nil {
			shared.Prepared = o.Prepare(ctx)
		}
		if o.ClickHouse {
			e.clickHouse, err = devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{})
			Expect(err).NotTo(HaveOccurred())
			shared.Native, shared.HTTP = e.clickHouse.NativeDSN("default"), e.clickHouse.HTTPDSN("default")
		}
		encoded, err := json.Marshal(shared)
		Expect(err).NotTo(HaveOccurred())
		return encoded
	}, func(encoded []byte) {
		Expect(json.Unmarshal(encoded, &e.shared)).To(Succeed())
	})
	SynchronizedAfterSuite(func() {}, func() {
		if e.clickHouse != nil {
			Expect(e.clickHouse.Stop()).To(Succeed())
		}
		if e.postgres != nil {
			Expect(e.postgres.Stop()).To(Succeed())
		}
	})
	return e
}

// Prepared is what Options.Prepare has returned.
func (e *Engines) Prepared() string { return e.shared.Prepared }

func (e *Engines) newName() string {
	return fmt.Sprintf("spec_%d_%d", GinkgoParallelProcess(), e.databases.Add(1))
}

// PostgresDSN returns the DSN of a new, migrated database, which is dropped
// after the spec.
func (e *Engines) PostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	return e.postgresDatabase(ctx, template)
}

// LastingPostgresDSN returns the DSN of a migrated database that all specs of
// this process have one after the other, and empties it: making one for each
// spec takes longer than most specs.
func (e *Engines) LastingPostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	if e.lasting == "" {
		name := e.newName()
		Query(ctx, "postgres", e.shared.Postgres, "CREATE DATABASE "+name+" TEMPLATE "+template)
		e.lasting = withDatabase(e.shared.Postgres, name)
	}
	Query(ctx, "postgres", e.lasting, "TRUNCATE users, outbox_events, outbox_batches, outbox_dead_letters, idempotency_keys")
	return e.lasting
}

// EmptyPostgresDSN is PostgresDSN without the migrations.
func (e *Engines) EmptyPostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	return e.postgresDatabase(ctx, "template1")
}

func (e *Engines) postgresDatabase(ctx context.Context, template string) string {
	GinkgoHelper()
	name := e.newName()
	Query(ctx, "postgres", e.shared.Postgres, "CREATE DATABASE "+name+" TEMPLATE "+template)
	DeferCleanup(func(ctx SpecContext) {
		Query(ctx, "postgres", e.shared.Postgres, "DROP DATABASE "+name+" WITH (FORCE)")
	})
	return withDatabase(e.shared.Postgres, name)
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

func withDatabase(dsn, name string) string {
	GinkgoHelper()
	parsed, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	parsed.Path = "/" + name
	return parsed.String()
}
