package postgres_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

func TestPostgres(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "postgres")
}

var suite = testengines.Start(testengines.Options{Postgres: true})

// root is the DSN of a shared database. Specs do not change it.
var root string

var _ = BeforeEach(func() { root = suite.ServerPostgresDSN() })

// newDatabase creates a database for the spec and returns its DSN.
func newDatabase(ctx context.Context) string {
	GinkgoHelper()
	return suite.EmptyPostgresDSN(ctx)
}

// open opens a pool and closes it when the spec ends.
func open(o postgres.Options) *sqlx.DB {
	GinkgoHelper()
	db, err := postgres.Open(o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(db.Close)
	return db
}

// logs returns a logger and a buffer with its output.
func logs() (*slog.Logger, *gbytes.Buffer) {
	buffer := gbytes.NewBuffer()
	return slog.New(slog.NewTextHandler(buffer, nil)), buffer
}

// show returns the value of a setting.
func show(ctx context.Context, db sqlx.QueryerContext, setting string) string {
	GinkgoHelper()
	var value string
	Expect(sqlx.GetContext(ctx, db, &value, "SHOW "+setting)).To(Succeed())
	return value
}
