package clickhouse_test

import (
	"net/url"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

var _ = Describe("A DSN", func() {
	It("for the native protocol with the port of HTTP is refused with the port's protocol", func(ctx SpecContext) {
		host := mustParse(servers("http")).Host
		unfit := misconfigured(open(with(servers("native"), func(u *url.URL) { u.Host = host }, parameter("dial_timeout", "1s"))).Check(ctx))
		Expect(unfit.Problem).To(Equal("the clickhouse dsn requires the native protocol, and the port of " + host + " speaks HTTP"))
		Expect(unfit.Remedy).To(HavePrefix("begin the dsn with http://, or change the port"))
	})

	It("for HTTP with the port of the native protocol is refused with the port's protocol", func(ctx SpecContext) {
		host := mustParse(servers("native")).Host
		unfit := misconfigured(open(with(servers("http"), func(u *url.URL) { u.Host = host })).Check(ctx))
		Expect(unfit.Problem).To(Equal("the clickhouse dsn requires HTTP, and the port of " + host + " speaks the native protocol"))
		Expect(unfit.Remedy).To(HavePrefix("begin the dsn with clickhouse://, or change the port"))
	})

	for _, protocol := range []string{"native", "http"} {
		It("with TLS for a server without TLS is refused over "+protocol, func(ctx SpecContext) {
			dsn := with(servers(protocol), parameter("secure", "true"), func(u *url.URL) { u.Scheme = strings.Replace(u.Scheme, "http", "https", 1) })
			unfit := misconfigured(open(dsn).Check(ctx))
			Expect(unfit.Problem).To(ContainSubstring("with TLS, and the port of "))
		})
	}

	DescribeTable("with a slash in the name of the database is refused", func(path string) {
		err := clickhouse.Options{DSN: with(servers("native"), func(u *url.URL) { u.Path = path })}.Check()
		Expect(err).To(MatchError(ContainSubstring("the path is %q, but must be the name of a database after one slash", path)))
	},
		Entry("at its end", "/default/"),
		Entry("at its beginning", "//default"),
		Entry("within the name", "/analytics/events"),
	)
})
