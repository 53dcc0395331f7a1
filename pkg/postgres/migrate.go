package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"

	migrations "github.com/diehard-outbox/diehard/db"
)

const (
	// migrationLock is the key of an advisory lock: "diehard" in ASCII.
	migrationLock = 0x64696568617264
	// migrationLockPoll is the interval at which a process tries to get the lock. It
	// does not wait in the server: the snapshot of a waiting statement would keep
	// CREATE INDEX CONCURRENTLY from finishing.
	migrationLockPoll = 200 * time.Millisecond
)

// Set is a set of tables with migrations and a version table of its own. An
// application can adopt one without the others.
type Set struct {
	name         string
	versionTable string
	files        fs.FS
}

// The sets.
var (
	// Outbox has the tables that events are published into and delivered from.
	Outbox = Set{"outbox", "diehard_outbox_version", migrations.Outbox}
	// Users has the tables of the API.
	Users = Set{"users", "diehard_users_version", migrations.Users}
)

// Schema is what a program needs in a database.
type Schema struct {
	// Name is the schema that the tables are in. If it is empty, they are found by
	// the session's search_path, and created in its first schema.
	Name string
	Sets []Set
	// Command is the command line that migrates the schema, for errors.
	Command string
}

// Migrate brings the sets up to the versions that this program was built with, and
// then calls each of the given functions. It creates the schema if there is none of
// the name. One process at a time migrates, by a lock in the database: the others wait
// and find nothing left to do. A set that is newer stays as it is.
//
// It needs two connections.
func (s Schema) Migrate(ctx context.Context, db *sql.DB, log *slog.Logger, then ...func(context.Context) error) error {
	unlock, err := lockMigrations(ctx, db, log)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.create(ctx, db); err != nil {
		return err
	}
	for _, set := range s.Sets {
		if err := s.migrate(ctx, db, log, set); err != nil {
			return err
		}
	}
	for _, step := range then {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// create creates the schema. It looks first, because IF NOT EXISTS asks for the right
// to create one even if the schema exists.
func (s Schema) create(ctx context.Context, db *sql.DB) error {
	if s.Name == "" {
		return nil
	}
	var exists bool
	err := db.QueryRowContext(ctx, "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", s.Name).Scan(&exists)
	if err == nil && !exists {
		_, err = db.ExecContext(ctx, s.createSQL())
	}
	if err != nil {
		return fmt.Errorf("create the schema %s: %w", s.Name, err)
	}
	return nil
}

func (s Schema) createSQL() string {
	return "CREATE SCHEMA IF NOT EXISTS " + pq.QuoteIdentifier(s.Name)
}

func (s Schema) migrate(ctx context.Context, db *sql.DB, log *slog.Logger, set Set) error {
	store, err := s.versions(set)
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider("", db, s.render(set), goose.WithStore(store), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("read the migrations: %w", err)
	}
	results, err := provider.Up(ctx)
	if refused, ok := errors.AsType[*pq.Error](err); ok {
		switch refused.Code {
		case pqerror.LockNotAvailable: // by the migration's own lock_timeout
			return fmt.Errorf("migrate postgresql: another transaction holds a table that this migration changes: "+
				"wait for its end, or end it (pg_stat_activity shows it), and migrate again: %w", err)
		case pqerror.DuplicateTable:
			return fmt.Errorf("migrate postgresql: another application's table has the name of one of Diehard's: "+
				"name a schema in postgres.schema: %w", err)
		}
	}
	if err != nil {
		return fmt.Errorf("migrate postgresql: %w", err)
	}
	for _, result := range results {
		log.InfoContext(ctx, "postgresql migrated",
			"tables", set.name, "version", result.Source.Version, "duration", result.Duration)
	}
	return nil
}

// render returns the set's migrations with the schema's name in them.
func (s Schema) render(set Set) fs.FS {
	inSchema := InSchema(s.Name)
	return migrations.Render(set.files, func(text string) (string, error) { return inSchema(text), nil })
}

// versions is the record of the migrations that have run. goose's own is the same, but
// does not find a table whose name is quoted.
type versions struct {
	database.Store

	table string
}

func (s Schema) versions(set Set) (versions, error) {
	table := InSchema(s.Name)("{schema}" + set.versionTable)
	store, err := database.NewStore(database.DialectPostgres, table)
	if err != nil {
		return versions{}, fmt.Errorf("read the schema's version: %w", err)
	}
	return versions{store, table}, nil
}

// TableExists implements database.StoreExtender.
func (v versions) TableExists(ctx context.Context, db database.DBTxConn) (exists bool, err error) {
	err = db.QueryRowContext(ctx, "SELECT to_regclass($1) IS NOT NULL", v.table).Scan(&exists)
	return exists, err //nolint:wrapcheck // goose says what it was doing
}

// Print writes the statements that Migrate executes in an empty database, for people
// and tools that execute them by themselves. Migrate and Check accept what they make.
func (s Schema) Print(w io.Writer) error {
	var text strings.Builder
	if s.Name != "" {
		fmt.Fprintf(&text, "%s;\n", s.createSQL())
	}
	for _, set := range s.Sets {
		if err := s.print(&text, set); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, text.String())
	return err //nolint:wrapcheck // the writer's own
}

func (s Schema) print(text *strings.Builder, set Set) error {
	store, err := s.versions(set)
	if err != nil {
		return err
	}
	all, err := migrations.Versions(s.render(set))
	if err != nil {
		return err
	}
	fmt.Fprintf(text, "\n-- The record of the migrations of the tables for %s.\n", set.name)
	fmt.Fprintf(text, `CREATE TABLE %s (
    id         integer PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
    version_id bigint NOT NULL,
    is_applied boolean NOT NULL,
    tstamp     timestamp NOT NULL DEFAULT now()
);
INSERT INTO %s (version_id, is_applied) VALUES (0, true);
`, store.table, store.table)
	for _, version := range all {
		fmt.Fprintf(text, "\n-- Version %d.\n\n%s\n\nINSERT INTO %s (version_id, is_applied) VALUES (%d, true);\n",
			version.Number, version.SQL, store.table, version.Number)
	}
	return nil
}

// lockMigrations waits for the lock. A transaction holds it, not a session: a pooler
// that shares connections by transaction would leave a session's lock behind. goose's
// locker by a table would add that table to the application's database, and keep others
// waiting for its lease after a crash.
func lockMigrations(ctx context.Context, db *sql.DB, log *slog.Logger) (unlock func(), err error) {
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return nil, fmt.Errorf("lock the migrations: %w", err)
	}
	release := func() { _ = tx.Rollback() } // the lock ends with its transaction, however that ends
	defer func() {
		if err != nil {
			release()
		}
	}()
	// The transaction is idle while the migrations run.
	if _, err := tx.ExecContext(ctx, "SET LOCAL idle_in_transaction_session_timeout = 0"); err != nil {
		return nil, fmt.Errorf("lock the migrations: %w", err)
	}
	for waiting := false; ; waiting = true {
		var locked bool
		err := tx.QueryRowContext(ctx, "SELECT pg_try_advisory_xact_lock($1)", int64(migrationLock)).Scan(&locked)
		if err != nil {
			return nil, fmt.Errorf("lock the migrations: %w", err)
		}
		if locked {
			return release, nil
		}
		if !waiting {
			log.InfoContext(ctx, "waiting for another process's migration")
		}
		select {
		case <-time.After(migrationLockPoll):
		case <-ctx.Done():
			return nil, fmt.Errorf("lock the migrations: %w", ctx.Err())
		}
	}
}

// SchemaTooOldError says that the database lacks migrations that this program was
// built with.
type SchemaTooOldError struct {
	// Tables is the name of the set: outbox or users.
	Tables     string
	Have, Need int64
	// Command migrates the schema.
	Command string
}

// Error implements error.
func (e *SchemaTooOldError) Error() string {
	return fmt.Sprintf("the tables for %s in postgresql are too old: this program needs version %d and found %d; "+
		"`%s` brings them up to date", e.Tables, e.Need, e.Have, e.Command)
}

// Check returns a *SchemaTooOldError if this program cannot work with the schema, and
// any other error if it could not be read. A newer schema is fine, because migrations
// expand before they contract; it is logged.
func (s Schema) Check(ctx context.Context, db *sql.DB, log *slog.Logger) error {
	for _, set := range s.Sets {
		need, err := set.newest()
		if err != nil {
			return err
		}
		have, err := s.version(ctx, db, set)
		switch {
		case err != nil:
			return fmt.Errorf("read the schema's version: %w", err)
		case have < need:
			return &SchemaTooOldError{Tables: set.name, Have: have, Need: need, Command: s.Command}
		case have > need:
			log.WarnContext(ctx, "the schema in postgresql is newer than this program",
				"tables", set.name, "have", have, "need", need)
		}
	}
	return nil
}

// version returns the set's version in the database, or 0 if there is none.
func (s Schema) version(ctx context.Context, db *sql.DB, set Set) (int64, error) {
	store, err := s.versions(set)
	if err != nil {
		return 0, err
	}
	version, err := store.GetLatestVersion(ctx, db)
	if isUndefinedTable(err) || errors.Is(err, database.ErrVersionNotFound) {
		return 0, nil
	}
	return version, err //nolint:wrapcheck // Check says what was being done
}

// CheckReady returns nil if the server answers, takes writes and has a schema that
// this program can work with, and otherwise the reason.
func (s Schema) CheckReady(ctx context.Context, db *sql.DB) error {
	if err := s.Check(ctx, db, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	var readOnly string
	if err := db.QueryRowContext(ctx, "SHOW transaction_read_only").Scan(&readOnly); err != nil {
		return fmt.Errorf("ask postgresql whether it takes writes: %w", err)
	}
	if readOnly == "on" {
		return errReadOnly
	}
	return nil
}

var errReadOnly = errors.New("postgresql takes no writes: it is a standby, or set to read-only")

func isUndefinedTable(err error) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return ok && (server.Code == pqerror.UndefinedTable || server.Code == pqerror.InvalidSchemaName)
}

// newest returns the version that this program was built with.
func (s Set) newest() (int64, error) {
	all, err := migrations.Versions(s.files)
	if err != nil {
		return 0, err
	}
	return all[len(all)-1].Number, nil
}
