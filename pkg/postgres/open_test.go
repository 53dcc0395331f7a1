package postgres_test

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// pairs converts a DSN from a URL to key=value pairs.
func pairs(dsn string) string {
	GinkgoHelper()
	address, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	password, _ := address.User.Password()
	return fmt.Sprintf("host=%s port=%s user=%s password='%s' dbname=%s sslmode=disable",
		address.Hostname(), address.Port(), address.User.Username(), password, strings.TrimPrefix(address.Path, "/"))
}

var _ = Describe("Open", func() {
	It("does not connect", func() {
		open(postgres.Options{DSN: "postgres://nobody@127.0.0.1:1/nothing"})
	})

	It("applies the settings of the session to every connection", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: root, Session: map[string]string{
			"jit": "off", "lock_timeout": "1234ms", "application_name": "it's \"quoted\"",
		}})
		first, err := db.Connx(ctx)
		Expect(err).NotTo(HaveOccurred())
		defer first.Close()
		second, err := db.Connx(ctx)
		Expect(err).NotTo(HaveOccurred())
		defer second.Close()
		for _, connection := range []sqlx.QueryerContext{first, second} {
			Expect(show(ctx, connection, "jit")).To(Equal("off"))
			Expect(show(ctx, connection, "lock_timeout")).To(Equal("1234ms"))
			Expect(show(ctx, connection, "application_name")).To(Equal(`it's "quoted"`))
		}
	})

	It("names a setting that the server refuses", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: root, Session: map[string]string{"no_such_setting": "on"}})
		Expect(db.PingContext(ctx)).To(MatchError(ContainSubstring("no_such_setting")))
	})

	It("limits the number of connections", func() {
		Expect(open(postgres.Options{DSN: root, MaxOpenConns: 3}).Stats().MaxOpenConnections).To(Equal(3))
		Expect(open(postgres.Options{DSN: root}).Stats().MaxOpenConnections).To(Equal(postgres.DefaultMaxOpenConns))
	})

	DescribeTable("accepts both forms of a DSN",
		func(ctx SpecContext, form func(string) string, own func(dsn, name, value string) string) {
			dsn := form(root)
			// With binary_parameters, the server expects a []byte in binary format. For
			// jsonb, the binary format differs from the text format.
			const jsonb = "SELECT $1::jsonb"

			db := open(postgres.Options{DSN: dsn, ApplicationName: "program"})
			Expect(show(ctx, db, "application_name")).To(Equal("program"))
			_, err := db.ExecContext(ctx, jsonb, []byte(`{}`))
			Expect(err).To(MatchError(ContainSubstring("unsupported jsonb version number")))

			By("preferring the parameters of the DSN")
			db = open(postgres.Options{DSN: own(dsn, "application_name", "mine"), ApplicationName: "program"})
			Expect(show(ctx, db, "application_name")).To(Equal("mine"))
			db = open(postgres.Options{DSN: own(dsn, "binary_parameters", "no")})
			_, err = db.ExecContext(ctx, jsonb, []byte(`{}`))
			Expect(err).NotTo(HaveOccurred())
		},
		Entry("a URL", func(dsn string) string { return dsn },
			func(dsn, name, value string) string { return dsn + "&" + name + "=" + value }),
		Entry("key=value pairs", pairs,
			func(dsn, name, value string) string { return dsn + " " + name + "=" + value }),
	)

	DescribeTable("refuses an invalid DSN without quoting it",
		func(dsn, reason string) {
			_, err := postgres.Open(postgres.Options{DSN: dsn})
			Expect(err).To(MatchError(ContainSubstring(reason)))
			Expect(err).NotTo(MatchError(ContainSubstring("s3cret")))
			Expect(postgres.CheckDSN(dsn)).To(MatchError(err.Error()))
		},
		Entry("an empty DSN", " ", "is empty"),
		Entry("a password with a slash", "postgres://user:s3cret/s3cret@host/db", "not a PostgreSQL DSN"),
		Entry("a password with a percent sign", "postgres://user:s3cret%zz@host/db", "not a PostgreSQL DSN"),
		Entry("an invalid port", "postgres://user:s3cret@host:s3cret/db", "not a PostgreSQL DSN"),
		Entry("an unquoted space", "host=h password=s3cret s3cret dbname=d", "not a PostgreSQL DSN"),
		Entry("an open quote", "host=h password='s3cret", "not a PostgreSQL DSN"),
		Entry("another database's URL", "mysql://user:s3cret@host/db", "not a PostgreSQL DSN"),
		Entry("a URL with one slash", "postgres:/user:s3cret@host/db?sslmode=disable", "not a PostgreSQL DSN"),
		Entry("an invalid query", "postgres://user:s3cret@host/db?a=%zz", "not a PostgreSQL DSN"),
		Entry("an unknown sslmode", "postgres://user:s3cret@host/db?sslmode=perhaps", `"sslmode": "perhaps" is not supported`),
	)
})
