package users_test

import (
	"context"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
)

func TestUsers(t *testing.T) {
	RegisterFailHandler(Fail)
	EnforceDefaultTimeoutsWhenUsingContexts()
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "users")
}

var suite = testengines.Start(testengines.Options{Postgres: true})

// A database that is empty at the start of each spec.
var (
	dsn string
	db  *sqlx.DB
)

var _ = BeforeEach(func(ctx SpecContext) {
	dsn = suite.LastingPostgresDSN(ctx)
	db = testengines.OpenPostgres(dsn, nil)
})

// service runs each call in its own transaction.
type service struct {
	*users.Service

	db *sqlx.DB
}

func newService(db *sqlx.DB) service {
	return newServiceWith(db, outbox.PublisherOptions{Environment: "Test"})
}

func newServiceWith(db *sqlx.DB, o outbox.PublisherOptions) service {
	return service{Service: users.NewService(users.Options{DB: db, Publisher: outbox.NewPublisher(o)}), db: db}
}

func (s service) Create(ctx context.Context, n users.NewUser) (created users.User, err error) {
	err = postgres.InTx(ctx, s.db, func(tx *sqlx.Tx) (err error) {
		created, err = s.Service.Create(ctx, tx, n)
		return err
	})
	return created, err
}

// newUser returns a user with these values.
func newUser(email, firstName, lastName string) users.NewUser {
	GinkgoHelper()
	n, err := users.ParseNewUser(email, firstName, lastName)
	Expect(err).NotTo(HaveOccurred())
	return n
}

// addressed returns a user with an address and empty names.
func addressed(email string) users.NewUser {
	GinkgoHelper()
	return newUser(email, "", "")
}

// listParams returns the parameters of a list.
func listParams(email string, limit int, cursor string) users.ListParams {
	GinkgoHelper()
	params, err := users.ParseListParams(email, limit, cursor)
	Expect(err).NotTo(HaveOccurred())
	return params
}

// count returns the result of a count query.
func count(ctx context.Context, query string) int {
	GinkgoHelper()
	var n int
	Expect(db.GetContext(ctx, &n, query)).To(Succeed())
	return n
}

func countUsers(ctx context.Context) int  { return count(ctx, "SELECT count(*) FROM users") }
func countEvents(ctx context.Context) int { return count(ctx, "SELECT count(*) FROM outbox_events") }
