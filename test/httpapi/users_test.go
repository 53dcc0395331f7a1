package httpapi_test

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

const uuidPattern = `^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$`

var _ = Describe("The users routes", func() {
	It("create a user", func(ctx SpecContext) {
		api := start(ctx)
		created := api.create(ctx, `{"email":"Ada@Example.com","first_name":"Ada","last_name":"Lovelace & <Söhne>"}`)
		Expect(created.status).To(Equal(http.StatusCreated), created.body)
		user := created.object()
		Expect(user).To(HaveLen(6))
		Expect(user).To(SatisfyAll(
			HaveKeyWithValue("id", MatchRegexp(uuidPattern)),
			HaveKeyWithValue("email", "Ada@example.com"),
			HaveKeyWithValue("first_name", "Ada"),
			HaveKeyWithValue("last_name", "Lovelace & <Söhne>"),
			HaveKeyWithValue("created_at", HaveSuffix("Z")),
			HaveKeyWithValue("updated_at", user["created_at"]),
		))
		_, err := time.Parse(time.RFC3339Nano, user["created_at"].(string))
		Expect(err).NotTo(HaveOccurred())
		Expect(created.header.Get("Content-Type")).To(Equal("application/json"))
		Expect(created.header.Get("X-Content-Type-Options")).To(Equal("nosniff"))
		Expect(created.header.Get("Cache-Control")).To(Equal("no-store"))
		Expect(created.header.Get("Location")).To(Equal("/v1/users/" + user["id"].(string)))

		By("returning the same body at its location")
		found := api.get(ctx, created.header.Get("Location"))
		Expect(found.status).To(Equal(http.StatusOK))
		Expect(found.body).To(Equal(created.body))

		By("publishing one event")
		Expect(count(ctx, "users")).To(Equal(1))
		Expect(count(ctx, "outbox_events WHERE event_type = 'user_created'")).To(Equal(1))
	})

	It("create a user with only an e-mail address", func(ctx SpecContext) {
		created := start(ctx).create(ctx, `{"email":"ada@example.com"}`)
		Expect(created.status).To(Equal(http.StatusCreated), created.body)
		Expect(created.object()).To(SatisfyAll(HaveKeyWithValue("first_name", ""), HaveKeyWithValue("last_name", "")))
	})

	It("refuse an address that exists in another case, and publish nothing", func(ctx SpecContext) {
		api := start(ctx)
		Expect(api.create(ctx, `{"email":"ada@example.com"}`).status).To(Equal(http.StatusCreated))
		problem := expectProblem(api.create(ctx, `{"email":"ADA@EXAMPLE.COM"}`), http.StatusConflict, "email-taken")
		Expect(problem).To(HaveKeyWithValue("detail", "User with this email already exists"))
		Expect(count(ctx, "users")).To(Equal(1))
		Expect(count(ctx, "outbox_events")).To(Equal(1))
	})

	It("create many users at once while another request waits for an address", func(ctx SpecContext) {
		const others = 90 // below MaxConcurrent
		api := start(ctx)
		holder := db.MustBegin()
		defer func() { _ = holder.Rollback() }()
		holder.MustExec(`INSERT INTO users (id, email, first_name, last_name, created_at, updated_at)
			VALUES (gen_random_uuid(), 'held@example.com', '', '', now(), now())`)
		statuses := make(chan int, others+1)
		create := func(email string) {
			defer GinkgoRecover()
			statuses <- api.create(ctx, fmt.Sprintf(`{"email":%q}`, email)).status
		}
		waits := func() (n int) {
			Expect(db.Get(&n, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`)).To(Succeed())
			return n
		}
		go create("Held@example.com")
		Eventually(ctx, waits).Should(Equal(1))
		for i := range others {
			go create(fmt.Sprintf("user-%d@example.com", i))
		}
		for range others {
			Eventually(ctx, statuses).Should(Receive(Equal(http.StatusCreated)))
		}
		Expect(holder.Rollback()).To(Succeed())
		Eventually(ctx, statuses).Should(Receive(Equal(http.StatusCreated)))
		Expect(count(ctx, "users")).To(Equal(others + 1))
		Expect(count(ctx, "outbox_events")).To(Equal(others + 1))
	})

	It("create 200 users and 200 events in 1,000 concurrent requests with 200 addresses", func(ctx SpecContext) {
		api := start(ctx)
		statuses := make(chan int, 1000)
		limit := make(chan struct{}, 100) // connections
		var group sync.WaitGroup
		for i := range cap(statuses) {
			group.Go(func() {
				defer GinkgoRecover()
				limit <- struct{}{}
				defer func() { <-limit }()
				body := fmt.Sprintf(`{"email":"user%d@example.com"}`, i%200)
				statuses <- api.do(ctx, http.MethodPost, "/v1/users", strings.NewReader(body)).status
			})
		}
		group.Wait()
		close(statuses)
		times := make(map[int]int)
		for status := range statuses {
			times[status]++
		}
		Expect(times).To(Equal(map[int]int{http.StatusCreated: 200, http.StatusConflict: 800}))
		Expect(count(ctx, "users")).To(Equal(200))
		Expect(count(ctx, "outbox_events")).To(Equal(200))
	})

	It("find the user of an id in upper case, and in a percent-encoded path", func(ctx SpecContext) {
		api := start(ctx)
		created := api.create(ctx, `{"email":"ada@example.com"}`)
		path := created.header.Get("Location")
		id := strings.TrimPrefix(path, "/v1/users/")
		for _, other := range []string{
			"/v1/users/" + strings.ToUpper(id),
			strings.Replace(path, "-", "%2d", 1), strings.Replace(path, "-", "%2D", 1),
		} {
			Expect(api.get(ctx, other).body).To(Equal(api.get(ctx, path).body), other)
		}
		for _, other := range []string{"/v1/%75sers/" + id, "/%76%31/users/" + id} { // the document's validator does not know these paths
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, api.url+other, http.NoBody)
			Expect(err).NotTo(HaveOccurred())
			answer, err := http.DefaultClient.Do(request)
			Expect(err).NotTo(HaveOccurred())
			Expect(answer.Body.Close()).To(Succeed())
			Expect(answer.StatusCode).To(Equal(http.StatusOK), other)
		}
		Expect(api.get(ctx, "/v1/users%2F"+id).status).To(Equal(http.StatusNotFound), "an encoded slash is no separator")
	})

	It("keep a name with joiners between letters", func(ctx SpecContext) {
		const persian, hindi = "علی\u200cرضا", "क\u094d\u200dष"
		created := start(ctx).create(ctx, `{"email":"ada@example.com","first_name":"`+persian+`","last_name":"`+hindi+`"}`)
		Expect(created.status).To(Equal(http.StatusCreated), created.body)
		Expect(created.object()).To(And(HaveKeyWithValue("first_name", "علی\u200cرضا"), HaveKeyWithValue("last_name", "क\u094d\u200dष")))
	})

	It("respond to HEAD as to GET, but without the body", func(ctx SpecContext) {
		api := start(ctx)
		created := api.create(ctx, `{"email":"ada@example.com"}`)
		for _, path := range []string{created.header.Get("Location"), "/v1/users"} {
			head, get := api.do(ctx, http.MethodHead, path, nil), api.get(ctx, path)
			Expect(head.status).To(Equal(http.StatusOK))
			Expect(head.body).To(BeEmpty())
			Expect(head.header.Get("Content-Length")).To(Equal(strconv.Itoa(len(get.body))))
		}
	})

	Describe("list", func() {
		It("no users if there are none", func(ctx SpecContext) {
			Expect(start(ctx).get(ctx, "/v1/users").body).
				To(MatchJSON(`{"data":[],"next_cursor":null}`))
		})

		It("every user once, the newest first, while others are created between the pages", func(ctx SpecContext) {
			api := start(ctx)
			create := func(name string) string {
				created := api.create(ctx, fmt.Sprintf(`{"email":"%s@example.com"}`, name))
				Expect(created.status).To(Equal(http.StatusCreated), created.body)
				return created.object()["id"].(string)
			}
			var want, got []string
			for i := range 45 {
				want = append(want, create(fmt.Sprint("user", i)))
			}
			slices.Reverse(want)
			pages, query := 0, ""
			for {
				page := api.get(ctx, "/v1/users"+query)
				Expect(page.status).To(Equal(http.StatusOK), page.body)
				for _, user := range page.object()["data"].([]any) {
					got = append(got, user.(map[string]any)["id"].(string))
				}
				pages++
				create(fmt.Sprint("meanwhile", pages))
				cursor, more := page.object()["next_cursor"].(string)
				if !more {
					break
				}
				query = "?limit=20&cursor=" + cursor
			}
			Expect(got).To(Equal(want))
			Expect(pages).To(Equal(3))
		})

		It("the user of an address without regard to case", func(ctx SpecContext) {
			api := start(ctx)
			ada := api.create(ctx, `{"email":"Ada+1@example.com"}`)
			api.create(ctx, `{"email":"b@example.com"}`)
			Expect(api.get(ctx, "/v1/users?email=aDA%2B1@eXample.com").body).
				To(MatchJSON(fmt.Sprintf(`{"data":[%s],"next_cursor":null}`, ada.body)))
		})

		It("all errors of an invalid query", func(ctx SpecContext) {
			problem := expectProblem(start(ctx).get(ctx, "/v1/users?email=a&limit=x&cursor=x&x"), http.StatusUnprocessableEntity, "validation-failed")
			Expect(problem["errors"]).To(Equal([]any{
				invalidValue("parameter", "limit", "must be a whole number"),
				invalidValue("parameter", "email", "must be a bare address such as ada@example.com"),
				invalidValue("parameter", "cursor", "must be the next_cursor of an earlier page"),
				invalidValue("parameter", "x", "is an unknown parameter"),
			}))
		})
	})
})
