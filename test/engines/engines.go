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
	. "github.com/onsi/ginkgo/v2" //nolint:revive,staticcheck // the suites' language
	. "github.com/onsi/gomega"    //nolint:revive,staticcheck // the suites' language

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// Engines are what a suite asked for. Its methods are for use in specs.
type Engines struct {
	postgres   *devstack.Postgres   // in the first process only
	clickHouse *devstack.ClickHouse // likewise
	dsns       dsns
	databases  atomic.Int32
}

// dsns lead to the servers' own databases, from every process.
type dsns struct {
	Postgres, Native, HTTP string
}

const template = "diehard_template"

// Start registers the suite's nodes that start PostgreSQL, and ClickHouse if
// the suite needs it, and stop them in the end.
func Start(withClickHouse bool) *Engines {
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
		Expect(postgres.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
		Expect(db.Close()).To(Succeed())
		shared := dsns{Postgres: e.postgres.DSN("postgres")}
		if withClickHouse {
			e.clickHouse, err = devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{})
			Expect(err).NotTo(HaveOccurred())
			shared.Native, shared.HTTP = e.clickHouse.NativeDSN("default"), e.clickHouse.HTTPDSN("default")
		}
		encoded, err := json.Marshal(shared)
		Expect(err).NotTo(HaveOccurred())
		return encoded
	}, func(encoded []byte) {
		Expect(json.Unmarshal(encoded, &e.dsns)).To(Succeed())
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

func (e *Engines) newName() string {
	return fmt.Sprintf("spec_%d_%d", GinkgoParallelProcess(), e.databases.Add(1))
}

// PostgresDSN returns the DSN of a new, migrated database, which is dropped
// after the spec.
func (e *Engines) PostgresDSN(ctx context.Context) string {
	GinkgoHelper()
	name := e.newName()
	server, err := sql.Open("postgres", e.dsns.Postgres)
	Expect(err).NotTo(HaveOccurred())
	_, err = server.ExecContext(ctx, "CREATE DATABASE "+name+" TEMPLATE "+template)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func(ctx SpecContext) {
		_, err := server.ExecContext(ctx, "DROP DATABASE "+name+" WITH (FORCE)")
		Expect(err).NotTo(HaveOccurred())
		Expect(server.Close()).To(Succeed())
	})
	return withDatabase(e.dsns.Postgres, name)
}

// OpenPostgres opens dsn, with the given session settings, for as long as the
// spec runs.
func OpenPostgres(dsn string, session map[string]string) *sqlx.DB {
	GinkgoHelper()
	db, err := postgres.Open(postgres.Options{DSN: dsn, Session: session})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(db.Close)
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
	name := e.newName()
	Query(ctx, e.dsns.HTTP, "CREATE DATABASE "+name)
	created := ClickHouseDSNs{Native: withDatabase(e.dsns.Native, name), HTTP: withDatabase(e.dsns.HTTP, name)}
	DeferCleanup(func(ctx SpecContext) { Query(ctx, e.dsns.HTTP, "DROP DATABASE "+name) })
	Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: created.Native}, slog.New(slog.DiscardHandler))).To(Succeed())
	Query(ctx, created.HTTP, "SYSTEM STOP MERGES event_log")
	return created
}

// Query runs a ClickHouse statement.
func Query(ctx context.Context, dsn, statement string) {
	GinkgoHelper()
	db, err := sql.Open("clickhouse", dsn)
	Expect(err).NotTo(HaveOccurred())
	defer func() { Expect(db.Close()).To(Succeed()) }()
	_, err = db.ExecContext(ctx, statement)
	Expect(err).NotTo(HaveOccurred())
}

// Scan runs a ClickHouse query that returns one row, into dest.
func Scan(ctx context.Context, dsn, query string, dest ...any) error {
	db, err := sql.Open("clickhouse", dsn)
	if err != nil {
		return err //nolint:wrapcheck // for an assertion
	}
	defer db.Close()                                      //nolint:errcheck // a pool of one
	return db.QueryRowContext(ctx, query).Scan(dest...) //nolint:wrapcheck // for an assertion
}

func withDatabase(dsn, name string) string {
	GinkgoHelper()
	parsed, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	parsed.Path = "/" + name
	return parsed.String()
}
