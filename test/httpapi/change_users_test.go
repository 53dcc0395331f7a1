package httpapi_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/types"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
)

// An id that belongs to no user.
const unknownID = "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c12"

func (a *api) patch(ctx context.Context, path, body string, headers ...string) response {
	GinkgoHelper()
	return a.do(ctx, http.MethodPatch, path, strings.NewReader(body), headers...)
}

func (a *api) delete(ctx context.Context, path string, headers ...string) response {
	GinkgoHelper()
	return a.do(ctx, http.MethodDelete, path, nil, headers...)
}

// have creates a user with the address, and returns the path of the user.
func (a *api) have(ctx context.Context, email string) string {
	GinkgoHelper()
	created := a.create(ctx, fmt.Sprintf(`{"email":%q,"first_name":"Ada","last_name":"Lovelace"}`, email))
	Expect(created.status).To(Equal(http.StatusCreated), created.body)
	return created.header.Get("Location")
}

func idOf(path string) string { return strings.TrimPrefix(path, "/v1/users/") }

// changesOf returns the events after the users were created.
func changesOf(ctx context.Context) []storedEvent {
	GinkgoHelper()
	return slices.DeleteFunc(storedEvents(ctx), func(e storedEvent) bool { return e.EventType == "user_created" })
}

// beUpdate matches the user_updated event of the user at the path. changed is JSON.
func beUpdate(path, changed string) types.GomegaMatcher {
	return And(HaveField("EventType", "user_updated"),
		HaveField("EventContext", fmt.Sprintf(`{"user_id":%q,"changed":%s}`, idOf(path), changed)))
}

// beDeletion matches the user_deleted event of the user at the path.
func beDeletion(path string) types.GomegaMatcher {
	return And(HaveField("EventType", "user_deleted"), HaveField("EventContext", fmt.Sprintf(`{"user_id":%q}`, idOf(path))))
}

// expectEventsLead expects each user to have the values that its events lead to, in the
// order of event_date_time. It expects different times, and no user after user_deleted.
func expectEventsLead(ctx context.Context) {
	GinkgoHelper()
	type values struct{ Email, First, Last string }
	var events []struct {
		User     string  `db:"user"`
		Type     string  `db:"type"`
		Email    *string `db:"email"`
		First    *string `db:"first"`
		Last     *string `db:"last"`
		NewEmail *string `db:"newemail"`
		NewFirst *string `db:"newfirst"`
		NewLast  *string `db:"newlast"`
	}
	Expect(db.SelectContext(ctx, &events, `
		SELECT event_context->>'user_id' AS user, event_type AS type,
			event_context->>'email' AS email, event_context->>'first_name' AS first, event_context->>'last_name' AS last,
			event_context->'changed'->>'email' AS newemail, event_context->'changed'->>'first_name' AS newfirst,
			event_context->'changed'->>'last_name' AS newlast
		FROM outbox_events ORDER BY event_date_time`)).To(Succeed())
	led := map[string]values{}
	for _, e := range events {
		switch e.Type {
		case "user_created":
			led[e.User] = values{*e.Email, *e.First, *e.Last}
		case "user_deleted":
			delete(led, e.User)
		default:
			Expect(led).To(HaveKey(e.User))
			user := led[e.User]
			for value, changed := range map[*string]*string{&user.Email: e.NewEmail, &user.First: e.NewFirst, &user.Last: e.NewLast} {
				if changed != nil {
					Expect(*changed).NotTo(Equal(*value), "the event reports a value that did not change")
					*value = *changed
				}
			}
			led[e.User] = user
		}
	}
	var rows []struct {
		ID    string `db:"id"`
		Email string `db:"email"`
		First string `db:"first"`
		Last  string `db:"last"`
	}
	Expect(db.SelectContext(ctx, &rows, "SELECT id, email, first_name AS first, last_name AS last FROM users")).To(Succeed())
	stored := map[string]values{}
	for _, r := range rows {
		stored[r.ID] = values{r.Email, r.First, r.Last}
	}
	Expect(stored).To(Equal(led))
	Expect(count(ctx, "(SELECT DISTINCT event_context->>'user_id', event_date_time FROM outbox_events) AS times")).
		To(Equal(count(ctx, "outbox_events")))
}

// hold locks the row of the user at the path until release is called.
func hold(ctx context.Context, path string) (release func()) {
	GinkgoHelper()
	tx := begin(ctx)
	_, err := tx.ExecContext(ctx, "SELECT FROM users WHERE id = $1 FOR UPDATE", idOf(path))
	Expect(err).NotTo(HaveOccurred())
	return func() { _ = tx.Rollback() }
}

// holdAddress inserts a user with the address in a transaction that it leaves open.
func holdAddress(ctx context.Context, email string) *sqlx.Tx {
	GinkgoHelper()
	tx := begin(ctx)
	_, err := tx.ExecContext(ctx, `INSERT INTO users (id, email, created_at, updated_at)
		VALUES (gen_random_uuid(), $1, now(), now())`, email)
	Expect(err).NotTo(HaveOccurred())
	return tx
}

func begin(ctx context.Context) *sqlx.Tx {
	GinkgoHelper()
	tx, err := db.BeginTxx(context.WithoutCancel(ctx), nil)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { _ = tx.Rollback() })
	return tx
}

// together sends the requests at once, and returns their responses in any order.
func together(requests ...func() response) <-chan response {
	GinkgoHelper()
	responses := make(chan response, len(requests))
	for _, request := range requests {
		go func() {
			defer GinkgoRecover()
			responses <- request()
		}()
	}
	return responses
}

// statuses receives n responses, and returns their statuses in order.
func statuses(ctx context.Context, responses <-chan response, n int) (received []int) {
	GinkgoHelper()
	for range n {
		var one response
		Eventually(ctx, responses).Should(Receive(&one))
		received = append(received, one.status)
	}
	slices.Sort(received)
	return received
}

// waitingLong counts the transactions that wait with the longer lock_timeout.
func waitingLong(ctx context.Context) int {
	GinkgoHelper()
	return count(ctx, `pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()
		AND clock_timestamp() - xact_start > interval '200 ms'`)
}

