package postgres_test

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("A file with the password", func() {
	const awkward = `it's a "p\ss&%25 @:/?#word`

	var (
		dsn, role, path string
		superuser       *sqlx.DB
	)

	// rotate gives the role another password, and writes it into the file.
	rotate := func(password string) {
		GinkgoHelper()
		superuser.MustExec("ALTER ROLE " + role + " PASSWORD " + pq.QuoteLiteral(password))
		Expect(os.WriteFile(path, []byte(password+"\n"), 0o600)).To(Succeed())
	}

	BeforeEach(func(ctx SpecContext) {
		own := newDatabase(ctx)
		superuser = open(postgres.Options{DSN: own})
		role = fmt.Sprintf("rotated_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
		superuser.MustExec("CREATE ROLE " + role + " LOGIN")
		DeferCleanup(func() { superuser.MustExec("DROP OWNED BY " + role + "; DROP ROLE " + role) })
		u, err := url.Parse(own)
		Expect(err).NotTo(HaveOccurred())
		u.User = url.UserPassword(role, "outdated")
		dsn, path = u.String(), filepath.Join(GinkgoT().TempDir(), "password")
		rotate(awkward)
	})

	DescribeTable("overrides the password of the DSN, whatever it contains", func(ctx SpecContext, form func(dsn string) string) {
		db := open(postgres.Options{DSN: form(dsn), PasswordFile: path})
		var user string
		Expect(db.GetContext(ctx, &user, "SELECT session_user")).To(Succeed())
		Expect(user).To(Equal(role))
	},
		Entry("a URL", func(dsn string) string { return dsn }),
		Entry("a URL with another password as a parameter", func(dsn string) string {
			u, err := url.Parse(dsn)
			Expect(err).NotTo(HaveOccurred())
			query := u.Query()
			query.Set("password", "zzz outdated")
			u.RawQuery = query.Encode()
			return u.String()
		}),
		Entry("a URL with a password but no user in front of the host", func(dsn string) string {
			u, err := url.Parse(dsn)
			Expect(err).NotTo(HaveOccurred())
			query := u.Query()
			query.Set("user", u.User.Username())
			u.User, u.RawQuery = url.UserPassword("", "zzz outdated"), query.Encode()
			return u.String()
		}),
		Entry("a URL with the user as a parameter", func(dsn string) string {
			u, err := url.Parse(dsn)
			Expect(err).NotTo(HaveOccurred())
			query := u.Query()
			query.Set("user", u.User.Username())
			u.User, u.RawQuery = nil, query.Encode()
			return u.String()
		}),
		Entry("pairs", func(dsn string) string {
			u, err := url.Parse(dsn)
			Expect(err).NotTo(HaveOccurred())
			return fmt.Sprintf("host=%s port=%s user=%s password=outdated dbname=%s sslmode=disable", u.Hostname(), u.Port(), u.User.Username(), u.Path[1:])
		}),
	)

	It("is read for each connection", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: dsn, PasswordFile: path})
		first, err := db.Connx(ctx)
		Expect(err).NotTo(HaveOccurred())
		defer first.Close()
		rotate("the second one")
		second, err := db.Connx(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(second.Close()).To(Succeed())
		Expect(first.PingContext(ctx)).To(Succeed(), "an open connection stays open")

		superuser.MustExec("ALTER ROLE " + role + " PASSWORD 'not in the file yet'")
		db.SetMaxIdleConns(0)
		Expect(db.PingContext(ctx)).To(MatchError(ContainSubstring("password authentication failed")))
	})

	It("is named if it has no password", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: dsn, PasswordFile: path})
		Expect(os.WriteFile(path, []byte("\n"), 0o600)).To(Succeed())
		Expect(db.PingContext(ctx)).To(MatchError("connect to postgresql: read the password: " + path + " is empty"))
		Expect(os.Remove(path)).To(Succeed())
		Expect(db.PingContext(ctx)).To(MatchError(os.ErrNotExist))
		_, err := postgres.Inspect(ctx, db.DB, dsn)
		Expect(err).To(HaveField("Remedy", "write the password into the file, or correct postgres.password_file"))
	})

	It("is read again by a listener that lost its connection", func(ctx SpecContext) {
		log, lines := logs()
		Expect(os.Remove(path)).To(Succeed())
		wake, err := postgres.Listen(ctx, postgres.ListenOptions{DSN: dsn, PasswordFile: path, ApplicationName: "rotated", Channels: []string{"work"}, Log: log})
		Expect(err).NotTo(HaveOccurred())
		Eventually(lines).Should(gbytes.Say("postgresql notifications unavailable.*no such file"))
		rotate("first")
		Eventually(wake["work"]).Should(Receive())
		Eventually(lines).Should(gbytes.Say("listening again"))

		rotate("second")
		superuser.MustExec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", role)
		Eventually(lines).Should(gbytes.Say("postgresql notifications unavailable"))
		Eventually(wake["work"]).Should(Receive())
		Eventually(lines).Should(gbytes.Say("listening again"))
		superuser.MustExec("NOTIFY work")
		Eventually(wake["work"]).Should(Receive())
	})
})
