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
	// migrationLockPoll is the interval between attempts to get the lock. Waiting in
	// the server would block CREATE INDEX CONCURRENTLY.
	migrationLockPoll = 200 * time.Millisecond
)

// Set is a set of tables with its own migrations and its own version table. An
// application can use one set without the others.
type Set struct {
	name         string
	versionTable string
	files        fs.FS
}

// The sets of tables.
var (
	// Outbox contains the tables of the outbox: events, batches and dead letters.
	Outbox = Set{"outbox", "diehard_outbox_version", migrations.Outbox}
	// Users contains the tables of the API.
	Users = Set{"users", "diehard_users_version", migrations.Users}
)

// Schema describes the tables that a program requires in a database.
type Schema struct {
	// Name is the schema of the tables. If it is empty, the session's search_path
	// applies, and migrations create the tables in its first schema.
	Name string
	Sets []Set
	// Command is the command that migrates the schema, for error texts.
	Command string
}

// MigrationSession returns the settings of the connections that migrate. The migrations
// then do not depend on the settings of the database and of the role.
func MigrationSession() map[string]string {
	return map[string]string{
		"default_table_access_method":   "heap",
		"default_transaction_isolation": "read committed",
		"idle_session_timeout":          "0",
		"statement_timeout":             "0",
		"synchronous_commit":            "on",
		"transaction_timeout":           "0",
	}
}

// Migrate migrates the sets to the versions of this program and then calls the given
// functions. It creates the schema if it does not exist. It leaves newer sets
// unchanged. A lock in the database allows one migration at a time; other migrations
// wait. It returns an *UnsuitableError if the encoding of the database is not UTF8.
//
// Migrate uses two connections with the settings of MigrationSession.
func (s Schema) Migrate(ctx context.Context, db *sql.DB, log *slog.Logger, then ...func(context.Context) error) error {
	if err := checkEncoding(ctx, db); err != nil {
		return err
	}
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

// create creates the schema if it does not exist. It checks first, because CREATE
// SCHEMA IF NOT EXISTS requires the CREATE privilege even if the schema exists.
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
		case pqerror.LockNotAvailable: // the lock_timeout of the migration
			return fmt.Errorf("migrate postgresql: another transaction locks a table that this migration changes: "+
				"find that transaction in pg_stat_activity, wait for it or terminate it, and migrate again: %w", err)
		case pqerror.DuplicateTable:
			return fmt.Errorf("migrate postgresql: another application's table has the same name as one of Diehard's: "+
				"set postgres.schema to another schema: %w", err)
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

// render returns the migrations of the set with the name of the schema filled in.
func (s Schema) render(set Set) fs.FS {
	inSchema := InSchema(s.Name)
	return migrations.Render(set.files, func(text string) (string, error) { return inSchema(text), nil })
}

// versions is goose's version store. It replaces goose's TableExists, because that
// function does not find tables with quoted names.
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
	return exists, err //nolint:wrapcheck // goose wraps it
}

// Print writes the statements that Migrate executes in an empty database. Migrate and
// Check accept a schema that was created by these statements.
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
	return err //nolint:wrapcheck // the error of the caller's writer
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
	fmt.Fprintf(text, "\n-- Applied migrations of the tables for %s.\n", set.name)
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

// lockMigrations waits for the migration lock and holds it in a transaction. See
// docs/adr/0003-migration-lock-in-a-transaction.md.
func lockMigrations(ctx context.Context, db *sql.DB, log *slog.Logger) (unlock func(), err error) {
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return nil, fmt.Errorf("lock the migrations: %w", err)
	}
	release := func() { _ = tx.Rollback() } // the end of the transaction releases the lock
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
			log.InfoContext(ctx, "waiting for another migration")
		}
		select {
		case <-time.After(migrationLockPoll):
		case <-ctx.Done():
			return nil, fmt.Errorf("lock the migrations: %w", ctx.Err())
		}
	}
}

// SchemaTooOldError means that the database lacks migrations of this program.
type SchemaTooOldError struct {
	// Tables is the name of the set: outbox or users.
	Tables     string
	Have, Need int64
	// Command migrates the schema.
	Command string
}

// Error implements error.
func (e *SchemaTooOldError) Error() string {
	return fmt.Sprintf("the tables for %s in postgresql are too old: found version %d, need version %d; run `%s`",
		e.Tables, e.Have, e.Need, e.Command)
}

// Explain returns the problem and the remedy.
func (e *SchemaTooOldError) Explain() (problem, remedy string) {
	if e.Have == 0 {
		return fmt.Sprintf("the tables for %s do not exist, need version %d", e.Tables, e.Need), e.Command
	}
	return fmt.Sprintf("the tables for %s are too old: found version %d, need version %d", e.Tables, e.Have, e.Need), e.Command
}

// UnsuitableError means that the database lacks a property that the program relies on.
type UnsuitableError struct {
	Problem string
	// Remedy tells the operator what to do. It is a statement, if a statement is enough.
	Remedy string
}

// Error implements error.
func (e *UnsuitableError) Error() string { return e.Problem + "; to fix it: " + e.Remedy }

// Explain returns the problem and the remedy.
func (e *UnsuitableError) Explain() (problem, remedy string) { return e.Problem, e.Remedy }