var _ = Describe("Changing a user", func() {
	DescribeTable("sets the values of a merge patch, and publishes exactly the values that change",
		func(ctx SpecContext, body, email, firstName, lastName, changed string) {
			api := start(ctx)
			created := api.create(ctx, `{"email":"ada@example.com","first_name":"Ada","last_name":"Lovelace"}`)
			path, before := created.header.Get("Location"), created.object()
			const trace = "0af7651916cd43dd8448eb211c80319c"
			patched := api.patch(ctx, path, body, "Traceparent: 00-"+trace+"-b7ad6b7169203331-01")
			Expect(patched.status).To(Equal(http.StatusOK), patched.body)
			Expect(patched.header.Get("Content-Type")).To(Equal("application/json"))
			Expect(patched.header.Get("Cache-Control")).To(Equal("no-store"))
			Expect(patched.header).NotTo(HaveKey("Location"))
			user := patched.object()
			Expect(user).To(And(HaveLen(6), HaveKeyWithValue("id", before["id"]), HaveKeyWithValue("created_at", before["created_at"]),
				HaveKeyWithValue("email", email), HaveKeyWithValue("first_name", firstName), HaveKeyWithValue("last_name", lastName)))
			updated, err := time.Parse(time.RFC3339Nano, user["updated_at"].(string))
			Expect(err).NotTo(HaveOccurred())
			first, err := time.Parse(time.RFC3339Nano, before["updated_at"].(string))
			Expect(err).NotTo(HaveOccurred())
			Expect(updated).To(BeTemporally(">", first))

			found := api.get(ctx, path)
			Expect(found.body).To(Equal(patched.body))
			Expect(found.header.Get("ETag")).To(Equal(patched.header.Get("ETag")))
			Expect(patched.header.Get("ETag")).NotTo(Equal(created.header.Get("ETag")))

			events := changesOf(ctx)
			Expect(events).To(HaveExactElements(beUpdate(path, changed)))
			Expect(events[0].EventDateTime).To(BeTemporally("==", updated))
			Expect(events[0].MetadataVersion).To(BeEquivalentTo(1))
			Expect(events[0].Traceparent).To(ContainSubstring(trace))
		},
		Entry("of the address", `{"email":"bob@example.com"}`, "bob@example.com", "Ada", "Lovelace", `{"email":"bob@example.com"}`),
		Entry("of the address, in its normal form", `{"email":"Bob@EXAMPLE.com"}`, "Bob@example.com", "Ada", "Lovelace", `{"email":"Bob@example.com"}`),
		Entry("of the case of the address", `{"email":"ADA@example.com"}`, "ADA@example.com", "Ada", "Lovelace", `{"email":"ADA@example.com"}`),
		Entry("of the first name", `{"first_name":" Zoë <&> "}`, "ada@example.com", "Zoë <&>", "Lovelace", `{"first_name":"Zoë <&>"}`),
		Entry("of the last name", `{"last_name":"King"}`, "ada@example.com", "Ada", "King", `{"last_name":"King"}`),
		Entry("with an empty first name", `{"first_name":""}`, "ada@example.com", "", "Lovelace", `{"first_name":""}`),
		Entry("with null for the first name", `{"first_name":null}`, "ada@example.com", "", "Lovelace", `{"first_name":""}`),
		Entry("with null for the last name", `{"last_name":null}`, "ada@example.com", "Ada", "", `{"last_name":""}`),
		Entry("with null for both names", `{"last_name":null,"first_name":null}`, "ada@example.com", "", "", `{"first_name":"","last_name":""}`),
		Entry("of everything", `{"email":"b@example.com","first_name":"B","last_name":"C"}`, "b@example.com", "B", "C",
			`{"email":"b@example.com","first_name":"B","last_name":"C"}`),
		Entry("with values that the user has", `{"email":"ada@example.com","first_name":"Ada","last_name":"King"}`,
			"ada@example.com", "Ada", "King", `{"last_name":"King"}`),
	)

	DescribeTable("leaves the user as it is, and publishes nothing, with", func(ctx SpecContext, body string) {
		api := start(ctx)
		created := api.create(ctx, `{"email":"Ada@example.com","first_name":"Zoë"}`)
		patched := api.patch(ctx, created.header.Get("Location"), body)
		Expect(patched.status).To(Equal(http.StatusOK), patched.body)
		Expect(patched.body).To(Equal(created.body))
		Expect(patched.header.Get("ETag")).To(Equal(created.header.Get("ETag")))
		found := api.get(ctx, created.header.Get("Location"))
		Expect(found.body).To(Equal(created.body))
		Expect(found.header.Get("ETag")).To(Equal(created.header.Get("ETag")))
		Expect(changesOf(ctx)).To(BeEmpty())
	},
		Entry("an empty patch", `{}`),
		Entry("the user's values", `{"email":"Ada@example.com","first_name":"Zoë","last_name":""}`),
		Entry("the user's values in another form", `{"email":"Ada@EXAMPLE.com","first_name":" Zoe\u0308 ","last_name":"  "}`),
		Entry("null for an empty name", `{"last_name":null}`),
	)

	DescribeTable("is refused with", func(ctx SpecContext, body string, errors ...any) {
		api := start(ctx)
		created := api.create(ctx, `{"email":"ada@example.com","first_name":"Ada"}`)
		problem := expectProblem(api.patch(ctx, created.header.Get("Location"), body), http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(ConsistOf(errors...))
		Expect(api.get(ctx, created.header.Get("Location")).body).To(Equal(created.body))
		Expect(changesOf(ctx)).To(BeEmpty())
	},
		Entry("null for the address", `{"email":null,"first_name":"B"}`, invalidValue("pointer", "/email", "must be a string")),
		Entry("an empty address", `{"email":""}`, invalidValue("pointer", "/email", "must not be empty")),
		Entry("an unknown field", `{"first_name":"B","phone":"1"}`, invalidValue("pointer", "/phone", "is an unknown field")),
		Entry("fields that clients do not set", `{"id":"`+unknownID+`","created_at":null,"updated_at":null}`,
			invalidValue("pointer", "/id", "is an unknown field"), invalidValue("pointer", "/created_at", "is an unknown field"),
			invalidValue("pointer", "/updated_at", "is an unknown field")),
		Entry("several invalid values", `{"email":"ada","first_name":1,"last_name":"`+strings.Repeat("x", 101)+`"}`,
			invalidValue("pointer", "/email", "must be a bare address such as ada@example.com"),
			invalidValue("pointer", "/first_name", "must be a string"),
			invalidValue("pointer", "/last_name", "must not be longer than 100 characters")),
		Entry("null", `null`, invalidValue("pointer", "", "must be an object")),
		Entry("a JSON patch", `[{"op":"remove","path":"/first_name"}]`, invalidValue("pointer", "", "must be an object")),
	)

	It("is refused with invalid JSON", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		expectProblem(api.patch(ctx, path, `{"first_name":"A","first_name":"B"}`), http.StatusBadRequest, "invalid-json")
		expectProblem(api.patch(ctx, path, ``), http.StatusBadRequest, "invalid-json")
		Expect(changesOf(ctx)).To(BeEmpty())
	})

	DescribeTable("takes the media type", func(ctx SpecContext, mediaType string) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		Expect(api.patch(ctx, path, `{"first_name":null}`, "Content-Type: "+mediaType).object()).To(HaveKeyWithValue("first_name", ""))
	},
		Entry(nil, "application/merge-patch+json"),
		Entry(nil, "application/json"),
		Entry(nil, `Application/Merge-Patch+JSON; charset="UTF-8"`),
	)

	DescribeTable("refuses the media type", func(ctx SpecContext, mediaType string) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		problem := expectProblem(api.patch(ctx, path, `{"first_name":"B"}`, "Content-Type: "+mediaType),
			http.StatusUnsupportedMediaType, "unsupported-media-type")
		Expect(problem["detail"]).To(ContainSubstring("application/merge-patch+json or application/json"))
		Expect(changesOf(ctx)).To(BeEmpty())
	},
		Entry(nil, "application/json-patch+json"),
		Entry(nil, "text/plain"),
		Entry(nil, "application/merge-patch+json; charset=latin1"),
		Entry("that is empty", ""),
	)

	It("takes a merge patch only for one user", func(ctx SpecContext) {
		api := start(ctx)
		const patch = "Content-Type: application/merge-patch+json"
		for _, refused := range []response{
			api.create(ctx, `{"email":"ada@example.com"}`, patch),
			api.patch(ctx, "/v1/users/batch", `{"data":[{"id":"`+unknownID+`"}]}`, patch),
			api.do(ctx, http.MethodPost, "/v1/users/batch/delete", strings.NewReader(`{"data":[{"id":"`+unknownID+`"}]}`), patch),
		} {
			problem := expectProblem(refused, http.StatusUnsupportedMediaType, "unsupported-media-type")
			Expect(problem["detail"]).NotTo(ContainSubstring("merge-patch"))
		}
	})

	DescribeTable("finds no user with the id", func(ctx SpecContext, id string) {
		api := start(ctx)
		api.have(ctx, "ada@example.com")
		expectProblem(api.patch(ctx, "/v1/users/"+id, `{"first_name":"B"}`), http.StatusNotFound, "user-not-found")
		expectProblem(api.patch(ctx, "/v1/users/"+id, `{"first_name":"B"}`, "If-Match: *"), http.StatusNotFound, "user-not-found")
		Expect(changesOf(ctx)).To(BeEmpty())
	},
		Entry(nil, unknownID),
		Entry(nil, "00000000-0000-0000-0000-000000000000"),
		Entry("that is not a UUID", "x"),
		Entry("without hyphens", strings.ReplaceAll(unknownID, "-", "")),
	)

	It("finds the user with an id in upper case", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		Expect(api.patch(ctx, "/v1/users/"+strings.ToUpper(idOf(path)), `{"first_name":"B"}`).status).To(Equal(http.StatusOK))
		Expect(changesOf(ctx)).To(HaveExactElements(beUpdate(path, `{"first_name":"B"}`)))
	})

	It("sets a later updated_at even if the present one is in the future", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		_, err := db.ExecContext(ctx, "UPDATE users SET updated_at = '2200-01-01 00:00:00.123456Z'")
		Expect(err).NotTo(HaveOccurred())
		stale := api.get(ctx, path).header.Get("ETag")
		tags := []string{stale}
		for i := range 3 {
			patched := api.patch(ctx, path, fmt.Sprintf(`{"first_name":"%d"}`, i))
			Expect(patched.object()).To(HaveKeyWithValue("updated_at", fmt.Sprintf("2200-01-01T00:00:00.12345%dZ", 7+i)))
			Expect(tags).NotTo(ContainElement(patched.header.Get("ETag")))
			tags = append(tags, patched.header.Get("ETag"))
		}
		expectProblem(api.patch(ctx, path, `{"first_name":"B"}`, "If-Match: "+stale), http.StatusPreconditionFailed, "precondition-failed")
		Expect(api.delete(ctx, path).status).To(Equal(http.StatusNoContent))
		events := changesOf(ctx)
		Expect(events).To(HaveLen(4))
		for i, e := range events {
			Expect(e.EventDateTime).To(BeTemporally("==", time.Date(2200, 1, 1, 0, 0, 0, (123457+i)*1000, time.UTC)))
		}
	})

	It("publishes times that increase, in whichever order many requests change the user", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		const n = 40
		var requests []func() response
		for i := range n {
			body := fmt.Sprintf(`{"first_name":"%d"}`, i)
			if i%2 == 0 {
				body = fmt.Sprintf(`{"last_name":"%d"}`, i)
			}
			requests = append(requests, func() response { return api.patch(ctx, path, body) })
		}
		responses, tags := together(requests...), map[string]bool{}
		for range n {
			var patched response
			Eventually(ctx, responses).Should(Receive(&patched))
			Expect(patched.status).To(Equal(http.StatusOK), patched.body)
			tags[patched.header.Get("ETag")] = true
		}
		Expect(tags).To(HaveLen(n))
		Expect(changesOf(ctx)).To(HaveLen(n))
		expectEventsLead(ctx)
	})

	Describe("to an address", func() {
		It("of another user is refused", func(ctx SpecContext) {
			api := start(ctx)
			path := api.have(ctx, "ada@example.com")
			api.have(ctx, "bob@example.com")
			for _, email := range []string{"bob@example.com", "BOB@example.com"} {
				problem := expectProblem(api.patch(ctx, path, fmt.Sprintf(`{"email":%q,"first_name":"B"}`, email)), http.StatusConflict, "email-taken")
				Expect(problem["detail"]).To(Equal("User with this email already exists"))
			}
			Expect(changesOf(ctx)).To(BeEmpty())
		})

		It("that another user had before is allowed", func(ctx SpecContext) {
			api := start(ctx)
			ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
			Expect(api.patch(ctx, bob, `{"email":"eve@example.com"}`).status).To(Equal(http.StatusOK))
			Expect(api.patch(ctx, ada, `{"email":"Bob@example.com"}`).status).To(Equal(http.StatusOK))
			Expect(api.create(ctx, `{"email":"ADA@example.com"}`).status).To(Equal(http.StatusCreated))
			expectEventsLead(ctx)
		})

		It("succeeds for one of two users that wait for it at the same time", func(ctx SpecContext) {
			api := start(ctx)
			ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
			// Both statements find the address free, and wait for the insert.
			holder := holdAddress(ctx, "eve@example.com")
			responses := together(
				func() response { return api.patch(ctx, ada, `{"email":"eve@example.com"}`) },
				func() response { return api.patch(ctx, bob, `{"email":"Eve@example.com"}`) })
			Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(2))
			Expect(holder.Rollback()).To(Succeed())
			Expect(statuses(ctx, responses, 2)).To(Equal([]int{http.StatusOK, http.StatusConflict}))
			Expect(changesOf(ctx)).To(HaveLen(1))
			expectEventsLead(ctx)
		})

		DescribeTable("waits for a transaction that inserts it", func(ctx SpecContext, end func(*sqlx.Tx) error, status int) {
			api := start(ctx)
			path := api.have(ctx, "ada@example.com")
			holder := holdAddress(ctx, "bob@example.com")
			responses := together(func() response { return api.patch(ctx, path, `{"email":"Bob@example.com"}`) })
			Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(1))
			Expect(end(holder)).To(Succeed())
			Expect(statuses(ctx, responses, 1)).To(Equal([]int{status}))
			Expect(changesOf(ctx)).To(HaveLen(map[int]int{http.StatusOK: 1}[status]))
		},
			Entry("and is refused after the commit", (*sqlx.Tx).Commit, http.StatusConflict),
			Entry("and succeeds after the rollback", (*sqlx.Tx).Rollback, http.StatusOK),
		)

		DescribeTable("waits longer than lock_timeout for a transaction that inserts it", func(ctx SpecContext, end func(*sqlx.Tx) error, status int) {
			api := start(ctx, onDatabase(likeTheProgram(suite.LastingPostgresDSN(ctx), 8)))
			path := api.have(ctx, "ada@example.com")
			holder := holdAddress(ctx, "bob@example.com")
			responses := together(func() response { return api.patch(ctx, path, `{"email":"Bob@example.com"}`) })
			Eventually(ctx, waitingLong).WithArguments(ctx).Should(Equal(1))
			Expect(end(holder)).To(Succeed())
			Expect(statuses(ctx, responses, 1)).To(Equal([]int{status}))
			Expect(changesOf(ctx)).To(HaveLen(map[int]int{http.StatusOK: 1}[status]))
		},
			Entry("and is refused after the commit", (*sqlx.Tx).Commit, http.StatusConflict),
			Entry("and succeeds after the rollback", (*sqlx.Tx).Rollback, http.StatusOK),
		)

		It("waits for a request that creates a user with it", func(ctx SpecContext) {
			api := start(ctx)
			path := api.have(ctx, "ada@example.com")
			var requests []func() response
			for range 10 {
				requests = append(requests,
					func() response { return api.create(ctx, `{"email":"bob@example.com"}`) },
					func() response { return api.patch(ctx, path, `{"email":"Bob@example.com"}`) },
					func() response { return api.patch(ctx, path, `{"email":"ada@example.com"}`) })
			}
			for _, status := range statuses(ctx, together(requests...), len(requests)) {
				Expect(status).To(BeElementOf(http.StatusOK, http.StatusCreated, http.StatusConflict))
			}
			expectEventsLead(ctx)
		})
	})

	It("is refused with the problem locked while another transaction locks the user", func(ctx SpecContext) {
		api := start(ctx, onDatabase(likeTheProgram(suite.LastingPostgresDSN(ctx), 8)))
		path := api.have(ctx, "ada@example.com")
		other := api.have(ctx, "bob@example.com")
		release := hold(ctx, path)
		item := fmt.Sprintf(`{"data":[{"id":%q},{"id":%q}]}`, idOf(path), idOf(other))
		responses := together(
			func() response { return api.patch(ctx, path, `{"first_name":"B"}`) },
			func() response { return api.delete(ctx, path) },
			func() response { return api.patch(ctx, "/v1/users/batch", item) },
			func() response {
				return api.do(ctx, http.MethodPost, "/v1/users/batch/delete", strings.NewReader(item))
			})
		for range 4 {
			var refused response
			Eventually(ctx, responses).Should(Receive(&refused))
			expectProblem(refused, http.StatusServiceUnavailable, "locked")
			Expect(refused.header.Get("Retry-After")).To(Equal("1"))
		}
		Expect(changesOf(ctx)).To(BeEmpty())
		release()
		Expect(api.patch(ctx, path, `{"first_name":"B"}`).status).To(Equal(http.StatusOK))
		Expect(string(api.log.Contents())).NotTo(ContainSubstring(`"level":"ERROR"`))
	})

	It("finds no user if the user is deleted while the request waits", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		holder := begin(ctx)
		holder.MustExecContext(ctx, "DELETE FROM users")
		responses := together(
			func() response { return api.patch(ctx, path, `{"first_name":"B"}`) },
			func() response { return api.delete(ctx, path) })
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(2))
		Expect(holder.Commit()).To(Succeed())
		Expect(statuses(ctx, responses, 2)).To(Equal([]int{http.StatusNoContent, http.StatusNotFound}))
		Expect(changesOf(ctx)).To(BeEmpty())
	})

	It("makes neither the change nor the event if the commit fails", func(ctx SpecContext) {
		api := start(ctx)
		created := api.create(ctx, `{"email":"ada@example.com"}`)
		path := created.header.Get("Location")
		_, err := db.ExecContext(ctx, `
			CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;
			CREATE CONSTRAINT TRIGGER refuse_change AFTER UPDATE OR DELETE ON users
				DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_change()`)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func(ctx SpecContext) {
			_, err := db.ExecContext(ctx, "DROP FUNCTION refuse_change CASCADE")
			Expect(err).NotTo(HaveOccurred())
		})
		expectProblem(api.patch(ctx, path, `{"first_name":"B"}`, "Idempotency-Key: k"), http.StatusInternalServerError, "internal-error")
		expectProblem(api.delete(ctx, path, "Idempotency-Key: l"), http.StatusInternalServerError, "internal-error")
		Expect(api.get(ctx, path).body).To(Equal(created.body))
		Expect(changesOf(ctx)).To(BeEmpty())
		Expect(count(ctx, "idempotency_keys")).To(BeZero())
	})
})

