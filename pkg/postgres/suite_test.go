package postgres_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

func TestPostgres(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "postgres")
}

var (
	server *devstack.Postgres // in the first process only
	root   string             // the DSN of a database that nobody changes
)

var _ = SynchronizedBeforeSuite(func(ctx SpecContext) []byte {
	var err error
	server, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{})
	Expect(err).NotTo(HaveOccurred())
	return []byte(server.DSN("postgres"))
}, func(dsn []byte) {
	root = string(dsn)
})

var _ = SynchronizedAfterSuite(func() {}, func() {
	if server != nil {
		Expect(server.Stop()).To(Succeed())
	}
})

var databases int

// newDatabase creates a database for the spec and returns its DSN.
func newDatabase(ctx context.Context) string {
	GinkgoHelper()
	databases++
	name := fmt.Sprintf("spec_%d_%d", GinkgoParallelProcess(), databases)
	_, err := open(postgres.Options{DSN: root}).ExecContext(ctx, "CREATE DATABASE "+name)
	Expect(err).NotTo(HaveOccurred())
	address, err := url.Parse(root)
	Expect(err).NotTo(HaveOccurred())
	address.Path = name
	return address.String()
}

// open opens a pool until the spec's end.
func open(o postgres.Options) *sqlx.DB {
	GinkgoHelper()
	db, err := postgres.Open(o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(db.Close)
	return db
}

// logs returns a logger and what it writes.
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
