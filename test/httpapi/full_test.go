package httpapi_test

import (
	"net/http"
	"strings"
	"sync/atomic"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
)

var _ = Describe("A full outbox", func() {
	const (
		event = `{"event_type":"order_placed","event_context":{}}`
		user  = `{"email":"ada@example.com"}`
	)

	DescribeTable("refuses", func(ctx SpecContext, refusesChanges bool) {
		var full atomic.Bool
		api := start(ctx, func(o *httpapi.Options) { o.Full, o.FullRefusesChanges = full.Load, refusesChanges })
		post := func(path, body string) response {
			return api.do(ctx, http.MethodPost, path, strings.NewReader(body))
		}
		full.Store(true)
		refused := []response{post("/v1/events", event), post("/v1/events/batch", `{"data":[`+event+`]}`)}
		created := post("/v1/users", user)
		if refusesChanges {
			refused = append(refused, created)
		} else {
			Expect(created.status).To(Equal(http.StatusCreated))
		}
		for _, r := range refused {
			expectProblem(r, http.StatusServiceUnavailable, "outbox-full")
			Expect(r.header.Get("Retry-After")).To(Equal("60"))
		}
		Expect(api.get(ctx, "/v1/users").status).To(Equal(http.StatusOK))

		full.Store(false)
		Expect(post("/v1/events", event).status).To(Equal(http.StatusAccepted))
		if refusesChanges {
			Expect(post("/v1/users", user).status).To(Equal(http.StatusCreated))
		}
	},
		Entry("events, and no changes of users", false),
		Entry("all changes if the operator wants that", true),
	)
})