var _ = Describe("An ETag", func() {
	It("is the same in each response with the same version of the user", func(ctx SpecContext) {
		api := start(ctx)
		const key = "Idempotency-Key: "
		created := api.create(ctx, `{"email":"ada@example.com"}`, key+"a")
		path, first := created.header.Get("Location"), created.header.Get("ETag")
		Expect(first).To(MatchRegexp(`^"[!#-~]+"$`))
		patched := api.patch(ctx, path, `{"first_name":"B"}`, key+"b")
		second := patched.header.Get("ETag")
		Expect(second).To(And(MatchRegexp(`^"[!#-~]+"$`), Not(Equal(first))))
		for _, read := range []response{api.get(ctx, path), api.do(ctx, http.MethodHead, path, nil), api.patch(ctx, path, `{}`)} {
			Expect(read.header.Get("ETag")).To(Equal(second))
		}

		By("replaying the first response with its ETag")
		Expect(api.patch(ctx, path, `{"first_name":"C"}`).status).To(Equal(http.StatusOK))
		for tag, replayed := range map[string]response{
			first: api.create(ctx, `{"email":"ada@example.com"}`, key+"a"), second: api.patch(ctx, path, `{"first_name":"B"}`, key+"b"),
		} {
			Expect(replayed.header.Get("Idempotency-Replayed")).To(Equal("true"))
			Expect(replayed.header.Get("ETag")).To(Equal(tag))
		}
		Expect(changesOf(ctx)).To(HaveLen(2))
	})

	It("is in the response to a create that commits alone", func(ctx SpecContext) {
		// A group cannot replace an expired key.
		api := start(ctx)
		const body, key = `{"email":"ada@example.com"}`, "Idempotency-Key: k"
		created := api.create(ctx, body, key)
		Expect(api.create(ctx, body, key).header.Get("ETag")).To(Equal(created.header.Get("ETag")))
		_, err := db.ExecContext(ctx, "UPDATE idempotency_keys SET expires_at = now() - interval '1 s'")
		Expect(err).NotTo(HaveOccurred())
		other := api.create(ctx, `{"email":"bob@example.com"}`, key)
		Expect(other.status).To(Equal(http.StatusCreated), other.body)
		Expect(api.get(ctx, other.header.Get("Location")).header.Get("ETag")).To(Equal(other.header.Get("ETag")))
	})

	It("is not in other responses", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		for _, other := range []response{
			api.get(ctx, "/v1/users"), api.get(ctx, "/v1/users/"+unknownID),
			api.patch(ctx, path, `{"first_name":"B"}`, `If-Match: "x"`),
			api.patch(ctx, "/v1/users/batch", fmt.Sprintf(`{"data":[{"id":%q}]}`, idOf(path))),
			api.delete(ctx, path),
		} {
			Expect(other.header).NotTo(HaveKey("Etag"), other.body)
		}
	})
})

