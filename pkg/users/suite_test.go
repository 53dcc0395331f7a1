package users_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

func TestUsers(t *testing.T) {
	RegisterFailHandler(Fail)
	EnforceDefaultTimeoutsWhenUsingContexts()
	SetDefaultEventuallyTimeout(10 * time.Second)
	RunSpecs(t, "users")
}

var (
	server *devstack.Postgres // in the first process only
	dsn    string             // this process's database
	db     *sqlx.DB
)

// One server for all processes, a database for each.
var _ = SynchronizedBeforeSuite(func(ctx SpecContext) []byte {
	var err error
	server, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{})
	Expect(err).NotTo(HaveOccurred())
	config, _ := GinkgoConfiguration()
	var dsns []string
	for process := range config.ParallelTotal {
		created, err := server.CreateDatabase(ctx, fmt.Sprintf("users_%d", process+1))
		Expect(err).NotTo(HaveOccurred())
		dsns = append(dsns, created)
	}
	encoded, err := json.Marshal(dsns)
	Expect(err).NotTo(HaveOccurred())
	return encoded
}, func(ctx SpecContext, encoded []byte) {
	var dsns []string
	Expect(json.Unmarshal(encoded, &dsns)).To(Succeed())
	dsn = dsns[GinkgoParallelProcess()-1]
	db = open(dsn)
	Expect(postgres.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
})

var _ = SynchronizedAfterSuite(func() {
	if db != nil {
		Expect(db.Close()).To(Succeed())
	}
}, func() {
	if server != nil {
		Expect(server.Stop()).To(Succeed())
	}
})

var _ = BeforeEach(func(ctx SpecContext) {
	_, err := db.ExecContext(ctx, "TRUNCATE users, outbox_events")
	Expect(err).NotTo(HaveOccurred())
})

func open(dsn string) *sqlx.DB {
	GinkgoHelper()
	opened, err := postgres.Open(postgres.Options{DSN: dsn, MaxOpenConns: 16})
	Expect(err).NotTo(HaveOccurred())
	return opened
}

func newService(db *sqlx.DB) *users.Service {
	return users.NewService(users.Options{
		DB:        db,
		Publisher: outbox.NewPublisher(outbox.PublisherOptions{Environment: "Test"}),
	})
}

// count returns what a query that counts returns.
func count(ctx context.Context, query string, args ...any) int {
	GinkgoHelper()
	var n int
	Expect(db.GetContext(ctx, &n, query, args...)).To(Succeed())
	return n
}

func countUsers(ctx context.Context) int  { return count(ctx, "SELECT count(*) FROM users") }
func countEvents(ctx context.Context) int { return count(ctx, "SELECT count(*) FROM outbox_events") }
