package postgres_test

import (
	"net/url"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/checkup"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("Inspect", func() {
	It("describes the server", func(ctx SpecContext) {
		dsn := suite.PostgresDSN(ctx)
		address, err := url.Parse(dsn)
		Expect(err).NotTo(HaveOccurred())
		Expect(postgres.Inspect(ctx, open(postgres.Options{DSN: dsn}).DB, dsn)).To(And(
			HaveField("Database", address.Path[1:]),
			HaveField("Role", address.User.Username()),
			HaveField("Version", MatchRegexp(`^[1-9][0-9]\.`)),
			HaveField("Address", HaveSuffix(":"+address.Port())),
			HaveField("TLS", false),
		))
	})

	DescribeTable("names the server and the remedy, and no secret, if it cannot connect:",
		func(ctx SpecContext, dsn, problem, remedy string) {
			_, err := postgres.Inspect(ctx, open(postgres.Options{DSN: dsn}).DB, dsn)
			Expect(err).To(MatchError(Not(ContainSubstring("s3cret"))))
			var explained checkup.Remediable
			Expect(err).To(BeAssignableToTypeOf(&checkup.ProblemError{}))
			explained, _ = err.(checkup.Remediable) //nolint:errorlint // its type was checked
			found, advice := explained.Explain()
			Expect(found).To(HavePrefix(problem))
			Expect(advice).To(Equal(remedy))
		},
		Entry("one host", "postgres://u:s3cret@127.0.0.1:1/d", "postgresql at 127.0.0.1:1: ",
			"start PostgreSQL, or correct the host and the port in postgres.dsn"),
		Entry("several hosts", "host=127.0.0.1,::1 port=1,2 user=u password=s3cret", "postgresql at 127.0.0.1:1, [::1]:2: ",
			"start PostgreSQL, or correct the host and the port in postgres.dsn"),
		Entry("a socket", "postgres://u:s3cret@%2Fnowhere:1/d", "postgresql at /nowhere/.s.PGSQL.1: ",
			"start PostgreSQL, or correct the host and the port in postgres.dsn"),
	)
})
