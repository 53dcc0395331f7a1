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
