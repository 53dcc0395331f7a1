package postgres_test

import (
	"context"
	"errors"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/test/faults"
)

var _ = Describe("InStatement", func() {
	const insert = "INSERT INTO things VALUES (1) RETURNING id"

	var (
		proxy *faults.Proxy
		db    *sqlx.DB // through the proxy
		there *sqlx.DB
	)

	BeforeEach(func(ctx SpecContext) {
		dsn := newDatabase(ctx)
		there = open(postgres.Options{DSN: dsn})
		_, err := there.ExecContext(ctx, "CREATE TABLE things (id int PRIMARY KEY)")
		Expect(err).NotTo(HaveOccurred())
		var through string
		proxy, through = faults.StartProxyTo(dsn)
		db = open(postgres.Options{DSN: through, MaxOpenConns: 1})
		Expect(db.PingContext(ctx)).To(Succeed())
	})

	// run runs the statement, and reads its rows.
	run := func(ctx context.Context, statement string) error {
		return postgres.InStatement(ctx, db, func(q *postgres.Statement) error {
			rows, err := q.QueryContext(ctx, statement)
			if err != nil {
				return err
			}
			defer rows.Close()
			for rows.Next() {
			}
			return rows.Err()
		})
	}
	count := func(ctx context.Context) (n int, err error) {
		return n, there.GetContext(ctx, &n, "SELECT count(*) FROM things")
	}

	It("commits the statement", func(ctx SpecContext) {
		Expect(run(ctx, insert)).To(Succeed())
		Expect(count(ctx)).To(Equal(1))
	})

	It("returns what the server refuses as it is, also at the commit", func(ctx SpecContext) {
		_, err := there.ExecContext(ctx, `
			CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'on purpose'; END $$;
			CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON things
			DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`)
		Expect(err).NotTo(HaveOccurred())
		for _, statement := range []string{insert, "SELECT 1/0"} {
			err := run(ctx, statement)
			Expect(err).To(HaveOccurred())
			Expect(err).NotTo(MatchError(postgres.ErrOutcomeUnknown))
		}
		Expect(count(ctx)).To(BeZero())
	})

	It("returns an error of the caller's own as it is, if nothing was sent", func(ctx SpecContext) {
		failure := errors.New("on purpose")
		Expect(postgres.InStatement(ctx, db, func(*postgres.Statement) error { return failure })).To(BeIdenticalTo(failure))
	})

	It("does not claim to know where the server's answer is lost, and does not send again", SpecTimeout(time.Minute), func(ctx SpecContext) {
		proxy.HoldFrom(faults.Answers, insert)
		failed := make(chan error, 1)
		go func() { failed <- run(ctx, insert) }()
		Eventually(ctx, proxy.Held).ShouldNot(BeZero())
		proxy.Reset()
		Eventually(ctx, failed).Should(Receive(MatchError(postgres.ErrOutcomeUnknown)))
		Expect(count(ctx)).To(Equal(1))
	})

	It("knows that nothing was sent where there is no connection", func(ctx SpecContext) {
		proxy.Down()
		err := run(ctx, insert)
		Expect(postgres.IsUnavailable(err)).To(BeTrue(), "%v", err)
		Expect(err).NotTo(MatchError(postgres.ErrOutcomeUnknown))
	})

	It("does not take an idle connection that the server has ended", func(ctx SpecContext) {
		var backend int
		Expect(db.GetContext(ctx, &backend, "SELECT pg_backend_pid()")).To(Succeed())
		_, err := there.ExecContext(ctx, "SELECT pg_terminate_backend($1, 10000)", backend)
		Expect(err).NotTo(HaveOccurred())
		Eventually(ctx, proxy.Connections).Should(BeZero())
		Expect(run(ctx, insert)).To(Succeed())
		Expect(count(ctx)).To(Equal(1))
	})
})
