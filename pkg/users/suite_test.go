package users_test

import (
	"context"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/users"
	"github.com/diehard-outbox/diehard/test/engines"
)

func TestUsers(t *testing.T) {
	RegisterFailHandler(Fail)
	EnforceDefaultTimeoutsWhenUsingContexts()
	SetDefaultEventuallyTimeout(10 * time.Second)
	RunSpecs(t, "users")
}

var suite = engines.Start(engines.Options{})

// The database, empty for each spec.
var (
	dsn string
	db  *sqlx.DB
)

var _ = BeforeEach(func(ctx SpecContext) {
	dsn = suite.LastingPostgresDSN(ctx)
	db = engines.OpenPostgres(dsn, nil)
})

func newService(db *sqlx.DB) *users.Service {
	return users.NewService(users.Options{
		DB:        db,
		Publisher: outbox.NewPublisher(outbox.PublisherOptions{Environment: "Test"}),
	})
}

// count returns what a query that counts returns.
func count(ctx context.Context, query string) int {
	GinkgoHelper()
	var n int
	Expect(db.GetContext(ctx, &n, query)).To(Succeed())
	return n
}

func countUsers(ctx context.Context) int  { return count(ctx, "SELECT count(*) FROM users") }
func countEvents(ctx context.Context) int { return count(ctx, "SELECT count(*) FROM outbox_events") }
