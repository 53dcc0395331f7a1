package httpapi_test

import (
	"fmt"
	"net/http"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/outbox"
)

var _ = Describe("A change", func() {
	It("calls Hint only after it has committed events", func(ctx SpecContext) {
		visible := make(chan int, 10)
		api := start(ctx, func(o *httpapi.Options) {
			o.Hint = func() { visible <- count(ctx, "outbox_events") }
		})
		Expect(api.create(ctx, `{"email":"ada@example.com"}`, "Idempotency-Key: k").status).To(Equal(http.StatusCreated))
		Expect(visible).To(Receive(Equal(1)))
		Expect(api.create(ctx, `{"email":"ada@example.com"}`, "Idempotency-Key: k").status).To(Equal(http.StatusCreated))
		Expect(api.create(ctx, `{"email":"ada@example.com"}`).status).To(Equal(http.StatusConflict))
		Expect(visible).NotTo(Receive())
	})

	Describe("with an idempotency key", func() {
		DescribeTable("is made once, and a repeated request gets the first response", func(ctx SpecContext, path, body string, status int) {
			api := start(ctx)
			post := func(headers ...string) response {
				return api.do(ctx, http.MethodPost, path, strings.NewReader(body), headers...)
			}
			first := post("Idempotency-Key: 8e03978e-40d5-43dd-bc93-6894a57f9324")
			Expect(first.status).To(Equal(status), first.body)
			Expect(first.header).NotTo(HaveKey("Idempotency-Replayed"))
			// The header's draft requires quotes.
			again := post(`Idempotency-Key: "8e03978e-40d5-43dd-bc93-6894a57f9324"`)
			Expect(again.status).To(Equal(status))
			Expect(again.body).To(Equal(first.body))
			Expect(again.header.Get("Idempotency-Replayed")).To(Equal("true"))
			Expect(again.header.Get("X-Request-ID")).NotTo(Equal(first.header.Get("X-Request-ID")))
			for _, name := range []string{"Location", "Content-Type", "Cache-Control"} {
				Expect(again.header[name]).To(Equal(first.header[name]))
			}
			Expect(count(ctx, "outbox_events")).To(Equal(1))

			other := post("Idempotency-Key: another")
			Expect(other.header).NotTo(HaveKey("Idempotency-Replayed"))
		},
			Entry("for a user", "/v1/users", `{"email":"ada@example.com"}`, http.StatusCreated),
			Entry("for many users", "/v1/users/batch", `{"data":[{"email":"ada@example.com"}]}`, http.StatusOK),
			Entry("for an event", "/v1/events", `{"event_type":"a","event_context":1}`, http.StatusAccepted),
			Entry("for many events", "/v1/events/batch", `{"data":[{"event_type":"a","event_context":1}]}`, http.StatusOK),
		)

		It("is refused if the key was used for another request", func(ctx SpecContext) {
			api := start(ctx)
			const key = "Idempotency-Key: k"
			Expect(api.create(ctx, `{"email":"ada@example.com"}`, key).status).To(Equal(http.StatusCreated))
			for _, other := range []response{
				api.create(ctx, `{"email":"bob@example.com"}`, key),
				api.create(ctx, `{"email":"ada@example.com"} `, key),
				api.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(`{"event_type":"a","event_context":1}`), key),
			} {
				expectProblem(other, http.StatusUnprocessableEntity, "idempotency-key-reused")
			}
			Expect(count(ctx, "users")).To(Equal(1))
			Expect(count(ctx, "outbox_events")).To(Equal(1))
		})

		It("is refused if the key was used with another query", func(ctx SpecContext) {
			api := start(ctx)
			const body, key = `{"data":[{"email":"ada@example.com"}]}`, "Idempotency-Key: k"
			Expect(api.do(ctx, http.MethodPost, "/v1/users/batch", strings.NewReader(body), key).status).To(Equal(http.StatusOK))
			expectProblem(api.do(ctx, http.MethodPost, "/v1/users/batch?atomic=true", strings.NewReader(body), key),
				http.StatusUnprocessableEntity, "idempotency-key-reused")
		})

		It("is refused while a request with the same key is in progress", func(ctx SpecContext) {
			api := start(ctx)
			release := lockUsers(ctx)
			ask := func() response { // batches do not use group commit, so the first one keeps its lock
				return api.do(ctx, http.MethodPost, "/v1/users/batch", strings.NewReader(`{"data":[{"email":"ada@example.com"}]}`), "Idempotency-Key: k")
			}
			first := make(chan response, 1)
			go func() {
				defer GinkgoRecover()
				first <- ask()
			}()
			Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(1))
			second := ask()
			expectProblem(second, http.StatusConflict, "idempotency-key-in-use")
			Expect(second.header.Get("Retry-After")).To(Equal("1"))
			release()
			var made response
			Eventually(ctx, first).Should(Receive(&made))
			Expect(made.status).To(Equal(http.StatusOK))
			Expect(ask().body).To(Equal(made.body))
		})

		It("does not store the key if it is refused", func(ctx SpecContext) {
			api := start(ctx)
			const key = "Idempotency-Key: k"
			Expect(api.create(ctx, `{"email":"ada@example.com"}`).status).To(Equal(http.StatusCreated))
			Expect(api.create(ctx, `{"email":"ada@example.com"}`, key).status).To(Equal(http.StatusConflict))
			Expect(api.create(ctx, `{"email":"ada"}`, key).status).To(Equal(http.StatusUnprocessableEntity))
			Expect(api.create(ctx, `{"email":"bob@example.com"}`, key).status).To(Equal(http.StatusCreated))
		})

		It("belongs to the client, and to all keys of the client", func(ctx SpecContext) {
			api := start(ctx, withKeys("secret-a", "secret-b", "secret-a2"), func(o *httpapi.Options) { o.Keys[2].Client = "a" })
			publish := func(key, body string) response {
				return api.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body), "Authorization: Bearer "+key, "Idempotency-Key: order-1")
			}
			const body = `{"event_type":"a","event_context":1}`
			first, second := publish("secret-a", body), publish("secret-b", body)
			for _, answer := range []response{first, second} {
				Expect(answer.status).To(Equal(http.StatusAccepted))
				Expect(answer.header).NotTo(HaveKey("Idempotency-Replayed"))
			}
			Expect(second.body).NotTo(Equal(first.body))
			Expect(count(ctx, "outbox_events")).To(Equal(2))
			repeated := publish("secret-a2", body)
			Expect(repeated.body).To(Equal(first.body))
			Expect(repeated.header.Get("Idempotency-Replayed")).To(Equal("true"))
			expectProblem(publish("secret-a2", `{"event_type":"a","event_context":2}`), http.StatusUnprocessableEntity, "idempotency-key-reused")
			Expect(api.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body), "Authorization: Bearer secret-b", "Idempotency-Key: order-2").status).
				To(Equal(http.StatusAccepted))
		})

		It("replays the response after a limit has changed", func(ctx SpecContext) {
			const body, key = `{"event_type":"a","event_context":"0123456789"}`, "Idempotency-Key: k"
			first := start(ctx).do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body), key)
			Expect(first.status).To(Equal(http.StatusAccepted))
			stricter := start(ctx, func(o *httpapi.Options) { o.Publisher = outbox.NewPublisher(outbox.PublisherOptions{MaxEventBytes: 5}) })
			repeated := stricter.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body), key)
			Expect(repeated.body).To(Equal(first.body))
			Expect(repeated.header.Get("Idempotency-Replayed")).To(Equal("true"))
			expectProblem(stricter.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body), "Idempotency-Key: other"),
				http.StatusUnprocessableEntity, "validation-failed")
			expectProblem(stricter.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body+" "), key),
				http.StatusUnprocessableEntity, "validation-failed")
			Expect(count(ctx, "outbox_events")).To(Equal(1))
		})

		DescribeTable("is refused if its key is", func(ctx SpecContext, headers ...string) {
			api := start(ctx)
			request, err := http.NewRequestWithContext(ctx, http.MethodPost, api.url+"/v1/users", strings.NewReader(`{"email":"ada@example.com"}`))
			Expect(err).NotTo(HaveOccurred())
			request.Header["Content-Type"] = []string{"application/json"}
			request.Header["Idempotency-Key"] = headers
			response, err := http.DefaultClient.Do(request)
			Expect(err).NotTo(HaveOccurred())
			defer response.Body.Close()
			Expect(response.StatusCode).To(Equal(http.StatusBadRequest))
			Expect(count(ctx, "users")).To(BeZero())
		},
			Entry("empty", ""),
			Entry("an empty string", `""`),
			Entry("given twice", "a", "a"),
			Entry("too long", strings.Repeat("k", 256)),
			Entry("too long in quotes", fmt.Sprintf("%q", strings.Repeat("k", 256))),
			Entry("with a space and without quotes", "a b"),
			Entry("not in ASCII", "schlüssel"),
			Entry("without the closing quote", `"a`),
			Entry("a string with a parameter", `"a";b`),
			Entry("with an invalid escape", `"a\b"`),
		)

		It("is refused with the problem invalid-idempotency-key", func(ctx SpecContext) {
			expectProblem(start(ctx).create(ctx, `{"email":"ada@example.com"}`, `Idempotency-Key: a b`), http.StatusBadRequest, "invalid-idempotency-key")
		})

		It("accepts keys of the maximum length, and quoted keys with spaces and escapes", func(ctx SpecContext) {
			api := start(ctx)
			Expect(api.create(ctx, `{"email":"a@example.com"}`, "Idempotency-Key: "+strings.Repeat("k", 255)).status).To(Equal(http.StatusCreated))
			Expect(api.create(ctx, `{"email":"b@example.com"}`, `Idempotency-Key: "a \"b\" \\ c"`).status).To(Equal(http.StatusCreated))
			Expect(count(ctx, `idempotency_keys WHERE key = 'a "b" \ c'`)).To(Equal(1))
		})
	})
})
