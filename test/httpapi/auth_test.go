package httpapi_test

import (
	"context"
	"crypto/sha256"
	"io"
	"net/http"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/httpapi/admission"
	"github.com/diehard-outbox/diehard/pkg/httpapi/scope"
)

// withKeys configures the keys of a server. The names of a key and its client are the key
// without the prefix "secret-".
func withKeys(keys ...string) func(*httpapi.Options) {
	return func(o *httpapi.Options) {
		o.AuthOff = false
		for _, key := range keys {
			name := strings.TrimPrefix(key, "secret-")
			o.Keys = append(o.Keys, admission.Key{Client: name, Name: name, Digest: sha256.Sum256([]byte(key))})
		}
	}
}

var _ = Describe("Authentication", func() {
	DescribeTable("refuses", func(ctx SpecContext, header, challenge string) {
		api := start(ctx, withKeys("secret-a", "secret-b"))
		refused := api.get(ctx, "/v1/users", header)
		expectProblem(refused, http.StatusUnauthorized, "unauthorized")
		Expect(refused.header.Get("WWW-Authenticate")).To(Equal(challenge))
	},
		Entry("a missing key", "X: y", `Bearer realm="diehard"`),
		Entry("an empty key", "Authorization: Bearer ", `Bearer realm="diehard"`),
		Entry("a key without its scheme", "Authorization: secret-a", `Bearer realm="diehard"`),
		Entry("another scheme", "Authorization: Basic secret-a", `Bearer realm="diehard"`),
		Entry("an unknown key", "Authorization: Bearer secret-c", `Bearer realm="diehard", error="invalid_token"`),
		Entry("the beginning of a key", "Authorization: Bearer secret-", `Bearer realm="diehard", error="invalid_token"`),
		Entry("two keys in one header", "Authorization: Bearer secret-a secret-b", `Bearer realm="diehard", error="invalid_token"`),
		Entry("a key in another case", "Authorization: Bearer SECRET-A", `Bearer realm="diehard", error="invalid_token"`),
		Entry("a digest of a key", "Authorization: Bearer 7e0ef08d0d2ccb7ae3ed3ba4f7bd1d0b6e5b3ba9ac1e5d6b4ec9c3d8ff5d5bd2", `Bearer realm="diehard", error="invalid_token"`),
	)

	It("refuses two headers with keys", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-a", "secret-b"))
		refused := api.get(ctx, "/v1/users", "Authorization: Bearer secret-a", "Authorization: Bearer secret-b")
		expectProblem(refused, http.StatusUnauthorized, "unauthorized")
	})

	It("accepts each key, without regard to the case of the scheme", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-a", "secret-b"))
		for _, header := range []string{"Authorization: Bearer secret-a", "Authorization: bearer secret-b"} {
			Expect(api.get(ctx, "/v1/users", header).status).To(Equal(http.StatusOK))
		}
	})

	It("is required for all of /v1, including unknown paths", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-a"))
		for _, request := range []string{
			"GET /v1/users", "HEAD /v1/users", "POST /v1/users", "GET /v1/users/x", "POST /v1/users/batch", "POST /v1/events",
			"POST /v1/events/batch", "PATCH /v1/users/x", "DELETE /v1/users/x", "PATCH /v1/users/batch", "POST /v1/users/batch/delete",
			"PUT /v1/users", "GET /v1/nothing", "GET /v1", "GET /v1/",
		} {
			method, path, _ := strings.Cut(request, " ")
			Expect(api.do(ctx, method, path, nil).status).To(Equal(http.StatusUnauthorized), request)
		}
		for _, path := range []string{"/%761/users", "//v1/users", "/v1%2Fusers", "/./v1/users", "/x/../v1/users"} {
			Expect(api.get(ctx, path).status).To(BeElementOf(http.StatusUnauthorized, http.StatusNotFound), path)
		}
		Expect(api.get(ctx, "/nothing").status).To(Equal(http.StatusNotFound))
	})

	It("refuses every request if no keys are configured", func(ctx SpecContext) {
		Expect(start(ctx, withKeys()).get(ctx, "/v1/users", "Authorization: Bearer ").status).To(Equal(http.StatusUnauthorized))
	})

	It("shows the name of the key in logs and metrics, and never the key", func(ctx SpecContext) {
		api := start(ctx, withKeys("secret-old", "secret-new"))
		api.get(ctx, "/v1/users", "Authorization: Bearer secret-new")
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"client":"new","key":"new"`))
		api.get(ctx, "/v1/users", "Authorization: Bearer secret-unknown")
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"problem":"unauthorized"`))
		Expect(string(api.log.Contents())).NotTo(ContainSubstring("secret"))
		Expect(keyRequests(ctx, api)).To(Equal(map[string]float64{"old": 0, "new": 1}))
	})

	DescribeTable("restricts a key to its scopes", func(ctx SpecContext, granted string, allowed ...string) {
		api := start(ctx, withKeys("secret-a"), func(o *httpapi.Options) { o.Keys[0].Scopes = strings.Split(granted, "+") })
		body := `{"data":[{"email":"ada@example.com","event_type":"a","event_context":1}]}`
		read, write, publish := []string{scope.ReadUsers}, []string{scope.WriteUsers}, []string{scope.PublishEvents}
		for request, scopes := range map[string][]string{
			"GET /v1/users": read, "HEAD /v1/users": read, "GET /v1/users/x": read,
			"POST /v1/users": write, "POST /v1/users/batch": write,
			"PATCH /v1/users/x": slices.Concat(write, read), "PATCH /v1/users/batch": slices.Concat(write, read),
			"DELETE /v1/users/x": write, "POST /v1/users/batch/delete": write,
			"POST /v1/events": publish, "POST /v1/events/batch": publish,
		} {
			method, path, _ := strings.Cut(request, " ")
			var sent io.Reader
			if method == http.MethodPost || method == http.MethodPatch {
				sent = strings.NewReader(body)
			}
			answer := api.do(ctx, method, path, sent, "Authorization: Bearer secret-a")
			missing := slices.DeleteFunc(slices.Clone(scopes), func(s string) bool { return slices.Contains(allowed, s) })
			if len(missing) == 0 {
				Expect(answer.status).NotTo(Equal(http.StatusForbidden), request)
				continue
			}
			Expect(answer.status).To(Equal(http.StatusForbidden), request)
			Expect(answer.header.Get("WWW-Authenticate")).To(Equal(`Bearer realm="diehard", error="insufficient_scope", scope="` + missing[0] + `"`))
			if method != http.MethodHead {
				Expect(expectProblem(answer, http.StatusForbidden, "insufficient-scope")["detail"]).To(ContainSubstring(missing[0]))
			}
		}
	},
		Entry("to read users", "users.read", scope.ReadUsers),
		Entry("to write users", "users.write", scope.WriteUsers),
		Entry("to publish events", "events.publish", scope.PublishEvents),
		Entry("to two scopes", "events.publish+users.read", scope.PublishEvents, scope.ReadUsers),
		Entry("to change users", "users.write+users.read", scope.WriteUsers, scope.ReadUsers),
	)
})

// keyRequests returns the number of requests for each key's name.
func keyRequests(_ context.Context, a *api) map[string]float64 {
	GinkgoHelper()
	families, err := a.registry.Gather()
	Expect(err).NotTo(HaveOccurred())
	requests := make(map[string]float64)
	for _, family := range families {
		if family.GetName() == "diehard_http_key_requests_total" {
			for _, metric := range family.GetMetric() {
				requests[metric.GetLabel()[1].GetValue()] = metric.GetCounter().GetValue()
			}
		}
	}
	return requests
}
