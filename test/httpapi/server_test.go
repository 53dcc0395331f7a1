package httpapi_test

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
)

var _ = Describe("The server", func() {
	It("logs its address", func(ctx SpecContext) {
		api := start(ctx)
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"msg":"HTTP API listens","addr":"` + api.Addr() + `"`))
	})

	It("returns an error if the address is in use", func(ctx SpecContext) {
		taken := start(ctx)
		second := httpapi.New(httpapi.Options{Addr: taken.Addr(), Log: slog.New(slog.DiscardHandler)})
		Expect(second.Run(ctx)).To(MatchError(ContainSubstring("start the HTTP API: listen tcp")))
	})

	Describe("without authentication on a loopback address", func() {
		status := func(ctx context.Context, api *api, host string) int {
			GinkgoHelper()
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, api.url+"/v1/users", http.NoBody)
			Expect(err).NotTo(HaveOccurred())
			request.Host = host
			answer, err := http.DefaultClient.Do(request)
			Expect(err).NotTo(HaveOccurred())
			Expect(answer.Body.Close()).To(Succeed())
			return answer.StatusCode
		}

		It("refuses requests for other hosts", func(ctx SpecContext) {
			api := start(ctx)
			for _, host := range []string{"localhost", "LocalHost:8080", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:80"} {
				Expect(status(ctx, api, host)).To(Equal(http.StatusOK), host)
			}
			for _, host := range []string{"evil.example", "evil.example:8080", "localhost.evil.example", "192.0.2.1", "127.0.0.1.evil.example"} {
				Expect(status(ctx, api, host)).To(Equal(http.StatusMisdirectedRequest), host)
			}
		})

		It("serves every host if keys are required, or if other machines can connect", func(ctx SpecContext) {
			keyed := start(ctx, withKeys("secret-a"))
			Expect(status(ctx, keyed, "api.example")).To(Equal(http.StatusUnauthorized))
			open := start(ctx, func(o *httpapi.Options) { o.Addr = ":0" })
			_, port, err := net.SplitHostPort(open.Addr())
			Expect(err).NotTo(HaveOccurred())
			open.url = "http://127.0.0.1:" + port
			Expect(status(ctx, open, "api.example")).To(Equal(http.StatusOK))
		})
	})

	It("serves no docs if they are turned off", func(ctx SpecContext) {
		api := start(ctx, func(o *httpapi.Options) { o.DocsOff = true })
		for _, path := range []string{"/docs", "/docs/page.js", "/docs/swagger-ui-bundle.js"} {
			Expect(api.get(ctx, path).status).To(Equal(http.StatusNotFound))
		}
		Expect(api.get(ctx, "/openapi.json").status).To(Equal(http.StatusOK))
	})

	Describe("that stops", func() {
		// slowCreate sends a request that waits for the lock. One channel receives the
		// response, the other one the error.
		slowCreate := func(ctx context.Context, api *api) (<-chan response, <-chan error) {
			responses, failures := make(chan response, 1), make(chan error, 1)
			go func() {
				defer GinkgoRecover()
				result, err := api.try(ctx, http.MethodPost, "/v1/users", strings.NewReader(`{"email":"ada@example.com"}`))
				if err != nil {
					failures <- err
					return
				}
				responses <- result
			}()
			Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(1))
			return responses, failures
		}

		It("accepts no new connections and finishes the request in flight", func(ctx SpecContext) {
			release := lockUsers(ctx)
			api := start(ctx)
			responses, _ := slowCreate(ctx, api)

			api.stop()
			Eventually(ctx, func() error {
				connection, err := net.Dial("tcp", api.Addr())
				if err == nil {
					connection.Close()
				}
				return err
			}).Should(HaveOccurred())
			Expect(api.stopped).NotTo(Receive())

			release()
			Eventually(ctx, responses).Should(Receive(WithTransform(statusOf, Equal(http.StatusCreated))))
			Eventually(ctx, api.stopped).Should(Receive(BeNil()))
			api.stopped <- nil // for the clean-up
			Expect(count(ctx, "users")).To(Equal(1))
		})

		It("cuts off a request that does not finish in time, and cancels its statement", func(ctx SpecContext) {
			release := lockUsers(ctx)
			api := start(ctx, func(o *httpapi.Options) { o.ShutdownTimeout = 50 * time.Millisecond })
			_, failures := slowCreate(ctx, api)

			api.stop()
			Eventually(ctx, api.stopped).Should(Receive(MatchError(context.DeadlineExceeded)))
			api.stopped <- nil // for the clean-up
			Eventually(ctx, failures).Should(Receive())
			Eventually(ctx, waitingForLock).WithArguments(ctx).Should(BeZero())
			release()
			Expect(count(ctx, "users")).To(BeZero())
		})
	})
})