var _ = Describe("If-Match", func() {
	// withTags replaces ETAG and OLD by the ETags of the user.
	var api *api
	var path string
	var withTags *strings.Replacer
	BeforeEach(func(ctx SpecContext) {
		api = start(ctx)
		created := api.create(ctx, `{"email":"ada@example.com"}`)
		path = created.header.Get("Location")
		patched := api.patch(ctx, path, `{"first_name":"A"}`)
		withTags = strings.NewReplacer("ETAG", patched.header.Get("ETag"), "OLD", created.header.Get("ETag"))
	})

	const matches, fails, malformed = http.StatusOK, http.StatusPreconditionFailed, http.StatusBadRequest
	DescribeTable("is a condition on PATCH and DELETE", func(ctx SpecContext, status int, headers ...string) {
		for i := range headers {
			headers[i] = withTags.Replace("If-Match: " + headers[i])
		}
		patched := api.patch(ctx, path, `{}`, headers...)
		changed := api.patch(ctx, path, `{"last_name":"B"}`, headers...)
		if status == matches {
			Expect(patched.status).To(Equal(http.StatusOK), patched.body)
			Expect(changed.status).To(Equal(http.StatusOK), changed.body)
			Expect(changesOf(ctx)).To(HaveLen(2))
			return
		}
		deleted := api.delete(ctx, path, headers...)
		for _, refused := range []response{patched, changed, deleted} {
			problem := expectProblem(refused, status, map[int]string{fails: "precondition-failed", malformed: "malformed-request"}[status])
			if status == malformed {
				Expect(problem["detail"]).To(ContainSubstring("If-Match"))
			}
		}
		Expect(api.get(ctx, path).object()).To(HaveKeyWithValue("last_name", ""))
		Expect(changesOf(ctx)).To(HaveLen(1))
	},
		Entry("that the present version meets", matches, `ETAG`),
		Entry("that any version meets", matches, `*`),
		Entry("that one of the tags meets", matches, `OLD, ETAG`),
		Entry("that one of the tags meets, without spaces", matches, `"x",ETAG,W/"y"`),
		Entry("that a tag in the second header meets", matches, `OLD`, `ETAG`),
		Entry("that a tag meets, with tabs and spaces", matches, "\"a\" \t,\t ETAG"),
		Entry("that an earlier version met", fails, `OLD`),
		Entry("that a weak tag never meets", fails, `W/ETAG`),
		Entry("that no tag meets", fails, `"x", "", OLD`),
		Entry("that a tag with a comma does not meet", fails, `"a,b", "W/"`),
		Entry("that a tag with other characters does not meet", fails, `"é", "ß", "`+"\xff"+`"`),
		Entry("that is malformed without quotes", malformed, `1764403200000000`),
		Entry("that is malformed if it is empty", malformed, ``),
		Entry("that is malformed with only commas", malformed, `, ,`),
		Entry("that is malformed with half of the quotes", malformed, `"1`),
		Entry("that is malformed without a comma", malformed, `ETAG OLD`),
		Entry("that is malformed with a lower-case w", malformed, `w/ETAG`),
		Entry("that is malformed with a space in a tag", malformed, `"a b"`),
		Entry("that is malformed with * in a list", malformed, `*, ETAG`),
		Entry("that is malformed with two *", malformed, `*`, `*`),
		Entry("that is malformed with other text", malformed, `ETAG; q=1`),
	)

	It("may have empty elements in its list, which clients must not send", func(ctx SpecContext) {
		request, err := http.NewRequestWithContext(ctx, http.MethodDelete, api.url+path, http.NoBody)
		Expect(err).NotTo(HaveOccurred())
		request.Header.Set("If-Match", withTags.Replace(`, OLD,, ETAG ,`))
		deleted, err := http.DefaultClient.Do(request)
		Expect(err).NotTo(HaveOccurred())
		Expect(deleted.Body.Close()).To(Succeed())
		Expect(deleted.StatusCode).To(Equal(http.StatusNoContent))
	})

	It("can be long", func(ctx SpecContext) {
		tags := strings.Repeat(`"x",`, 10_000)
		Expect(api.patch(ctx, path, `{"last_name":"B"}`, withTags.Replace("If-Match: "+tags+"ETAG")).status).To(Equal(http.StatusOK))
		expectProblem(api.patch(ctx, path, `{"last_name":"C"}`, "If-Match: "+tags+"x"), http.StatusBadRequest, "malformed-request")
	})

	It("lets exactly one of two requests with the same tag change the user", func(ctx SpecContext) {
		release := hold(ctx, path)
		change := func(name string) func() response {
			return func() response {
				return api.patch(ctx, path, fmt.Sprintf(`{"last_name":%q}`, name), withTags.Replace("If-Match: ETAG"))
			}
		}
		responses := together(change("B"), change("C"))
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(2))
		release()
		Expect(statuses(ctx, responses, 2)).To(Equal([]int{http.StatusOK, http.StatusPreconditionFailed}))
		Expect(changesOf(ctx)).To(HaveLen(2))
	})

	It("lets a change or the deletion win, if both have the same tag", func(ctx SpecContext) {
		release := hold(ctx, path)
		responses := together(
			func() response { return api.patch(ctx, path, `{"last_name":"B"}`, withTags.Replace("If-Match: ETAG")) },
			func() response { return api.delete(ctx, path, withTags.Replace("If-Match: ETAG")) })
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(2))
		release()
		Expect(statuses(ctx, responses, 2)).To(Or(
			Equal([]int{http.StatusOK, http.StatusPreconditionFailed}), // the change came first
			Equal([]int{http.StatusNoContent, http.StatusNotFound})))
		Expect(changesOf(ctx)).To(HaveLen(2))
		expectEventsLead(ctx)
	})

	It("is checked before the address", func(ctx SpecContext) {
		api.have(ctx, "bob@example.com")
		expectProblem(api.patch(ctx, path, `{"email":"bob@example.com"}`, withTags.Replace("If-Match: OLD")),
			http.StatusPreconditionFailed, "precondition-failed")
	})

	It("does not prevent the replay of a change that was made", func(ctx SpecContext) {
		headers := []string{withTags.Replace("If-Match: ETAG"), "Idempotency-Key: k"}
		first := api.patch(ctx, path, `{"last_name":"B"}`, headers...)
		Expect(first.status).To(Equal(http.StatusOK), first.body)
		again := api.patch(ctx, path, `{"last_name":"B"}`, headers...)
		Expect(again.status).To(Equal(http.StatusOK), again.body)
		Expect(again.body).To(Equal(first.body))
		Expect(changesOf(ctx)).To(HaveLen(2))
	})

	It("does not store the key if it fails", func(ctx SpecContext) {
		const body, key = `{"last_name":"B"}`, "Idempotency-Key: k"
		expectProblem(api.patch(ctx, path, body, key, withTags.Replace("If-Match: OLD")), http.StatusPreconditionFailed, "precondition-failed")
		changed := api.patch(ctx, path, body, key, withTags.Replace("If-Match: ETAG"))
		Expect(changed.status).To(Equal(http.StatusOK), changed.body)
		Expect(changed.header).NotTo(HaveKey("Idempotency-Replayed"))
	})

	It("deletes the version of its tag", func(ctx SpecContext) {
		Expect(api.delete(ctx, path, withTags.Replace("If-Match: ETAG")).status).To(Equal(http.StatusNoContent))
		Expect(changesOf(ctx)).To(HaveExactElements(HaveField("EventType", "user_updated"), beDeletion(path)))
		for _, tag := range []string{"ETAG", "OLD", "*"} { // the deletion has been made
			Expect(api.delete(ctx, path, withTags.Replace("If-Match: "+tag)).status).To(Equal(http.StatusNoContent))
		}
		Expect(changesOf(ctx)).To(HaveLen(2))
	})
})