// checkEncoding returns an *UnsuitableError if the encoding of the database is not UTF8.
// In another encoding, the database refuses some events, or accepts events that are not
// valid UTF-8.
func checkEncoding(ctx context.Context, db *sql.DB) error {
	var name, encoding string
	err := db.QueryRowContext(ctx, "SELECT current_database(), current_setting('server_encoding')").Scan(&name, &encoding)
	if err != nil {
		return fmt.Errorf("read the encoding of the database: %w", err)
	}
	if encoding == "UTF8" {
		return nil
	}
	return &UnsuitableError{
		Problem: fmt.Sprintf("the database %s has the encoding %s instead of UTF8", name, encoding),
		Remedy:  "create a database with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0, and set postgres.dsn to it",
	}
}

// Check returns a *SchemaTooOldError if the schema is older than this program
// requires. It returns an *UnsuitableError if the encoding of the database is not UTF8, or
// if the role may not read the version. It returns another error if it cannot read the
// version. It accepts and logs a newer schema, because migrations expand before they
// contract.
func (s Schema) Check(ctx context.Context, db *sql.DB, log *slog.Logger) error {
	versions, err := s.Versions(ctx, db)
	for _, version := range versions {
		if version.Have > version.Need {
			log.WarnContext(ctx, "postgresql schema newer than this program",
				"tables", version.Tables, "have", version.Have, "need", version.Need)
		}
	}
	return err
}

// Version is the version of a set of tables.
type Version struct {
	// Tables is the name of the set: outbox or users.
	Tables string
	// Have is the version in the database. Need is the version that this program requires.
	Have, Need int64
}

// Versions returns the version of each set in the database. Its errors are those of Check.
func (s Schema) Versions(ctx context.Context, db *sql.DB) (all []Version, err error) {
	if err := checkEncoding(ctx, db); err != nil {
		return nil, err
	}
	for _, set := range s.Sets {
		need, err := set.newest()
		if err != nil {
			return all, err
		}
		have, err := s.version(ctx, db, set)
		switch {
		case isInsufficientPrivilege(err):
			return all, s.versionUnreadable(ctx, db, set, err)
		case err != nil:
			return all, fmt.Errorf("read the schema's version: %w", err)
		case have < need:
			return all, &SchemaTooOldError{Tables: set.name, Have: have, Need: need, Command: s.Command}
		}
		all = append(all, Version{Tables: set.name, Have: have, Need: need})
	}
	return all, nil
}

// versionUnreadable returns an *UnsuitableError that names the missing privilege.
func (s Schema) versionUnreadable(ctx context.Context, db *sql.DB, set Set, cause error) error {
	var role string
	if err := db.QueryRowContext(ctx, "SELECT current_user").Scan(&role); err != nil {
		return fmt.Errorf("read the schema's version: %w", cause)
	}
	role = pq.QuoteIdentifier(role)
	remedy := fmt.Sprintf("GRANT SELECT ON %s TO %s", InSchema(s.Name)("{schema}"+set.versionTable), role)
	if s.Name != "" {
		remedy = fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO %s; %s", pq.QuoteIdentifier(s.Name), role, remedy)
	}
	return &UnsuitableError{Problem: fmt.Sprintf("the role may not read the schema's version (%v)", cause), Remedy: remedy}
}

// version returns the version of the set in the database. It returns 0 if the set does
// not exist.
func (s Schema) version(ctx context.Context, db *sql.DB, set Set) (int64, error) {
	store, err := s.versions(set)
	if err != nil {
		return 0, err
	}
	version, err := store.GetLatestVersion(ctx, db)
	if isUndefinedTable(err) || errors.Is(err, database.ErrVersionNotFound) {
		return 0, nil
	}
	return version, err //nolint:wrapcheck // Check wraps it
}

// CheckReady returns nil if the server responds, accepts writes and has a schema that
// is new enough. Otherwise it returns the reason.
func (s Schema) CheckReady(ctx context.Context, db *sql.DB) error {
	if err := s.Check(ctx, db, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	return CheckWritable(ctx, db)
}

// CheckWritable returns an error if the server accepts no writes.
func CheckWritable(ctx context.Context, db *sql.DB) error {
	var readOnly string
	if err := db.QueryRowContext(ctx, "SHOW transaction_read_only").Scan(&readOnly); err != nil {
		return fmt.Errorf("check whether postgresql accepts writes: %w", err)
	}
	if readOnly == "on" {
		return errReadOnly
	}
	return nil
}

var errReadOnly = &UnsuitableError{
	Problem: "postgresql accepts no writes: it is a standby or read-only",
	Remedy:  "connect to the primary",
}

func isInsufficientPrivilege(err error) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return ok && server.Code == pqerror.InsufficientPrivilege
}

func isUndefinedTable(err error) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return ok && (server.Code == pqerror.UndefinedTable || server.Code == pqerror.InvalidSchemaName)
}

// newest returns the newest version of the set that this program contains.
func (s Set) newest() (int64, error) {
	all, err := migrations.Versions(s.files)
	if err != nil {
		return 0, err
	}
	return all[len(all)-1].Number, nil
}
