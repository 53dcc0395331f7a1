package httpapi_test

import (
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
)

var _ = Describe("A rate limit", func() {
	// slow allows one request in 1,000 seconds.
	const slow = 0.001

	expectLimited := func(a response, policy string) {
		GinkgoHelper()
		expectProblem(a, http.StatusTooManyRequests, "rate-limited")
		Expect(a.header.Get("Ratelimit-Policy")).To(Equal(`"` + policy + `";q=1;w=1000`))
		Expect(a.header.Get("Ratelimit")).To(MatchRegexp(`^"` + policy + `";r=0;t=(9..|1000)$`))
		Expect(strconv.Atoi(a.header.Get("Retry-After"))).To(BeNumerically("~", 950, 50))
	}

	It("is off by default", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-a"))
		for range 50 {
			response := api.get(ctx, "/v1/users", "Authorization: Bearer secret-a")
			Expect(response.status).To(Equal(http.StatusOK))
			Expect(response.header).NotTo(HaveKey("Ratelimit"))
		}
	})

	It("limits each key separately", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-a", "secret-b"), func(o *httpapi.Options) { o.RatePerKey = slow })
		first := api.get(ctx, "/v1/users", "Authorization: Bearer secret-a")
		Expect(first.status).To(Equal(http.StatusOK))
		Expect(first.header.Get("Ratelimit")).To(MatchRegexp(`^"key";r=0;t=(9..|1000)$`))
		expectLimited(api.get(ctx, "/v1/users", "Authorization: Bearer secret-a"), "key")
		Expect(api.get(ctx, "/v1/users", "Authorization: Bearer secret-c").status).To(Equal(http.StatusUnauthorized))
		Expect(api.get(ctx, "/v1/users", "Authorization: Bearer secret-b").status).To(Equal(http.StatusOK))
	})

	It("allows a burst of ten times the rate", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-a"), func(o *httpapi.Options) { o.RatePerKey = 1000 })
		response := api.get(ctx, "/v1/users", "Authorization: Bearer secret-a")
		Expect(response.header.Get("Ratelimit-Policy")).To(Equal(`"key";q=10000;w=10`))
		Expect(response.header.Get("Ratelimit")).To(Equal(`"key";r=9999;t=1`))
	})

	It("limits the requests of an address, including requests without a key", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-a"), func(o *httpapi.Options) { o.RatePerAddress = slow })
		Expect(api.get(ctx, "/v1/users").status).To(Equal(http.StatusUnauthorized))
		expectLimited(api.get(ctx, "/v1/users", "Authorization: Bearer secret-a"), "address")
		// The client cannot claim another address.
		expectLimited(api.get(ctx, "/v1/users", "X-Forwarded-For: 192.0.2.1"), "address")
		expectLimited(api.get(ctx, "/v1/users", "X-Real-IP: 192.0.2.1"), "address")
		expectLimited(api.get(ctx, "/nothing"), "address")
		expectLimited(api.get(ctx, "/docs"), "address")
	})

	It("trusts only the address that a trusted proxy has added", func(ctx SpecContext) {
		api := start(ctx, func(o *httpapi.Options) {
			o.RatePerAddress = slow
			o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("192.0.2.0/24")}
		})
		from := func(addresses string) response { return api.get(ctx, "/v1/users", "X-Forwarded-For: "+addresses) }
		Expect(from("198.51.100.1").status).To(Equal(http.StatusOK))
		expectLimited(from("198.51.100.1"), "address")
		expectLimited(from("203.0.113.9, 198.51.100.1"), "address")
		expectLimited(from("198.51.100.1, 192.0.2.7"), "address")
		Expect(from("198.51.100.1, 10.0.0.1").status).To(Equal(http.StatusOK), "a private network is not a trusted proxy")
		Expect(from("198.51.100.1, ::1").status).To(Equal(http.StatusOK), "a loopback address is not a trusted proxy")
		Expect(from("198.51.100.2").status).To(Equal(http.StatusOK))
		Expect(from("2001:db8:1:2::1").status).To(Equal(http.StatusOK))
		expectLimited(from("2001:db8:1:2:ffff::2"), "address")
		Expect(from("2001:db8:1:3::1").status).To(Equal(http.StatusOK))
		expectLimited(from("198.51.100.1:4711"), "address")
		expectLimited(from("[2001:db8:1:2::5]:4711, 192.0.2.7:80"), "address")
		Expect(from("198.51.100.3:4711").status).To(Equal(http.StatusOK))
	})

	It("limits a /48 network of IPv6 to 16 times the limit of an address", func(ctx SpecContext) {
		api := start(ctx, func(o *httpapi.Options) {
			o.RatePerAddress = slow
			o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		})
		from := func(address string) response { return api.get(ctx, "/v1/users", "X-Forwarded-For: "+address) }
		for subnet := range 16 {
			Expect(from("2001:db8:1:" + strconv.Itoa(subnet) + "::1").status).To(Equal(http.StatusOK))
		}
		refused := from("2001:db8:1:ff::1")
		expectProblem(refused, http.StatusTooManyRequests, "rate-limited")
		Expect(refused.header.Values("Ratelimit-Policy")).To(ContainElement(`"network";q=16;w=1000`))
		Expect(from("2001:db8:2:1::1").status).To(Equal(http.StatusOK))
	})
})

