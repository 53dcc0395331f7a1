package httpapi_test

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/httpapi"
)

// likeTheProgram opens a pool of n connections with the lock_timeout of the program.
func likeTheProgram(dsn string, n int) *sqlx.DB {
	GinkgoHelper()
	pool := testengines.OpenPostgres(dsn, map[string]string{"lock_timeout": fmt.Sprint(httpapi.LockTimeout.Milliseconds())})
	pool.SetMaxOpenConns(n)
	return pool
}

var _ = Describe("A lock in PostgreSQL", func() {
	It("delays few requests, and no other request", func(ctx SpecContext) {
		const connections, clients = 8, 25
		dsn := suite.LastingPostgresDSN(ctx)
		api := start(ctx, onDatabase(likeTheProgram(dsn, connections)))
		holder, err := db.BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		defer func() { _ = holder.Rollback() }()
		_, err = holder.ExecContext(ctx, `INSERT INTO users (id, email, created_at, updated_at) VALUES (gen_random_uuid(), 'ada@example.com', now(), now())`)
		Expect(err).NotTo(HaveOccurred())

		locked := make(chan response, clients)
		for n := range clients {
			go func() {
				defer GinkgoRecover()
				var headers []string
				if n%2 == 0 {
					headers = []string{fmt.Sprint("Idempotency-Key: ", n)}
				}
				locked <- api.create(ctx, `{"email":"ada@example.com"}`, headers...)
			}()
		}
		Eventually(ctx, waitingForLock).WithArguments(ctx).ShouldNot(BeZero())
		for n := range 50 {
			Expect(api.create(ctx, fmt.Sprintf(`{"email":"other%d@example.com"}`, n)).status).To(Equal(http.StatusCreated))
			Expect(api.get(ctx, "/v1/users").status).To(Equal(http.StatusOK))
		}
		for range clients {
			var answer response
			Eventually(ctx, locked).Should(Receive(&answer))
			expectProblem(answer, http.StatusServiceUnavailable, "locked")
			Expect(answer.header.Get("Retry-After")).To(Equal("1"))
		}
		Expect(holder.Rollback()).To(Succeed())
		Expect(api.create(ctx, `{"email":"ada@example.com"}`).status).To(Equal(http.StatusCreated))
		Expect(string(api.log.Contents())).NotTo(ContainSubstring(`"level":"ERROR"`))
	})

	It("is waited for if it is held only briefly", func(ctx SpecContext) {
		api := start(ctx, onDatabase(likeTheProgram(suite.LastingPostgresDSN(ctx), 8)))
		release := lockUsers(ctx)
		created := make(chan response, 1)
		go func() {
			defer GinkgoRecover()
			created <- api.create(ctx, `{"email":"ada@example.com"}`)
		}()
		// The second transaction waits with a longer lock_timeout.
		Eventually(ctx, func() int {
			return count(ctx, "pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database() AND clock_timestamp() - xact_start > interval '200 ms'")
		}).Should(Equal(1))
		release()
		Eventually(ctx, created).Should(Receive(WithTransform(statusOf, Equal(http.StatusCreated))))
	})

	DescribeTable("causes a conflict that the API resolves by itself, if it can", func(ctx SpecContext, code, trigger string) {
		own := testengines.OpenPostgres(suite.PostgresDSN(ctx), nil)
		own.MustExecContext(ctx, "CREATE SEQUENCE tries")
		own.MustExecContext(ctx, `CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
			BEGIN
				IF NEW.email LIKE 'always%' OR nextval('tries') <= 2 THEN
					RAISE EXCEPTION 'a conflict' USING ERRCODE = '`+code+`';
				END IF;
				RETURN NEW;
			END $$`)
		own.MustExecContext(ctx, "CREATE "+trigger+" FOR EACH ROW EXECUTE FUNCTION conflict()")
		api := start(ctx, onDatabase(own))
		Expect(api.create(ctx, `{"email":"ada@example.com"}`, "Idempotency-Key: k").status).To(Equal(http.StatusCreated))
		refused := api.create(ctx, `{"email":"always@example.com"}`)
		expectProblem(refused, http.StatusServiceUnavailable, "locked")
		Expect(refused.header.Get("Retry-After")).To(Equal("1"))
		var users, events int
		Expect(own.QueryRowContext(ctx, "SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM outbox_events)").Scan(&users, &events)).To(Succeed())
		Expect([]int{users, events}).To(Equal([]int{1, 1}))
	},
		Entry("after a deadlock", "40P01", "TRIGGER conflict BEFORE INSERT ON users"),
		Entry("after a serialization failure", "40001", "TRIGGER conflict BEFORE INSERT ON users"),
		Entry("after a serialization failure at the commit", "40001",
			"CONSTRAINT TRIGGER conflict AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED"),
	)
})

var _ = Describe("An outage of PostgreSQL", func() {
	It("is one error in the log, and credentials that are refused are an outage", func(ctx SpecContext) {
		dsn := suite.PostgresDSN(ctx)
		owner := testengines.OpenPostgres(dsn, nil)
		role := "rotating_" + strings.ReplaceAll(CurrentSpecReport().StartTime.Format("150405.000000"), ".", "_")
		owner.MustExecContext(ctx, "CREATE ROLE "+role+" LOGIN SUPERUSER PASSWORD 'before'")
		DeferCleanup(func(ctx context.Context) { owner.MustExecContext(ctx, "DROP ROLE "+role) })
		address, err := url.Parse(dsn)
		Expect(err).NotTo(HaveOccurred())
		address.User = url.UserPassword(role, "before")
		pool := testengines.OpenPostgres(address.String(), nil)
		pool.SetMaxIdleConns(0)
		api := start(ctx, onDatabase(pool))
		Expect(api.get(ctx, "/v1/users").status).To(Equal(http.StatusOK))

		owner.MustExecContext(ctx, "ALTER ROLE "+role+" PASSWORD 'after'")
		for n := range 20 {
			refused := api.create(ctx, fmt.Sprintf(`{"email":"ada%d@example.com"}`, n))
			expectProblem(refused, http.StatusServiceUnavailable, "unavailable")
			Expect(refused.header.Get("Retry-After")).To(Equal("1"))
		}
		owner.MustExecContext(ctx, "ALTER ROLE "+role+" PASSWORD 'before'")
		Eventually(ctx, func() int { return api.get(ctx, "/v1/users").status }).Should(Equal(http.StatusOK))
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"level":"ERROR","msg":"database unavailable","err":".*password authentication failed`))
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"msg":"database available again".*"failed_requests":20`))
		Expect(strings.Count(string(api.log.Contents()), `"level":"ERROR"`)).To(Equal(1))
	})
})
