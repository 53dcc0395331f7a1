package admission_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/labstack/echo/v4"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi/admission"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

func TestAdmission(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "admission")
}

// slow allows one request in 1,000 seconds.
const slow = 0.001

var _ = Describe("Admission", func() {
	// The suite in test/httpapi checks the responses.
	var (
		handler echo.HandlerFunc
		served  []string // the names of the keys
	)

	admit := func(o admission.Options) {
		served = nil
		handler = func(c echo.Context) error {
			name := ""
			if key := admission.KeyOf(c); key != nil {
				name = key.Name
			}
			served = append(served, name)
			return nil
		}
		o.Covers = func(c echo.Context) bool { return c.Request().URL.Path == "/covered" }
		for _, middleware := range slices.Backward(admission.New(o)) {
			handler = middleware(handler)
		}
	}
	ask := func(ctx context.Context, path, key string) error {
		request := httptest.NewRequestWithContext(ctx, http.MethodGet, path, http.NoBody)
		if key != "" {
			request.Header.Set("Authorization", "Bearer "+key)
		}
		return handler(echo.New().NewContext(request, httptest.NewRecorder()))
	}
	key := func(text string) admission.Key {
		return admission.Key{Client: "c", Name: "the " + text, Digest: sha256.Sum256([]byte(text))}
	}
	beOf := func(kind *problem.Kind) OmegaMatcher { return HaveField("Kind", kind) }

	It("passes the name of the key to the handler", func(ctx SpecContext) {
		admit(admission.Options{Keys: []admission.Key{key("a"), key("b")}})
		Expect(ask(ctx, "/covered", "b")).To(Succeed())
		Expect(ask(ctx, "/covered", "c")).To(beOf(problem.Unauthorized))
		Expect(ask(ctx, "/covered", "")).To(beOf(problem.Unauthorized))
		Expect(served).To(Equal([]string{"the b"}))
	})

	It("requires no key if it is turned off", func(ctx SpecContext) {
		admit(admission.Options{AuthOff: true})
		Expect(ask(ctx, "/covered", "")).To(Succeed())
		Expect(served).To(Equal([]string{""}))
	})

	It("requires no key for requests that Covers excludes, and counts them only against the address", func(ctx SpecContext) {
		admit(admission.Options{Keys: []admission.Key{key("a")}, RatePerKey: slow})
		for range 3 {
			Expect(ask(ctx, "/", "a")).To(Succeed())
		}
		Expect(served).To(Equal([]string{"", "", ""}))
		admit(admission.Options{Keys: []admission.Key{key("a")}, RatePerAddress: slow})
		Expect(ask(ctx, "/", "a")).To(Succeed())
		Expect(ask(ctx, "/", "a")).To(beOf(problem.RateLimited))
	})

	It("counts a request against the rate of its address before it checks the key", func(ctx SpecContext) {
		admit(admission.Options{Keys: []admission.Key{key("a")}, RatePerAddress: slow})
		Expect(ask(ctx, "/covered", "c")).To(beOf(problem.Unauthorized))
		Expect(ask(ctx, "/covered", "a")).To(beOf(problem.RateLimited))
		Expect(served).To(BeEmpty())
	})

	It("counts requests against the rate of their key", func(ctx SpecContext) {
		admit(admission.Options{Keys: []admission.Key{key("a"), key("b")}, RatePerKey: slow})
		Expect(ask(ctx, "/covered", "a")).To(Succeed())
		Expect(ask(ctx, "/covered", "a")).To(beOf(problem.RateLimited))
		Expect(ask(ctx, "/covered", "b")).To(Succeed())
		Expect(served).To(Equal([]string{"the a", "the b"}))
	})
})

var _ = Describe("A shedder", func() {
	It("sheds requests above MaxConcurrent, and accepts more after work returns or panics", func(ctx SpecContext) {
		shedder := admission.NewShedder(admission.ShedderOptions{
			MaxConcurrent: 1,
			Ping:          func(context.Context) error { return nil },
			IsOutage:      func(context.Context, error) bool { return true },
		})
		failure := errors.New("a failure")
		Expect(shedder.Do(ctx, func() error {
			Expect(shedder.Do(ctx, func() error { return nil })).To(HaveField("Kind", problem.Overloaded))
			return failure
		})).To(MatchError(failure))
		Expect(func() { _ = shedder.Do(ctx, func() error { panic("a bug") }) }).To(Panic())
		Expect(shedder.Do(ctx, func() error { return nil })).To(Succeed())
	})
})