// bodyBytes returns the gauge of the bytes of all bodies.
func bodyBytes(a *api) float64 {
	GinkgoHelper()
	families, err := a.registry.Gather()
	Expect(err).NotTo(HaveOccurred())
	for _, family := range families {
		if family.GetName() == "diehard_http_body_bytes" {
			return family.GetMetric()[0].GetGauge().GetValue()
		}
	}
	Fail("the gauge is missing")
	return 0
}

var _ = Describe("An overloaded API", func() {
	It("sheds requests above MaxConcurrent that wait for too long, and finishes the others", func(ctx SpecContext) {
		release := lockUsers(ctx)
		api := start(ctx, func(o *httpapi.Options) { o.MaxConcurrent = 2 })
		working := make(chan response, 2)
		for _, name := range []string{"a", "b"} {
			go func() {
				defer GinkgoRecover()
				// Batches do not use group commit.
				working <- api.do(ctx, http.MethodPost, "/v1/users/batch", strings.NewReader(`{"data":[{"email":"`+name+`@example.com"}]}`))
			}()
		}
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(2))
		for _, refused := range []response{
			api.create(ctx, `{"email":"c@example.com"}`), api.get(ctx, "/v1/users"),
			api.get(ctx, "/v1/users/0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11"),
		} {
			expectProblem(refused, http.StatusServiceUnavailable, "overloaded")
			Expect(refused.header.Get("Retry-After")).To(Equal("1"))
		}
		// The API still serves a request that does not need the database.
		Expect(api.create(ctx, `{"email":"c"}`).status).To(Equal(http.StatusUnprocessableEntity))
		release()
		for range 2 {
			var done response
			Eventually(ctx, working).Should(Receive(&done))
			Expect(done.status).To(Equal(http.StatusOK))
		}
		Expect(api.get(ctx, "/v1/users").status).To(Equal(http.StatusOK))
	})

	It("sheds large bodies above the budget, and still accepts small ones", func(ctx SpecContext) {
		const large = 3 * input.MinBudget / 4
		api := start(ctx, func(o *httpapi.Options) {
			o.MaxBodyBytes, o.BodyBudget = large, input.MinBudget
			// The body is incomplete until the other requests have their responses.
			o.ReadTimeout, o.RequestTimeout, o.WriteTimeout = 5*time.Minute, 5*time.Minute, 6*time.Minute
		})
		body := `{"event_type":"a","event_context":"` + strings.Repeat("x", large-40) + `"}`
		reader, writer := io.Pipe()
		held := make(chan response, 1)
		go func() {
			defer GinkgoRecover()
			request, err := http.NewRequestWithContext(ctx, http.MethodPost, api.url+"/v1/events", reader)
			Expect(err).NotTo(HaveOccurred())
			request.Header.Set("Content-Type", "application/json")
			answer, err := http.DefaultClient.Do(request)
			Expect(err).NotTo(HaveOccurred())
			Expect(answer.Body.Close()).To(Succeed())
			held <- response{status: answer.StatusCode}
		}()
		_, err := io.WriteString(writer, body[:large-100])
		Expect(err).NotTo(HaveOccurred())
		Eventually(ctx, bodyBytes).WithArguments(api).Should(BeNumerically(">=", large-1<<17))

		refused := api.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body))
		expectProblem(refused, http.StatusServiceUnavailable, "overloaded")
		Expect(refused.header.Get("Retry-After")).To(Equal("1"))
		Expect(api.create(ctx, `{"email":"ada@example.com"}`).status).To(Equal(http.StatusCreated))

		_, err = io.WriteString(writer, body[large-100:])
		Expect(err).NotTo(HaveOccurred())
		Expect(writer.Close()).To(Succeed())
		Eventually(ctx, held).Should(Receive(WithTransform(statusOf, Equal(http.StatusAccepted))))
		Eventually(ctx, bodyBytes).WithArguments(api).Should(BeZero())
		Expect(api.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body)).status).To(Equal(http.StatusAccepted))
	})

	It("refuses requests at once after it has noticed that PostgreSQL does not respond", func(ctx SpecContext) {
		proxy, dsn := faults.StartProxyTo(suite.LastingPostgresDSN(ctx))
		unresponsiveDB := testengines.OpenPostgres(dsn, nil)
		api := start(ctx, onDatabase(unresponsiveDB), func(o *httpapi.Options) { o.RequestTimeout = 1500 * time.Millisecond })
		Expect(api.get(ctx, "/v1/users").status).To(Equal(http.StatusOK))
		proxy.Vanish()
		expectProblem(api.get(ctx, "/v1/users"), http.StatusGatewayTimeout, "timeout")
		// The first request waited for its timeout. The API refuses the other requests
		// at once. If they waited, they would get a timeout, too.
		for range 20 {
			expectProblem(api.get(ctx, "/v1/users"), http.StatusServiceUnavailable, "unavailable")
			expectProblem(api.create(ctx, `{"email":"ada@example.com"}`), http.StatusServiceUnavailable, "unavailable")
		}
		proxy.Return()
		Eventually(ctx, func() int { return api.get(ctx, "/v1/users").status }).WithTimeout(time.Minute).Should(Equal(http.StatusOK))
		Expect(api.create(ctx, `{"email":"ada@example.com"}`).status).To(Equal(http.StatusCreated))
		Expect(strings.Count(string(api.log.Contents()), `"level":"ERROR"`)).To(Equal(1), "one error for the outage")
		Expect(strings.Count(string(api.log.Contents()), `"msg":"shedding requests"`)).To(Equal(1))
	})
})
