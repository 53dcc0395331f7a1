package clickhouse

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"text/template"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/pressly/goose/v3"

	migrations "github.com/diehard-outbox/diehard/db"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// versionTableSuffix is appended to the table's name for the table that records its
// migrations. Two event tables in one database therefore have separate records.
const versionTableSuffix = "_db_version"

// Migrate creates the table, or migrates it to the version of this binary. If the
// database does not exist, it returns a *sink.MisconfiguredError.
//
// It can be repeated, even after a failure. Concurrent calls may both execute the
// migrations, because ClickHouse has no lock. This is harmless, but callers should avoid
// it. Migrate creates a missing table again, even if the record says that the migrations
// were executed.
//
// On a cluster each server has its own record. A migration that another server has
// recorded runs again, without effect.
func Migrate(ctx context.Context, o Options, log *slog.Logger) error {
	s, err := Open(o)
	if err != nil {
		return err
	}
	defer s.Close()
	o, d, err := parse(o)
	if err != nil {
		return err
	}
	// goose records versions by an INSERT, which newer servers would execute
	// asynchronously.
	d.Settings["async_insert"] = 0
	if d.Protocol == chgo.HTTP {
		d.Settings["wait_end_of_query"] = 1
	}
	db := chgo.OpenDB(d)
	defer db.Close()
	if err := db.PingContext(ctx); err != nil {
		err = s.classify(ctx, "migrate clickhouse", err)
		if hasCode(err, unknownDatabase) {
			return s.databaseMissing()
		}
		return err
	}

	up := func(options ...goose.ProviderOption) ([]*goose.MigrationResult, error) {
		provider, err := goose.NewProvider(goose.DialectClickHouse, db, migrationFiles(o), append(options, goose.WithTableName(o.Table+versionTableSuffix), goose.WithDisableGlobalRegistry(true))...)
		if err != nil {
			return nil, fmt.Errorf("read the migrations: %w", err)
		}
		results, err := provider.Up(ctx)
		if err != nil {
			return nil, s.classify(ctx, "migrate clickhouse", err)
		}
		return results, nil
	}
	querying, err := s.resolving(ctx)
	if err != nil {
		return err
	}
	var tables uint64
	err = s.conn.QueryRow(querying,
		"SELECT count() FROM system.tables WHERE database = currentDatabase() AND name = "+quoteString(o.Table)).Scan(&tables)
	if err != nil {
		return s.classify(ctx, "migrate clickhouse", err)
	}
	var results []*goose.MigrationResult
	if tables == 0 { // the record may still exist
		if results, err = up(goose.WithDisableVersioning(true)); err != nil {
			return err
		}
	}
	recorded, err := up()
	if err != nil {
		return err
	}
	if results == nil {
		results = recorded
	}
	for _, result := range results {
		log.InfoContext(ctx, "clickhouse migrated",
			"version", result.Source.Version, "duration", result.Duration)
	}
	return nil
}

// PrintMigrations writes the statements that Migrate executes, for operators and tools
// that execute them themselves. The relay and Migrate accept a table that was created by
// these statements.
func PrintMigrations(w io.Writer, o Options) error {
	versions, err := migrations.Versions(migrationFiles(o))
	if err != nil {
		return err
	}
	for _, version := range versions {
		if _, err := fmt.Fprintf(w, "-- Version %d.\n\n%s\n", version.Number, version.SQL); err != nil {
			return fmt.Errorf("print the migrations: %w", err)
		}
	}
	return nil
}

// migrationFiles returns the migrations with the names of the table and of the cluster
// filled in.
func migrationFiles(o Options) fs.FS {
	return migrations.Render(migrations.ClickHouse, func(text string) (string, error) {
		t, err := template.New("").Option("missingkey=error").Parse(text)
		if err != nil {
			return "", err //nolint:wrapcheck // Render names the file
		}
		var rendered strings.Builder
		err = t.Execute(&rendered, map[string]string{"Table": quoteIdentifier(o.Table), "OnCluster": onCluster(o.Cluster)})
		return rendered.String(), err
	})
}

func (s *Sink) databaseMissing() error {
	return &sink.MisconfiguredError{
		Problem: "the database of the clickhouse dsn does not exist",
		Remedy:  "CREATE DATABASE " + quoteIdentifier(s.database) + onCluster(s.cluster) + "; then relay migrate",
	}
}
