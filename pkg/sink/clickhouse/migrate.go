package clickhouse

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"text/template"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/pressly/goose/v3"

	migrations "github.com/diehard-outbox/diehard/db"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// versionTableSuffix is what the name of the table that records the migrations
// has more than the table of events: two of those in one database have two
// records.
const versionTableSuffix = "_db_version"

// Migrate creates the table, or brings it up to the version that this binary was
// built with. The database must exist: a *sink.MisconfiguredError says so.
//
// It can be run again, also after it failed halfway. Two at once may both do
// the work, since ClickHouse has no lock to take; it does no harm, but is
// better kept apart by the caller. A table that is gone is created anew,
// whatever the record of the migrations says.
//
// On a cluster each server has a record of its own, and a migration that another
// server has a record of runs once more, without effect.
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
	// goose writes its record by an INSERT, which newer servers would put aside
	// for a while.
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
		provider, err := goose.NewProvider(goose.DialectClickHouse, db, rendered{migrations.ClickHouse, variables{
			Table:     quoteIdentifier(o.Table),
			OnCluster: onCluster(o.Cluster),
		}}, append(options, goose.WithTableName(o.Table+versionTableSuffix), goose.WithDisableGlobalRegistry(true))...)
		if err != nil {
			return nil, fmt.Errorf("read the migrations: %w", err)
		}
		results, err := provider.Up(ctx)
		if err != nil {
			return nil, s.classify(ctx, "migrate clickhouse", err)
		}
		return results, nil
	}
	var tables uint64
	err = s.conn.QueryRow(ctx,
		"SELECT count() FROM system.tables WHERE database = currentDatabase() AND name = "+quoteString(o.Table)).Scan(&tables)
	if err != nil {
		return s.classify(ctx, "migrate clickhouse", err)
	}
	var results []*goose.MigrationResult
	if tables == 0 { // which the record, if there is one, does not know
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

// variables are what the migrations leave open. Both are safe in a statement.
type variables struct {
	Table, OnCluster string
}

// rendered is a file tree whose SQL files are templates.
type rendered struct {
	fs.FS

	variables variables
}

// Open implements fs.FS.
func (r rendered) Open(name string) (fs.File, error) {
	file, err := r.FS.Open(name)
	if err != nil || path.Ext(name) != ".sql" {
		return file, err //nolint:wrapcheck // a *fs.PathError, as fs.FS asks for
	}
	source, err := fs.ReadFile(r.FS, name)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	t, err := template.New(name).Option("missingkey=error").Parse(string(source))
	if err != nil {
		return nil, &fs.PathError{Op: "parse", Path: name, Err: err}
	}
	out := &renderedFile{File: file}
	if err := t.Execute(&out.text, r.variables); err != nil {
		return nil, &fs.PathError{Op: "render", Path: name, Err: err}
	}
	return out, nil
}

// renderedFile is the template's file with another content.
type renderedFile struct {
	fs.File

	text bytes.Buffer
}

// Read implements fs.File.
func (f *renderedFile) Read(p []byte) (int, error) {
	return f.text.Read(p) //nolint:wrapcheck // io.EOF
}

func (s *Sink) databaseMissing() error {
	return &sink.MisconfiguredError{
		Problem: "the database of the clickhouse dsn does not exist",
		Remedy:  "CREATE DATABASE " + quoteIdentifier(s.database) + onCluster(s.cluster) + "; then relay migrate",
	}
}
