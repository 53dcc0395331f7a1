package httpapi_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// storedEvent is an event in the outbox.
type storedEvent struct {
	EventID         string    `db:"event_id"`
	EventType       string    `db:"event_type"`
	EventDateTime   time.Time `db:"event_date_time"`
	EventContext    string    `db:"event_context"`
	MetadataVersion int64     `db:"metadata_version"`
	Traceparent     string    `db:"traceparent"`
}

func storedEvents(ctx context.Context) (events []storedEvent) {
	GinkgoHelper()
	Expect(db.SelectContext(ctx, &events, `
		SELECT event_id, event_type, event_date_time, event_context, metadata_version, coalesce(traceparent, '') AS traceparent
		FROM outbox_events ORDER BY id`)).To(Succeed())
	return events
}

// deep returns nested arrays in JSON, one for each level.
func deep(levels int) string { return strings.Repeat("[", levels) + strings.Repeat("]", levels) }

var _ = Describe("The events routes", func() {
	publish := func(ctx context.Context, a *api, body string, headers ...string) response {
		GinkgoHelper()
		return a.do(ctx, http.MethodPost, "/v1/events", strings.NewReader(body), headers...)
	}

	Describe("with an id that the client has chosen", func() {
		const id = "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c11"
		event := func(id string, n int) string {
			return fmt.Sprintf(`{"event_id":%q,"event_type":"a","event_context":%d}`, id, n)
		}

		It("publish the event once, and replay the response", func(ctx SpecContext) {
			api := start(ctx)
			first := publish(ctx, api, event(id, 1))
			Expect(first.status).To(Equal(http.StatusAccepted), first.body)
			Expect(first.object()).To(HaveKeyWithValue("event_id", id))
			Expect(first.header).NotTo(HaveKey("Idempotency-Replayed"))
			repeated := publish(ctx, api, event(id, 1))
			Expect(repeated.body).To(Equal(first.body))
			Expect(repeated.header.Get("Idempotency-Replayed")).To(Equal("true"))
			problem := expectProblem(publish(ctx, api, event(id, 2)), http.StatusUnprocessableEntity, "idempotency-key-reused")
			Expect(problem["errors"]).To(Equal([]any{invalidValue("pointer", "/event_id", "was used for another event")}))
			Expect(storedEvents(ctx)).To(ConsistOf(HaveField("EventID", id)))
		})

		It("publish each event of a batch once, also if two batches have it", func(ctx SpecContext) {
			api := start(ctx)
			const other = "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c12"
			batch := func(query string, events ...string) response {
				return api.do(ctx, http.MethodPost, "/v1/events/batch"+query, strings.NewReader(`{"data":[`+strings.Join(events, ",")+`]}`))
			}
			statuses := func(a response) (statuses []int) {
				GinkgoHelper()
				Expect(a.status).To(Equal(http.StatusOK), a.body)
				for _, result := range a.object()["data"].([]any) {
					statuses = append(statuses, int(result.(map[string]any)["status"].(float64)))
				}
				return statuses
			}
			Expect(statuses(batch("", event(id, 1), event(id, 1), event(id, 2)))).To(Equal([]int{202, 202, 422}))
			Expect(statuses(batch("", event(other, 1), event(id, 1), event(id, 3), `{"event_type":"a","event_context":1}`))).To(Equal([]int{202, 202, 422, 202}))
			expectProblem(batch("?atomic=true", event("019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c13", 1), event(id, 3)), http.StatusUnprocessableEntity, "idempotency-key-reused")
			Expect(storedEvents(ctx)).To(ConsistOf(HaveField("EventID", id), HaveField("EventID", other), HaveField("EventType", "a")))
		})

		It("publish the event once for concurrent requests", func(ctx SpecContext) {
			api := start(ctx)
			answers := make(chan response, 20)
			for range 20 {
				go func() {
					defer GinkgoRecover()
					answers <- publish(ctx, api, event(strings.ToUpper(id), 1))
				}()
			}
			replayed := 0
			for range 20 {
				var answer response
				Eventually(ctx, answers).Should(Receive(&answer))
				Expect(answer.status).To(Equal(http.StatusAccepted), answer.body)
				if answer.header.Get("Idempotency-Replayed") == "true" {
					replayed++
				}
			}
			Expect(replayed).To(Equal(19))
			Expect(storedEvents(ctx)).To(HaveLen(1))
		})

		It("let each client use the id", func(ctx SpecContext) {
			api := start(ctx, withKeys("secret-a", "secret-b"))
			for _, key := range []string{"secret-a", "secret-b"} {
				answer := publish(ctx, api, event(id, 1), "Authorization: Bearer "+key)
				Expect(answer.status).To(Equal(http.StatusAccepted))
				Expect(answer.header).NotTo(HaveKey("Idempotency-Replayed"))
			}
			Expect(storedEvents(ctx)).To(HaveLen(2))
		})
	})

	It("publish an event with its event context byte for byte", func(ctx SpecContext) {
		const payload = "{ \"b\" : [1.0,  1e400, \"\\u0000\\/é\"],\n\t\"a\":null}"
		const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
		published := publish(ctx, start(ctx), `{"event_type": "order_placed", "metadata_version": 7,
			"event_date_time": "2026-01-31T12:00:00.123456789+01:00", "event_context": `+payload+`}`, "traceparent: "+traceparent)
		Expect(published.status).To(Equal(http.StatusAccepted), published.body)
		Expect(published.object()).To(HaveLen(1))
		stored := storedEvents(ctx)
		Expect(stored).To(HaveLen(1))
		Expect(published.object()).To(HaveKeyWithValue("event_id", SatisfyAll(MatchRegexp(uuidPattern), Equal(stored[0].EventID))))
		Expect(stored[0].EventType).To(Equal("order_placed"))
		Expect(stored[0].EventDateTime).To(BeTemporally("==", time.Date(2026, 1, 31, 11, 0, 0, 123456000, time.UTC)))
		Expect(stored[0].EventContext).To(Equal(payload))
		Expect(stored[0].MetadataVersion).To(BeEquivalentTo(7))
		Expect(stored[0].Traceparent).To(Equal(traceparent))
	})

	DescribeTable("accept any JSON as an event context:", func(ctx SpecContext, payload string) {
		before := time.Now().Truncate(time.Microsecond)
		published := publish(ctx, start(ctx), `{"event_type":"a","event_context":`+payload+`}`)
		Expect(published.status).To(Equal(http.StatusAccepted), published.body)
		stored := storedEvents(ctx)
		Expect(stored).To(HaveLen(1))
		Expect(stored[0].EventContext).To(Equal(payload))
		Expect(stored[0].MetadataVersion).To(BeEquivalentTo(1))
		Expect(stored[0].EventDateTime).To(BeTemporally(">=", before))
		Expect(stored[0].EventDateTime).To(BeTemporally("<=", time.Now()))
	},
		Entry("an object", `{}`), Entry("a string", `"\u0000"`), Entry("a number", `-0`), Entry("null", `null`), Entry("true", `true`),
		Entry("nested to the maximum depth", deep(input.MaxDepth-1)),
	)

	It("list all errors at once", func(ctx SpecContext) {
		problem := expectProblem(publish(ctx, start(ctx), `{"event_type":"A","metadata_version":-1,"event_date_time":"2500-01-01T00:00:00Z"}`),
			http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(HaveLen(4))
	})

	It("refuse an event context that is larger than the limit", func(ctx SpecContext) {
		api := start(ctx, func(o *httpapi.Options) {
			o.Publisher = outbox.NewPublisher(outbox.PublisherOptions{MaxEventBytes: 10})
		})
		problem := expectProblem(publish(ctx, api, `{"event_type":"a","event_context":"123456789"}`), http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(ConsistOf(invalidValue("pointer", "/event_context", "has 11 bytes, more than the limit of 10")))
	})

	DescribeTable("refuse JSON that is nested too deeply", func(ctx SpecContext, body string) {
		problem := expectProblem(publish(ctx, start(ctx), body), http.StatusBadRequest, "invalid-json")
		Expect(fmt.Sprint(problem["errors"])).To(ContainSubstring(fmt.Sprintf("deeper than %d", input.MaxDepth)))
	},
		Entry("in the event context", `{"event_type":"a","event_context":`+deep(input.MaxDepth)+`}`),
		Entry("in an unknown field", `{"event_type":"a","event_context":1,"x":`+deep(input.MaxDepth)+`}`),
		Entry("far above the limit", `{"event_type":"a","event_context":`+deep(200_000)+`}`),
		Entry("in a truncated body", strings.Repeat("[", 200_000)),
	)

	Describe("for many events", func() {
		batch := func(ctx context.Context, a *api, query, body string) response {
			GinkgoHelper()
			return a.do(ctx, http.MethodPost, "/v1/events/batch"+query, strings.NewReader(body))
		}

		It("publish the events in their order", func(ctx SpecContext) {
			var items []string
			for i := range 1000 {
				items = append(items, fmt.Sprintf(`{"event_type":"a","event_context":%d}`, i))
			}
			published := batch(ctx, start(ctx), "", `{"data":[`+strings.Join(items, ",")+`]}`)
			Expect(published.status).To(Equal(http.StatusOK), published.body)
			data := published.object()["data"].([]any)
			stored := storedEvents(ctx)
			Expect(stored).To(HaveLen(1000))
			Expect(data).To(HaveLen(1000))
			for i, result := range data {
				Expect(result).To(Equal(map[string]any{"status": 202., "event_id": stored[i].EventID}))
				Expect(stored[i].EventContext).To(Equal(fmt.Sprint(i)))
			}
		})

		const mixed = `{"data":[{"event_type":"a","event_context":1},{"event_type":"B"},7,{"event_type":"c","event_context":3}]}`

		It("publish the valid events, and return a problem for each invalid event", func(ctx SpecContext) {
			published := batch(ctx, start(ctx), "?atomic=false", mixed)
			Expect(published.status).To(Equal(http.StatusOK), published.body)
			Expect(storedEvents(ctx)).To(HaveExactElements(HaveField("EventContext", "1"), HaveField("EventContext", "3")))
			data := published.object()["data"].([]any)
			Expect(data).To(HaveLen(4))
			Expect(data[0]).To(HaveKeyWithValue("status", 202.))
			Expect(data[1]).To(SatisfyAll(HaveLen(2), HaveKeyWithValue("status", 422.), HaveKeyWithValue("problem", SatisfyAll(
				HaveKeyWithValue("type", HaveSuffix("#validation-failed")), HaveKeyWithValue("title", "Validation failed"),
				HaveKeyWithValue("status", 422.), HaveKeyWithValue("detail", Not(BeEmpty())),
				HaveKeyWithValue("errors", ConsistOf(
					invalidValue("pointer", "/data/1/event_context", "is required"), invalidValue("pointer", "/data/1/event_type", "is not snake_case"))),
			))))
			Expect(data[2]).To(HaveKeyWithValue("problem", HaveKeyWithValue("errors", ConsistOf(invalidValue("pointer", "/data/2", "must be an object")))))
		})

		It("publish all or nothing with atomic=true", func(ctx SpecContext) {
			problem := expectProblem(batch(ctx, start(ctx), "?atomic=true", mixed), http.StatusUnprocessableEntity, "validation-failed")
			Expect(problem["errors"]).To(ConsistOf(
				invalidValue("pointer", "/data/1/event_context", "is required"), invalidValue("pointer", "/data/1/event_type", "is not snake_case"),
				invalidValue("pointer", "/data/2", "must be an object")))
			Expect(storedEvents(ctx)).To(BeEmpty())
		})

		DescribeTable("refuse the whole request for", func(ctx SpecContext, query, body, place, name, detail string) {
			problem := expectProblem(batch(ctx, start(ctx), query, body), http.StatusUnprocessableEntity, "validation-failed")
			Expect(problem["errors"]).To(ConsistOf(invalidValue(place, name, detail)))
		},
			Entry("a misspelt parameter", "?atomc=true", `{"data":[1]}`, "parameter", "atomc", "is an unknown parameter"),
			Entry("a parameter that is neither true nor false", "?atomic=1", `{"data":[1]}`, "parameter", "atomic", "must be true or false"),
		)
	})
})

var _ = Describe("Creating many users", func() {
	create := func(ctx context.Context, a *api, query, body string) response {
		GinkgoHelper()
		return a.do(ctx, http.MethodPost, "/v1/users/batch"+query, strings.NewReader(body))
	}

	It("creates each user with its event, and returns the results in the same order", func(ctx SpecContext) {
		api := start(ctx)
		Expect(api.create(ctx, `{"email":"taken@example.com"}`).status).To(Equal(http.StatusCreated))
		created := create(ctx, api, "", `{"data":[
			{"email":"zoe@example.com","first_name":"Zoe"}, {"email":"Taken@Example.com"}, {"email":"ada"},
			{"email":"Ada@example.com"}, {"email":"ADA@example.com"}]}`)
		Expect(created.status).To(Equal(http.StatusOK), created.body)
		data := created.object()["data"].([]any)
		Expect(data).To(HaveLen(5))
		for place, email := range map[int]string{0: "zoe@example.com", 3: "Ada@example.com"} {
			Expect(data[place]).To(SatisfyAll(HaveLen(2), HaveKeyWithValue("status", 201.), HaveKeyWithValue("user", HaveKeyWithValue("email", email))))
			user := data[place].(map[string]any)["user"].(map[string]any)
			Expect(api.get(ctx, "/v1/users/"+user["id"].(string)).object()).To(Equal(user))
		}
		for _, place := range []int{1, 4} {
			Expect(data[place]).To(SatisfyAll(HaveLen(2), HaveKeyWithValue("status", 409.), HaveKeyWithValue("problem", SatisfyAll(
				HaveKeyWithValue("type", HaveSuffix("#email-taken")), HaveKeyWithValue("detail", "User with this email already exists"),
				HaveKeyWithValue("errors", ConsistOf(invalidValue("pointer", fmt.Sprintf("/data/%d/email", place), "is taken"))),
			))))
		}
		Expect(data[2]).To(SatisfyAll(HaveKeyWithValue("status", 422.), HaveKeyWithValue("problem", HaveKeyWithValue("type", HaveSuffix("#validation-failed")))))

		var pairs int
		Expect(db.GetContext(ctx, &pairs, `SELECT count(*) FROM users JOIN outbox_events
			ON event_context->>'user_id' = users.id::text AND event_context->>'email' = users.email`)).To(Succeed())
		Expect(pairs).To(Equal(3))
		Expect(count(ctx, "users") + count(ctx, "outbox_events")).To(Equal(6))
	})

	It("creates all users or none with atomic=true", func(ctx SpecContext) {
		api := start(ctx)
		Expect(api.create(ctx, `{"email":"taken@example.com"}`).status).To(Equal(http.StatusCreated))
		problem := expectProblem(create(ctx, api, "?atomic=true", `{"data":[{"email":"a@example.com"},{"email":"taken@example.com"},{"email":"A@example.com"}]}`),
			http.StatusConflict, "email-taken")
		Expect(problem["errors"]).To(ConsistOf(
			invalidValue("pointer", "/data/1/email", "is taken"), invalidValue("pointer", "/data/2/email", "is taken")))
		expectProblem(create(ctx, api, "?atomic=true", `{"data":[{"email":"a@example.com"},{"email":"b"}]}`),
			http.StatusUnprocessableEntity, "validation-failed")
		Expect(count(ctx, "users")).To(Equal(1))
		Expect(count(ctx, "outbox_events")).To(Equal(1))
		Expect(create(ctx, api, "?atomic=true", `{"data":[{"email":"a@example.com"},{"email":"b@example.com"}]}`).status).To(Equal(http.StatusOK))
		Expect(count(ctx, "users")).To(Equal(3))
	})

	It("does not deadlock if two requests create the same users in different orders", func(ctx SpecContext) {
		tx, err := db.BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { _ = tx.Rollback() })
		tx.MustExecContext(ctx, `INSERT INTO users (id, email, created_at, updated_at)
			VALUES (gen_random_uuid(), 'a-held@example.com', now(), now())`)
		api := start(ctx)
		responses := make(chan response, 2)
		for _, order := range [][]string{{"x", "a-held", "y"}, {"y", "a-held", "x"}} {
			go func() {
				defer GinkgoRecover()
				responses <- create(ctx, api, "", fmt.Sprintf(`{"data":[{"email":"%s@example.com"},{"email":"%s@example.com"},{"email":"%s@example.com"}]}`,
					order[0], order[1], order[2]))
			}()
		}
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(2))
		Expect(tx.Rollback()).To(Succeed())
		for range 2 {
			Eventually(ctx, responses).Should(Receive(WithTransform(statusOf, Equal(http.StatusOK))))
		}
		Expect(count(ctx, "users")).To(Equal(3))
	})

	It("finishes if many requests create the same users at once in any order", func(ctx SpecContext) {
		api := start(ctx)
		const requests = 40
		responses := make(chan response, requests)
		for n := range requests {
			go func() {
				defer GinkgoRecover()
				items := make([]string, 100)
				for i := range items {
					items[i] = fmt.Sprintf(`{"email":"user%d@example.com"}`, (i*(2*n+1)+n)%100)
				}
				responses <- create(ctx, api, "", `{"data":[`+strings.Join(items, ",")+`]}`)
			}()
		}
		created := 0
		for range requests {
			var a response
			Eventually(ctx, responses).WithTimeout(time.Minute).Should(Receive(&a))
			Expect(a.status).To(Equal(http.StatusOK), a.body)
			created += strings.Count(a.body, `"status":201`)
		}
		Expect(created).To(Equal(100))
		Expect(count(ctx, "users")).To(Equal(100))
		Expect(count(ctx, "outbox_events")).To(Equal(100))
	})
})