var _ = Describe("Deleting a user", func() {
	It("deletes the user, publishes one event, and can be repeated", func(ctx SpecContext) {
		api := start(ctx)
		path, other := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		const trace = "0af7651916cd43dd8448eb211c80319c"
		for range 2 {
			deleted := api.delete(ctx, path, "Traceparent: 00-"+trace+"-b7ad6b7169203331-01")
			Expect(deleted.status).To(Equal(http.StatusNoContent), deleted.body)
			Expect(deleted.body).To(BeEmpty())
			Expect(deleted.header).NotTo(HaveKey("Content-Type"))
			Expect(deleted.header.Get("X-Request-ID")).NotTo(BeEmpty())
			Expect(deleted.header.Get("Cache-Control")).To(Equal("no-store"))
		}
		events := changesOf(ctx)
		Expect(events).To(HaveExactElements(beDeletion(path)))
		Expect(events[0].EventDateTime).To(BeTemporally("~", time.Now(), time.Minute))
		Expect(events[0].Traceparent).To(ContainSubstring(trace))
		expectProblem(api.get(ctx, path), http.StatusNotFound, "user-not-found")
		expectProblem(api.patch(ctx, path, `{"first_name":"B"}`), http.StatusNotFound, "user-not-found")
		Expect(api.get(ctx, other).status).To(Equal(http.StatusOK))
		Expect(api.get(ctx, "/v1/users").object()["data"]).To(HaveLen(1))
		expectEventsLead(ctx)
	})

	It("frees the address", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		Expect(api.delete(ctx, ada).status).To(Equal(http.StatusNoContent))
		Expect(api.patch(ctx, bob, `{"email":"Ada@example.com"}`).status).To(Equal(http.StatusOK))
		Expect(api.delete(ctx, bob).status).To(Equal(http.StatusNoContent))
		Expect(api.have(ctx, "ada@example.com")).NotTo(Equal(ada))
		expectEventsLead(ctx)
	})

	It("finds no user with an id that is not a UUID, and counts an unknown id as deleted", func(ctx SpecContext) {
		api := start(ctx)
		api.have(ctx, "ada@example.com")
		for _, id := range []string{"x", strings.ReplaceAll(unknownID, "-", "")} {
			expectProblem(api.delete(ctx, "/v1/users/"+id), http.StatusNotFound, "user-not-found")
		}
		Expect(api.delete(ctx, "/v1/users/"+unknownID).status).To(Equal(http.StatusNoContent))
		Expect(changesOf(ctx)).To(BeEmpty())
		Expect(count(ctx, "users")).To(Equal(1))
	})

	DescribeTable("ignores the body", func(ctx SpecContext, body string, headers ...string) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		deleted := api.do(ctx, http.MethodDelete, path, strings.NewReader(body), headers...)
		Expect(deleted.status).To(Equal(http.StatusNoContent), deleted.body)
		Expect(changesOf(ctx)).To(HaveExactElements(beDeletion(path)))
		Expect(api.get(ctx, "/v1/users").status).To(Equal(http.StatusOK))
	},
		Entry("in JSON", `{"x":1}`),
		Entry("in another media type", `x`, "Content-Type: text/plain"),
		Entry("that is large", strings.Repeat("x", 1<<20)),
	)

	It("publishes one event if many requests delete the user at once", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		release := hold(ctx, path)
		var requests []func() response
		for range 10 {
			requests = append(requests, func() response { return api.delete(ctx, path) })
		}
		responses := together(requests...)
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(len(requests)))
		release()
		Expect(statuses(ctx, responses, len(requests))).To(HaveEach(http.StatusNoContent))
		Expect(changesOf(ctx)).To(HaveExactElements(beDeletion(path)))
	})
})

