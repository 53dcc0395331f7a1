package testengines

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/needs"
	"github.com/diehard-outbox/diehard/internal/ports"
)

// Postgres is a PostgreSQL server of one spec, which the spec may kill.
type Postgres struct{ *process }

// StartPostgres starts a server that ends with the spec. It skips the spec if the suites
// use a named server. A spec must not kill a named server, and the machine may have no
// other PostgreSQL.
func StartPostgres(ctx context.Context, settings map[string]string) *Postgres {
	GinkgoHelper()
	if os.Getenv(PostgresEnv) != "" {
		needs.LeaveOut(PostgresEnv + " names a server, but this spec must kill its server")
	}
	// The engine may run as another user.
	dir, err := os.MkdirTemp("", "diehard-postgres-*")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(os.RemoveAll, dir)
	Expect(os.Chmod(dir, 0o755)).To(Succeed()) //nolint:gosec // the data folder below it is private
	_, port, err := net.SplitHostPort(ports.Reserve())
	Expect(err).NotTo(HaveOccurred())
	p := &Postgres{newPostgres(settings, "--data-dir", filepath.Join(dir, "data"), "--port", port)}
	p.Start(ctx)
	DeferCleanup(p.Stop)
	return p
}

func newPostgres(settings map[string]string, args ...string) *process {
	p := &process{args: append([]string{"postgres"}, args...)}
	for name, value := range settings {
		p.args = append(p.args, "--setting", name+"="+value)
	}
	return p
}

// DSN returns the address of the server's database postgres. It stays the same
// after a restart.
func (p *Postgres) DSN() string { return p.addresses["dsn"] }

// Start restarts the server after Kill or Stop, on the same data and port.
func (p *Postgres) Start(ctx context.Context) {
	GinkgoHelper()
	Expect(p.start(ctx)).To(Succeed())
}

// Kill ends the server like a crash.
func (p *Postgres) Kill() {
	GinkgoHelper()
	Expect(p.end(syscall.SIGQUIT)).To(Succeed())
}

// Stop stops the server cleanly.
func (p *Postgres) Stop() {
	GinkgoHelper()
	Expect(p.end(syscall.SIGTERM)).To(Succeed())
}

// HideTimeline makes the server hide its timeline in this database, as Amazon Aurora does.
func HideTimeline(ctx context.Context, db *sqlx.DB) {
	GinkgoHelper()
	FailTimeline(ctx, db, "object_not_in_prerequisite_state")
}

// FailTimeline makes the server answer with this error in this database when it is asked for
// its timeline. The result ends the fault.
func FailTimeline(ctx context.Context, db *sqlx.DB, condition string) (end func()) {
	GinkgoHelper()
	db.MustExecContext(ctx, `ALTER FUNCTION pg_catalog.pg_current_wal_lsn() RENAME TO pg_hidden_wal_lsn;
		CREATE FUNCTION pg_catalog.pg_current_wal_lsn() RETURNS pg_lsn LANGUAGE plpgsql AS $$
		BEGIN RAISE EXCEPTION 'wal_level must be set to ''logical''' USING ERRCODE = '`+condition+`'; END $$`)
	return func() {
		db.MustExecContext(ctx, `DROP FUNCTION pg_catalog.pg_current_wal_lsn();
			ALTER FUNCTION pg_catalog.pg_hidden_wal_lsn() RENAME TO pg_current_wal_lsn`)
	}
}

// ExamplePostgres starts a server for a testable example, which runs outside the suite's
// nodes. It returns the server's DSN. It panics on an error.
func ExamplePostgres(ctx context.Context) (dsn string, stop func()) {
	p := newPostgres(nil)
	if err := p.start(ctx); err != nil {
		panic(fmt.Sprintf("start PostgreSQL: %v", err))
	}
	return p.addresses["dsn"], func() { _ = p.end(syscall.SIGTERM) }
}
