package postgres_test

import (
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

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

	It("sets a setting that only newer servers know, if the server knows it", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: root, Session: map[string]string{"transaction_timeout": "77s"}})
		var known bool
		Expect(db.GetContext(ctx, &known, "SELECT current_setting('server_version_num')::int >= 170000")).To(Succeed())
		if known {
			Expect(show(ctx, db, "transaction_timeout")).To(Equal("77s"))
		}
	})

	It("sets the settings again in each transaction behind a pooler", func(ctx SpecContext) {
		o := postgres.Options{
			DSN: root, MaxOpenConns: 1,
			Session: map[string]string{"synchronous_commit": "on", "lock_timeout": "1234ms", "transaction_timeout": "0"},
		}
		inTransaction := func(db *sqlx.DB) (value string) {
			GinkgoHelper()
			db.MustExecContext(ctx, "SET synchronous_commit = off") // as another client of the same session
			Expect(postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
				value = show(ctx, tx, "synchronous_commit")
				return nil
			})).To(Succeed())
			return value
		}
		Expect(inTransaction(open(o))).To(Equal("off"), "nobody shares the session")
		o.DSN = startPooler(root)
		pooled := open(o)
		Expect(inTransaction(pooled)).To(Equal("on"))
		Expect(show(ctx, pooled, "synchronous_commit")).To(Equal("off"), "the session of the other client is unchanged")
	})

	It("discards a connection behind a pooler if a transaction fails to set the settings", func(ctx SpecContext) {
		role := fmt.Sprintf("fleeting_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
		owner := open(postgres.Options{DSN: root})
		owner.MustExecContext(ctx, "CREATE ROLE "+role)
		DeferCleanup(func(ctx SpecContext) { owner.MustExecContext(ctx, "DROP ROLE "+role) })
		db := open(postgres.Options{DSN: startPooler(root), MaxOpenConns: 1, Session: map[string]string{"role": role}})
		begin := func() error { return postgres.InTx(ctx, db, func(*sqlx.Tx) error { return nil }) }
		Expect(begin()).To(Succeed())
		db.MustExecContext(ctx, "RESET ROLE")
		owner.MustExecContext(ctx, "DROP ROLE "+role)
		Expect(begin()).To(MatchError(ContainSubstring(role)))
		owner.MustExecContext(ctx, "CREATE ROLE "+role)
		Expect(begin()).To(Succeed())
	})

	It("ignores parameters of other drivers, and logs their names", func(ctx SpecContext) {
		for _, dsn := range []string{
			root + "&pgbouncer=true&channel_binding=prefer&pool_max_conns=7&application_name=mine",
			pairs(root) + " pgbouncer = true channel_binding='prefer' pool_max_conns=7 application_name=mine",
		} {
			log, lines := logs()
			db := open(postgres.Options{DSN: dsn, Log: log})
			Expect(lines).To(gbytes.Say(`parameters of the postgresql DSN ignored" parameters="\[channel_binding pgbouncer pool_max_conns\]"`))
			Expect(show(ctx, db, "application_name")).To(Equal("mine"))
			open(postgres.Options{DSN: dsn}) // no logger
		}
	})

	Describe("with several hosts", func() {
		var first, second string // the forms of a DSN with a dead host and the server

		BeforeEach(func(ctx SpecContext) {
			dsn := newDatabase(ctx)
			address, err := url.Parse(dsn)
			Expect(err).NotTo(HaveOccurred())
			first = strings.Replace(dsn, address.Host, "127.0.0.1:1,"+address.Host, 1)
			second = strings.Replace(strings.Replace(pairs(dsn), "host=", "host=127.0.0.1,", 1), "port=", "port=1,", 1)
		})

		It("connects to the first host that responds", func(ctx SpecContext) {
			Expect(open(postgres.Options{DSN: first}).PingContext(ctx)).To(Succeed())
			Expect(open(postgres.Options{DSN: second}).PingContext(ctx)).To(Succeed())
		})

		It("connects only to a server that accepts writes, unless the DSN says otherwise", func(ctx SpecContext) {
			open(postgres.Options{DSN: first}).MustExecContext(ctx,
				"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$")
			Expect(open(postgres.Options{DSN: first}).PingContext(ctx)).To(MatchError(ContainSubstring("session is read-only")))
			Expect(open(postgres.Options{DSN: second}).PingContext(ctx)).To(MatchError(ContainSubstring("session is read-only")))
			Expect(open(postgres.Options{DSN: first + "&target_session_attrs=any"}).PingContext(ctx)).To(Succeed())
		})
	})

	DescribeTable("accepts the DSN of a provider",
		func(dsn string) { Expect(postgres.CheckDSN(dsn)).To(Succeed()) },
		Entry("with the certificates of the system", "postgres://u:p@db.example.com/d?sslrootcert=system"),
		Entry("with several IPv6 addresses", "postgres://u:p@[::1]:5432,[::2],h/d?sslmode=require"),
		Entry("with several hosts and one port", "postgres://u:p@h1,h2/d?port=6432"),
		Entry("with several hosts and a password with a comma", "postgres://u:a%2Cb@h1:1,h2:2/d"),
		Entry("with the folder of a socket", "postgres://u:p@%2Fvar%2Frun/d"),
		Entry("with a password with a comma", "postgres://u:a,b@h1:1/d"),
		Entry("with an option of Neon", "postgres://u:p@h/d?options=endpoint%3Dep-1"),
		Entry("with parameters of Supabase and Vercel", "postgres://u:p@h:6543/d?pgbouncer=true&connection_limit=1&supa=base-pooler.x"),
	)

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
		Entry("channel binding", "postgres://u:s3cret@h/d?sslmode=require&channel_binding=require",
			"the parameter channel_binding is not supported: remove it and set sslmode=verify-full"),
		Entry("a schema", "postgres://u:s3cret@h/d?schema=public", "the parameter schema is not supported: remove it and set postgres.schema"),
		Entry("a schema in pairs", "host=h password=s3cret schema=public", "the parameter schema is not supported"),
		Entry("TLS of another driver", "postgres://u:s3cret@h/d?ssl=true", "the parameter ssl is not supported: use sslmode"),
		Entry("the certificates of the system without verification", "postgres://u:s3cret@h/d?sslmode=require&sslrootcert=system",
			`weak sslmode "require" may not be used with sslrootcert=system`),
		Entry("standbys", "postgres://u:s3cret@h1,h2/d?target_session_attrs=prefer-standby", "selects a server that accepts no writes"),
		Entry("a port in a host of pairs", "host=h1:5432,h2:5432 password=s3cret", "a host contains a colon"),
		Entry("an invalid port of several", "postgres://u:s3cret@h1:1,h2:x/d", "not a PostgreSQL DSN"),
		Entry("more ports than hosts", "postgres://u:s3cret@h1,h2/d?port=1,2,3", "could not match 3 port numbers to 2 hosts"),
		Entry("an unknown sslmode", "postgres://user:s3cret@host/db?sslmode=perhaps", `"sslmode": "perhaps" is not supported`),
	)
})