var _ = Describe("An idempotency key", func() {
	const key = "Idempotency-Key: k"

	It("replays the change of a user", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		first := api.patch(ctx, path, `{"first_name":"B"}`, key)
		Expect(first.status).To(Equal(http.StatusOK), first.body)
		Expect(first.header).NotTo(HaveKey("Idempotency-Replayed"))
		Expect(api.patch(ctx, path, `{"first_name":"C"}`).status).To(Equal(http.StatusOK))
		again := api.patch(ctx, path, `{"first_name":"B"}`, key)
		Expect(again.status).To(Equal(http.StatusOK))
		Expect(again.body).To(Equal(first.body))
		Expect(again.header.Get("Idempotency-Replayed")).To(Equal("true"))
		Expect(again.header.Get("Content-Type")).To(Equal("application/json"))
		Expect(api.get(ctx, path).object()).To(HaveKeyWithValue("first_name", "C"))
		Expect(changesOf(ctx)).To(HaveLen(2))

		By("even after the user was deleted")
		Expect(api.delete(ctx, path).status).To(Equal(http.StatusNoContent))
		Expect(api.patch(ctx, path, `{"first_name":"B"}`, key).body).To(Equal(first.body))
	})

	It("replays a change that left the user as it was", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		first := api.patch(ctx, path, `{}`, key)
		Expect(api.patch(ctx, path, `{"first_name":"B"}`).status).To(Equal(http.StatusOK))
		again := api.patch(ctx, path, `{}`, key)
		Expect(again.header.Get("Idempotency-Replayed")).To(Equal("true"))
		Expect(again.header.Get("ETag")).To(Equal(first.header.Get("ETag")))
		Expect(again.body).To(Equal(first.body))
	})

	It("replays a deletion with an empty body", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		for _, replayed := range []string{"", "true", "true"} {
			deleted := api.delete(ctx, path, key)
			Expect(deleted.status).To(Equal(http.StatusNoContent), deleted.body)
			Expect(deleted.body).To(BeEmpty())
			Expect(deleted.header.Get("Idempotency-Replayed")).To(Equal(replayed))
			for _, name := range []string{"Content-Type", "Etag", "Location"} {
				Expect(deleted.header).NotTo(HaveKey(name))
			}
		}
		Expect(changesOf(ctx)).To(HaveExactElements(beDeletion(path)))
	})

	It("replays the changes and the deletions of many users", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		update := func() response {
			return api.patch(ctx, "/v1/users/batch", fmt.Sprintf(`{"data":[{"id":%q,"first_name":"B"},{}]}`, idOf(path)), "Idempotency-Key: u")
		}
		remove := func() response {
			return api.do(ctx, http.MethodPost, "/v1/users/batch/delete", strings.NewReader(fmt.Sprintf(`{"data":[{"id":%q},{}]}`, idOf(path))), "Idempotency-Key: d")
		}
		for _, request := range []func() response{update, remove} {
			first, again := request(), request()
			Expect(first.status).To(Equal(http.StatusOK), first.body)
			Expect(again.body).To(Equal(first.body))
			Expect(again.header.Get("Idempotency-Replayed")).To(Equal("true"))
		}
		Expect(changesOf(ctx)).To(HaveExactElements(beUpdate(path, `{"first_name":"B"}`), beDeletion(path)))
	})

	It("is refused for another user, body or method", func(ctx SpecContext) {
		api := start(ctx)
		path, other := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		Expect(api.patch(ctx, path, `{"first_name":"B"}`, key).status).To(Equal(http.StatusOK))
		for _, refused := range []response{
			api.patch(ctx, path, `{"first_name":"C"}`, key), api.patch(ctx, other, `{"first_name":"B"}`, key),
			api.delete(ctx, path, key), api.create(ctx, `{"email":"eve@example.com"}`, key),
		} {
			expectProblem(refused, http.StatusUnprocessableEntity, "idempotency-key-reused")
		}
		Expect(api.delete(ctx, other, "Idempotency-Key: l").status).To(Equal(http.StatusNoContent))
		expectProblem(api.delete(ctx, path, "Idempotency-Key: l"), http.StatusUnprocessableEntity, "idempotency-key-reused")
		Expect(changesOf(ctx)).To(HaveExactElements(beUpdate(path, `{"first_name":"B"}`), beDeletion(other)))
	})

	It("is not stored if the change is refused", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		taken := api.have(ctx, "bob@example.com")
		expectProblem(api.patch(ctx, "/v1/users/"+unknownID, `{"first_name":"B"}`, key), http.StatusNotFound, "user-not-found")
		expectProblem(api.patch(ctx, path, `{"email":"bob@example.com"}`, key), http.StatusConflict, "email-taken")
		expectProblem(api.patch(ctx, path, `{"email":null}`, key), http.StatusUnprocessableEntity, "validation-failed")
		expectProblem(api.delete(ctx, path, key, `If-Match: "x"`), http.StatusPreconditionFailed, "precondition-failed")
		Expect(count(ctx, "idempotency_keys")).To(BeZero())
		Expect(api.delete(ctx, taken).status).To(Equal(http.StatusNoContent))
		Expect(api.patch(ctx, path, `{"email":"bob@example.com"}`, key).status).To(Equal(http.StatusOK))
	})

	It("is in use while a request with it changes or deletes the user", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		for _, request := range []func() response{
			func() response { return api.patch(ctx, path, `{"first_name":"B"}`, "Idempotency-Key: u") },
			func() response { return api.delete(ctx, path, "Idempotency-Key: d") },
		} {
			release := hold(ctx, path)
			responses := together(request)
			Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(1))
			expectProblem(request(), http.StatusConflict, "idempotency-key-in-use")
			release()
			var made response
			Eventually(ctx, responses).Should(Receive(&made))
			Expect(made.status).To(BeNumerically("<", http.StatusMultipleChoices), made.body)
			again := request()
			Expect(again.status).To(Equal(made.status), again.body)
			Expect(again.body).To(Equal(made.body))
		}
		Expect(changesOf(ctx)).To(HaveLen(2))
	})
})

// results returns the elements of data in the response to a batch.
func results(a response) []any {
	GinkgoHelper()
	Expect(a.status).To(Equal(http.StatusOK), a.body)
	return a.object()["data"].([]any)
}

// beResult matches the result of an item that has a user.
func beResult(user ...types.GomegaMatcher) types.GomegaMatcher {
	return And(HaveLen(2), HaveKeyWithValue("status", 200.), HaveKeyWithValue("user", And(user...)))
}

// beProblem matches the result of an item with one invalid value.
func beProblem(status int, slug, pointer, detail string) types.GomegaMatcher {
	return And(HaveLen(2), HaveKeyWithValue("status", float64(status)), HaveKeyWithValue("problem", And(
		HaveKeyWithValue("type", HaveSuffix("#"+slug)), HaveKeyWithValue("status", float64(status)),
		HaveKeyWithValue("errors", ConsistOf(invalidValue("pointer", pointer, detail))))))
}

// aBatch returns the body of a batch.
func aBatch(items ...string) string { return `{"data":[` + strings.Join(items, ",") + `]}` }

const notUUID = "must be a UUID such as 019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c12"

