package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"

	migrations "github.com/diehard-outbox/diehard/db"
)

const (
	// versionTable is Diehard's own, for an application in the same database
	// may have goose's default one.
	versionTable = "diehard_db_version"
	// migrationLock is an advisory lock's key: "diehard" in ASCII.
	migrationLock = 0x64696568617264
	// migrationLockPoll is how often whoever waits for the lock tries again. It
	// does not wait in the server, where the snapshot that waits would keep
	// CREATE INDEX CONCURRENTLY from ever finishing.
	migrationLockPoll = 200 * time.Millisecond
)

// Migrate brings the schema up to the version that this binary was built with,
// and then runs each of the given functions. One process at a time does so, by
// a lock in the database: side by side, the others wait and find nothing left
// to do. A schema that is newer is left as it is.
//
// It takes two connections.
func Migrate(ctx context.Context, db *sql.DB, log *slog.Logger, then ...func(context.Context) error) error {
	provider, err := goose.NewProvider(goose.DialectPostgres, db, migrations.Postgres,
		goose.WithTableName(versionTable), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("read the migrations: %w", err)
	}
	unlock, err := lockMigrations(ctx, db, log)
	if err != nil {
		return err
	}
	defer unlock()

	results, err := provider.Up(ctx)
	if pqErr, ok := errors.AsType[*pq.Error](err); ok && pqErr.Code == pqerror.LockNotAvailable {
		// The migrations' own lock_timeout: nothing of this one has happened.
		return fmt.Errorf("migrate postgresql: another transaction holds a table that this one changes: "+
			"wait for it or end it (pg_stat_activity shows which), and migrate again: %w", err)
	}
	if err != nil {
		return fmt.Errorf("migrate postgresql: %w", err)
	}
	for _, result := range results {
		log.InfoContext(ctx, "postgresql migrated",
			"version", result.Source.Version, "duration", result.Duration)
	}
	for _, step := range then {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// lockMigrations waits for the lock. goose's own would not cover the creation
// of the version table, and is held by a session, which a pooler that shares
// connections by transaction would leave behind locked.
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
			log.InfoContext(ctx, "another process is migrating: waiting for it")
		}
		select {
		case <-time.After(migrationLockPoll):
		case <-ctx.Done():
			return nil, fmt.Errorf("lock the migrations: %w", ctx.Err())
		}
	}
}

// SchemaTooOldError says that the database lacks migrations that this binary
// was built with.
type SchemaTooOldError struct {
	Have, Need int64
}

// Error implements error.
func (e *SchemaTooOldError) Error() string {
	return fmt.Sprintf("the schema in postgresql is too old: this binary needs version %d and found %d; "+
		"`api migrate` brings it up to date", e.Need, e.Have)
}

// CheckSchema returns a *SchemaTooOldError where this binary cannot work with
// the schema, and any other error where it could not be asked. A newer schema
// is fine, since migrations expand before they contract; it is logged.
func CheckSchema(ctx context.Context, db *sql.DB, log *slog.Logger) error {
	need, err := newestMigration()
	if err != nil {
		return err
	}
	store, err := database.NewStore(database.DialectPostgres, versionTable)
	if err != nil {
		return fmt.Errorf("read the schema's version: %w", err)
	}
	have, err := store.GetLatestVersion(ctx, db)
	switch {
	case isUndefinedTable(err), errors.Is(err, database.ErrVersionNotFound):
		return &SchemaTooOldError{Have: 0, Need: need}
	case err != nil:
		return fmt.Errorf("read the schema's version: %w", err)
	case have < need:
		return &SchemaTooOldError{Have: have, Need: need}
	case have > need:
		log.WarnContext(ctx, "the schema in postgresql is newer than this binary", "have", have, "need", need)
	}
	return nil
}

// CheckReady returns nil where the server answers, takes writes and has a
// schema that this binary can work with, and otherwise why not.
func CheckReady(ctx context.Context, db *sql.DB) error {
	if err := CheckSchema(ctx, db, slog.New(slog.DiscardHandler)); err != nil {
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
	return ok && server.Code == pqerror.UndefinedTable
}

func newestMigration() (int64, error) {
	names, err := fs.Glob(migrations.Postgres, "*.sql")
	if err != nil {
		return 0, fmt.Errorf("read the migrations: %w", err)
	}
	var newest int64
	for _, name := range names {
		version, err := goose.NumericComponent(name)
		if err != nil {
			return 0, fmt.Errorf("read the migrations: %w", err)
		}
		newest = max(newest, version)
	}
	return newest, nil
}