var _ = Describe("Changing many users", func() {
	update := func(ctx context.Context, a *api, query string, items ...string) response {
		GinkgoHelper()
		return a.patch(ctx, "/v1/users/batch"+query, aBatch(items...))
	}
	// change returns an item of a batch. The members are JSON.
	change := func(path, members string) string { return fmt.Sprintf(`{"id":%q,%s}`, idOf(path), members) }

	It("changes each user with its event, and returns the results in the same order", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob, eve := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com"), api.have(ctx, "eve@example.com")
		before := api.get(ctx, eve)
		updated := results(update(ctx, api, "",
			change(eve, `"first_name":"Ada"`),
			change(bob, `"email":"EVE@example.com","first_name":"Bob"`),
			change("/v1/users/"+unknownID, `"first_name":"B"`),
			change("/v1/users/x", `"first_name":"B"`),
			`{"first_name":"B"}`,
			`7`,
			change(ada, `"email":"Zoe@example.com","first_name":null`),
			change(bob, `"email":null,"x":1`),
			`{"id":null}`,
			`{"id":"00000000-0000-0000-0000-000000000000"}`,
			fmt.Sprintf(`{"id":%q}`, strings.ToUpper(idOf(bob)))))
		Expect(updated).To(HaveExactElements(
			beResult(HaveKeyWithValue("id", idOf(eve)), HaveKeyWithValue("first_name", "Ada")),
			beProblem(409, "email-taken", "/data/1/email", "is taken"),
			beProblem(404, "user-not-found", "/data/2/id", "belongs to no user"),
			beProblem(422, "validation-failed", "/data/3/id", notUUID),
			beProblem(422, "validation-failed", "/data/4/id", "is required"),
			beProblem(422, "validation-failed", "/data/5", "must be an object"),
			beResult(HaveKeyWithValue("email", "Zoe@example.com"), HaveKeyWithValue("first_name", ""), HaveKeyWithValue("last_name", "Lovelace")),
			HaveKeyWithValue("problem", HaveKeyWithValue("errors", ConsistOf(
				invalidValue("pointer", "/data/7/email", "must be a string"), invalidValue("pointer", "/data/7/x", "is an unknown field")))),
			beProblem(422, "validation-failed", "/data/8/id", notUUID),
			beProblem(422, "validation-failed", "/data/9/id", notUUID),
			beResult(HaveKeyWithValue("id", idOf(bob)), HaveKeyWithValue("email", "bob@example.com"), HaveKeyWithValue("first_name", "Ada"))))
		Expect(api.get(ctx, ada).object()).To(Equal(updated[6].(map[string]any)["user"]))
		Expect(api.get(ctx, eve).body).To(Equal(before.body))
		Expect(changesOf(ctx)).To(HaveExactElements(beUpdate(ada, `{"email":"Zoe@example.com","first_name":""}`)))
		expectEventsLead(ctx)
	})

	DescribeTable("changes all users or none with atomic=true", func(ctx SpecContext, status int, slug, members, pointer, detail string) {
		api := start(ctx)
		ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		problem := expectProblem(update(ctx, api, "?atomic=true", change(ada, `"first_name":"B"`), "{"+members+"}"), status, slug)
		Expect(problem["errors"]).To(ConsistOf(invalidValue("pointer", pointer, detail)))
		Expect(changesOf(ctx)).To(BeEmpty())
		Expect(api.get(ctx, ada).object()).To(HaveKeyWithValue("first_name", "Ada"))
		Expect(results(update(ctx, api, "?atomic=true", change(ada, `"first_name":"B"`), change(bob, `"first_name":"B"`)))).To(HaveLen(2))
		Expect(changesOf(ctx)).To(HaveExactElements(beUpdate(ada, `{"first_name":"B"}`), beUpdate(bob, `{"first_name":"B"}`)))
	},
		Entry("if an id is unknown", 404, "user-not-found", `"id":"`+unknownID+`"`, "/data/1/id", "belongs to no user"),
		Entry("if an id is invalid", 422, "validation-failed", `"id":7`, "/data/1/id", notUUID),
		Entry("if an id is missing", 422, "validation-failed", ``, "/data/1/id", "is required"),
		Entry("if an address is invalid", 422, "validation-failed", `"id":"`+unknownID+`","email":null`, "/data/1/email", "must be a string"),
	)

	It("changes no user with atomic=true if an address is taken", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		problem := expectProblem(update(ctx, api, "?atomic=true", change(ada, `"first_name":"B"`), change(bob, `"email":"ada@example.com"`),
			change("/v1/users/"+unknownID, `"first_name":"B"`)), http.StatusConflict, "email-taken")
		Expect(problem["errors"]).To(ConsistOf(
			invalidValue("pointer", "/data/1/email", "is taken"), invalidValue("pointer", "/data/2/id", "belongs to no user")))
		Expect(changesOf(ctx)).To(BeEmpty())
	})

	It("makes two changes of the same user one after the other", func(ctx SpecContext) {
		api := start(ctx)
		ada := api.have(ctx, "ada@example.com")
		updated := results(update(ctx, api, "",
			change(ada, `"email":"x@example.com","first_name":"B"`), change(ada, `"first_name":"B","last_name":"C"`),
			change(ada, `"last_name":"C"`), change(ada, `"email":"ADA@example.com"`)))
		Expect(updated).To(HaveExactElements(
			beResult(HaveKeyWithValue("email", "x@example.com"), HaveKeyWithValue("first_name", "B"), HaveKeyWithValue("last_name", "Lovelace")),
			beResult(HaveKeyWithValue("email", "x@example.com"), HaveKeyWithValue("first_name", "B"), HaveKeyWithValue("last_name", "C")),
			Equal(updated[1]),
			beResult(HaveKeyWithValue("email", "ADA@example.com"), HaveKeyWithValue("first_name", "B"), HaveKeyWithValue("last_name", "C"))))
		Expect(api.get(ctx, ada).object()).To(Equal(updated[3].(map[string]any)["user"]))
		events := changesOf(ctx)
		Expect(events).To(HaveExactElements(beUpdate(ada, `{"email":"x@example.com","first_name":"B"}`),
			beUpdate(ada, `{"last_name":"C"}`), beUpdate(ada, `{"email":"ADA@example.com"}`)))
		for i, result := range []any{updated[0], updated[1], updated[3]} {
			at, err := time.Parse(time.RFC3339Nano, result.(map[string]any)["user"].(map[string]any)["updated_at"].(string))
			Expect(err).NotTo(HaveOccurred())
			Expect(events[i].EventDateTime).To(BeTemporally("==", at))
		}
		expectEventsLead(ctx)
	})

	It("refuses addresses that users had before the request, or get in it", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob, eve := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com"), api.have(ctx, "eve@example.com")
		taken := func(i int) types.GomegaMatcher {
			return beProblem(409, "email-taken", fmt.Sprintf("/data/%d/email", i), "is taken")
		}
		By("refusing both halves of an exchange")
		exchange := []string{change(ada, `"email":"bob@example.com"`), change(bob, `"email":"ada@example.com"`)}
		Expect(results(update(ctx, api, "", exchange...))).To(HaveExactElements(taken(0), taken(1)))
		expectProblem(update(ctx, api, "?atomic=true", exchange...), http.StatusConflict, "email-taken")
		Expect(changesOf(ctx)).To(BeEmpty())
		By("refusing an address that another item frees")
		Expect(results(update(ctx, api, "", change(ada, `"email":"new@example.com"`), change(bob, `"email":"Ada@example.com"`),
			change(eve, `"email":"New@example.com"`)))).To(HaveExactElements(beResult(), taken(1), taken(2)))
		Expect(changesOf(ctx)).To(HaveExactElements(beUpdate(ada, `{"email":"new@example.com"}`)))
		By("allowing it in the next request")
		Expect(results(update(ctx, api, "", change(bob, `"email":"Ada@example.com"`)))).To(HaveExactElements(beResult()))
		expectEventsLead(ctx)
	})

	It("waits for a transaction that inserts one of the addresses", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		holder := holdAddress(ctx, "new@example.com")
		responses := together(func() response {
			return update(ctx, api, "", change(ada, `"email":"NEW@example.com"`), change(bob, `"first_name":"B"`))
		})
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(1))
		Expect(holder.Commit()).To(Succeed())
		var updated response
		Eventually(ctx, responses).Should(Receive(&updated))
		Expect(results(updated)).To(HaveExactElements(beProblem(409, "email-taken", "/data/0/email", "is taken"), beResult()))
		Expect(changesOf(ctx)).To(HaveExactElements(beUpdate(bob, `{"first_name":"B"}`)))
	})

	It("changes and deletes 1,000 users, and refuses more", func(ctx SpecContext) {
		api := start(ctx)
		const n = 1000
		items := make([]string, n+1)
		for i := range items {
			items[i] = fmt.Sprintf(`{"email":"user%d@example.com"}`, i)
		}
		created := results(api.do(ctx, http.MethodPost, "/v1/users/batch", strings.NewReader(aBatch(items[:n]...))))
		changes, deletions := make([]string, n), make([]string, n)
		for i, result := range created {
			id := result.(map[string]any)["user"].(map[string]any)["id"].(string)
			changes[n-1-i] = fmt.Sprintf(`{"id":%q,"email":"other%d@example.com","first_name":"%d"}`, id, i, i)
			deletions[n-1-i] = fmt.Sprintf(`{"id":%q}`, id)
		}
		updated := results(update(ctx, api, "?atomic=true", changes...))
		Expect(updated).To(HaveLen(n))
		for i, result := range updated {
			Expect(result).To(HaveKeyWithValue("user", HaveKeyWithValue("first_name", strconv.Itoa(n-1-i))))
		}
		expectEventsLead(ctx)
		for _, path := range []string{"/v1/users/batch", "/v1/users/batch/delete"} {
			method := map[string]string{"/v1/users/batch": http.MethodPatch, "/v1/users/batch/delete": http.MethodPost}[path]
			for _, list := range [][]string{append(slices.Clone(deletions), deletions[0]), {}} {
				problem := expectProblem(api.do(ctx, method, path, strings.NewReader(aBatch(list...))), http.StatusUnprocessableEntity, "validation-failed")
				Expect(problem["errors"]).To(ConsistOf(invalidValue("pointer", "/data", "must have from 1 to 1000 items")))
			}
		}
		Expect(results(api.do(ctx, http.MethodPost, "/v1/users/batch/delete", strings.NewReader(aBatch(deletions...))))).
			To(And(HaveLen(n), HaveEach(Equal(map[string]any{"status": 204.}))))
		Expect(count(ctx, "users")).To(BeZero())
		Expect(changesOf(ctx)).To(HaveLen(2 * n))
		expectEventsLead(ctx)
	})

	It("ends in the state that the events describe, if many requests change and delete the same users", func(ctx SpecContext) {
		const n, requests = 8, 40
		api := start(ctx, onDatabase(likeTheProgram(suite.LastingPostgresDSN(ctx), 20)))
		paths := make([]string, n)
		for i := range paths {
			paths[i] = api.have(ctx, fmt.Sprintf("user%d@example.com", i))
		}
		var sent []func() response
		for r := range requests {
			var items, ids []string
			for i := range n {
				path := paths[(i*(2*r+1)+r)%n]
				items = append(items, change(path, fmt.Sprintf(`"email":"user%d@example.com","first_name":"%d"`, (i*r+3*r)%(2*n), r%3)))
				ids = append(ids, fmt.Sprintf(`{"id":%q}`, idOf(path)))
			}
			switch r % 4 {
			case 0:
				sent = append(sent, func() response { return update(ctx, api, "?atomic=true", items[:2]...) })
			case 1:
				sent = append(sent, func() response { return api.patch(ctx, paths[r%n], fmt.Sprintf(`{"last_name":"%d"}`, r)) })
			default:
				sent = append(sent, func() response { return update(ctx, api, "", items...) })
			}
			if r == requests/2 {
				sent = append(sent, func() response {
					return api.do(ctx, http.MethodPost, "/v1/users/batch/delete", strings.NewReader(aBatch(ids[:3]...)))
				})
			}
		}
		for _, status := range statuses(ctx, together(sent...), len(sent)) {
			Expect(status).To(BeElementOf(http.StatusOK, http.StatusNotFound, http.StatusConflict, http.StatusServiceUnavailable))
		}
		Expect(string(api.log.Contents())).NotTo(ContainSubstring(`"level":"ERROR"`))
		expectEventsLead(ctx)
	})
})

var _ = Describe("Deleting many users", func() {
	remove := func(ctx context.Context, a *api, query string, items ...string) response {
		GinkgoHelper()
		return a.do(ctx, http.MethodPost, "/v1/users/batch/delete"+query, strings.NewReader(aBatch(items...)))
	}
	item := func(path string) string { return fmt.Sprintf(`{"id":%q}`, idOf(path)) }
	deleted := Equal(map[string]any{"status": 204.})

	It("deletes each user with its event, and returns the results in the same order", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		other := api.have(ctx, "eve@example.com")
		Expect(results(remove(ctx, api, "", item(bob), item("/v1/users/x"), `{}`, `[]`, item("/v1/users/"+unknownID),
			item(ada), item(bob), `{"id":"`+idOf(other)+`","email":"eve@example.com"}`))).To(HaveExactElements(
			deleted,
			beProblem(422, "validation-failed", "/data/1/id", notUUID),
			beProblem(422, "validation-failed", "/data/2/id", "is required"),
			beProblem(422, "validation-failed", "/data/3", "must be an object"),
			deleted, deleted, deleted,
			beProblem(422, "validation-failed", "/data/7/email", "is an unknown field")))
		Expect(changesOf(ctx)).To(HaveExactElements(beDeletion(bob), beDeletion(ada)))
		Expect(api.get(ctx, other).status).To(Equal(http.StatusOK))
		expectEventsLead(ctx)
	})

	It("deletes all users or none with atomic=true", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		problem := expectProblem(remove(ctx, api, "?atomic=true", item(ada), `{"id":"x"}`), http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(ConsistOf(invalidValue("pointer", "/data/1/id", notUUID)))
		Expect(count(ctx, "users")).To(Equal(2))
		Expect(results(remove(ctx, api, "?atomic=true", item(bob), item("/v1/users/"+unknownID), item(ada)))).To(HaveEach(deleted))
		Expect(count(ctx, "users")).To(BeZero())
		expectEventsLead(ctx)
	})

	It("succeeds if requests delete and change the same users in different orders", func(ctx SpecContext) {
		api := start(ctx)
		ada, bob := api.have(ctx, "ada@example.com"), api.have(ctx, "bob@example.com")
		release := hold(ctx, ada)
		responses := together(
			func() response { return remove(ctx, api, "", item(ada), item(bob)) },
			func() response { return remove(ctx, api, "", item(bob), item(ada)) },
			func() response {
				return api.patch(ctx, "/v1/users/batch", aBatch(fmt.Sprintf(`{"id":%q,"first_name":"B"}`, idOf(bob)), item(ada)))
			})
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(3))
		release()
		Expect(statuses(ctx, responses, 3)).To(HaveEach(http.StatusOK))
		Expect(count(ctx, "users")).To(BeZero())
		expectEventsLead(ctx)
	})
})

var _ = Describe("The routes that change users", func() {
	DescribeTable("refuse a query", func(ctx SpecContext, method, path, body string) {
		problem := expectProblem(start(ctx).do(ctx, method, path, strings.NewReader(body)), http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(ConsistOf(invalidValue("parameter", "x", "is an unknown parameter")))
	},
		Entry(nil, http.MethodPatch, "/v1/users/"+unknownID+"?x=1", `{}`),
		Entry(nil, http.MethodDelete, "/v1/users/"+unknownID+"?x=1", ``),
		Entry(nil, http.MethodPatch, "/v1/users/batch?x=1", aBatch(`{"id":"`+unknownID+`"}`)),
		Entry(nil, http.MethodPost, "/v1/users/batch/delete?x=1", aBatch(`{"id":"`+unknownID+`"}`)),
	)

	It("do not serve other paths", func(ctx SpecContext) {
		api := start(ctx)
		path := api.have(ctx, "ada@example.com")
		for _, other := range []string{path + "/", path + "/x", "/v1/users/", "/v1/users%2F" + idOf(path)} {
			expectProblem(api.patch(ctx, other, `{"first_name":"B"}`), http.StatusNotFound, "not-found")
			expectProblem(api.delete(ctx, other), http.StatusNotFound, "not-found")
		}
		for other, allow := range map[string]string{"/v1/users/batch": "OPTIONS, PATCH, POST", "/v1/users/batch/delete": "OPTIONS, POST"} {
			refused := api.delete(ctx, other)
			expectProblem(refused, http.StatusMethodNotAllowed, "method-not-allowed")
			Expect(refused.header.Get("Allow")).To(Equal(allow))
		}
		expectProblem(api.patch(ctx, "/v1/users/batch", aBatch(`{"id":"`+idOf(path)+`"}`), `If-Match: "1"`), http.StatusBadRequest, "malformed-request")
		Expect(changesOf(ctx)).To(BeEmpty())
	})

	It("call Hint only after they have committed events", func(ctx SpecContext) {
		visible := make(chan int, 10)
		api := start(ctx, func(o *httpapi.Options) { o.Hint = func() { visible <- count(ctx, "outbox_events") } })
		path := api.have(ctx, "ada@example.com")
		Expect(visible).To(Receive(Equal(1)))
		Expect(api.patch(ctx, path, `{"first_name":"B"}`).status).To(Equal(http.StatusOK))
		Expect(visible).To(Receive(Equal(2)))
		Expect(api.patch(ctx, path, `{"first_name":"C"}`, `If-Match: "x"`).status).To(Equal(http.StatusPreconditionFailed))
		Expect(visible).NotTo(Receive())
		Expect(api.delete(ctx, path).status).To(Equal(http.StatusNoContent))
		Expect(visible).To(Receive(Equal(3)))
	})
})
