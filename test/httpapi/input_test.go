package httpapi_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
)

var _ = Describe("The body of a new user", func() {
	It("has all its errors listed at once", func(ctx SpecContext) {
		problem := expectProblem(start(ctx).create(ctx, `{"z":1,"email":7,"first_name":"\u0007","last_name":[],"":0}`),
			http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(Equal([]any{
			invalidValue("pointer", "/email", "must be a string"),
			invalidValue("pointer", "/last_name", "must be a string"),
			invalidValue("pointer", "/first_name", "must not contain control characters"),
			invalidValue("pointer", "/", "is an unknown field"),
			invalidValue("pointer", "/z", "is an unknown field"),
		}))
	})

	// fields returns n unknown fields.
	fields := func(n int) string {
		var body strings.Builder
		for i := range n {
			fmt.Fprintf(&body, `"f%d":0,`, i)
		}
		return body.String()
	}

	It("has at most 20 errors listed, and the others counted", func(ctx SpecContext) {
		problem := expectProblem(start(ctx).create(ctx, "{"+fields(63)+`"email":"ada@example.com"}`),
			http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(HaveLen(20))
		Expect(problem["errors_omitted"]).To(BeEquivalentTo(43))
	})

	It("is refused with more than 64 fields", func(ctx SpecContext) {
		problem := expectProblem(start(ctx).create(ctx, "{"+fields(64)+`"email":"ada@example.com"}`),
			http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(Equal([]any{invalidValue("pointer", "", "must not have more than 64 fields")}))
	})

	It("has an item with more than 64 fields refused", func(ctx SpecContext) {
		answer := start(ctx).do(ctx, http.MethodPost, "/v1/users/batch", strings.NewReader(
			`{"data":[{"email":"ada@example.com"},{`+fields(64)+`"email":"bob@example.com"}]}`)).object()
		Expect(answer["data"]).To(ConsistOf(HaveKeyWithValue("status", BeEquivalentTo(http.StatusCreated)),
			HaveKeyWithValue("problem", HaveKeyWithValue("errors", Equal([]any{invalidValue("pointer", "/data/1", "must not have more than 64 fields")})))))
	})

	It("has a response of bounded size, although each item has many errors", func(ctx SpecContext) {
		item := `{"` + strings.Repeat("n", 10_000) + `":0,` + fields(60) + `"email":1}`
		answer := start(ctx).do(ctx, http.MethodPost, "/v1/users/batch", strings.NewReader(
			`{"data":[`+strings.Repeat(item+",", 999)+item+`]}`))
		Expect(answer.status).To(Equal(http.StatusOK))
		Expect(len(answer.body)).To(BeNumerically("<", 1<<20))
		Expect(strings.Count(answer.body, `"errors_omitted":61`)).To(Equal(1000))
		atomic := expectProblem(start(ctx).do(ctx, http.MethodPost, "/v1/users/batch?atomic=true", strings.NewReader(
			`{"data":[`+strings.Repeat(item+",", 999)+item+`]}`)), http.StatusUnprocessableEntity, "validation-failed")
		Expect(atomic["errors"]).To(HaveLen(20))
		Expect(atomic["errors_omitted"]).To(BeEquivalentTo(62*1000 - 20))
	})

	DescribeTable("is accepted with the header of",
		func(ctx SpecContext, header string) {
			Expect(start(ctx).create(ctx, `{"email":"ada@example.com"}`, header).status).To(Equal(http.StatusCreated))
		},
		Entry("JSON", "Content-Type: application/json"),
		Entry("JSON in capitals with a charset", `Content-Type: Application/JSON; charset="UTF-8"`),
		Entry("an uncompressed body", "Content-Encoding: identity"),
	)

	Describe("with a size limit", func() {
		const limit = 100
		bounded := func(o *httpapi.Options) { o.MaxBodyBytes = limit }
		bodyOf := func(size int) string {
			return fmt.Sprintf(`{"email":"ada@example.com"%s}`, strings.Repeat(" ", size-27))
		}
		// The client sends an io.Reader in chunks, because its length is unknown.
		chunked := func(size int) io.Reader { return struct{ io.Reader }{strings.NewReader(bodyOf(size))} }

		It("is accepted up to the limit", func(ctx SpecContext) {
			Expect(bodyOf(limit)).To(HaveLen(limit))
			Expect(start(ctx, bounded).create(ctx, bodyOf(limit)).status).To(Equal(http.StatusCreated))
		})

		It("is accepted up to the limit in chunks", func(ctx SpecContext) {
			Expect(start(ctx, bounded).do(ctx, http.MethodPost, "/v1/users", chunked(limit)).status).To(Equal(http.StatusCreated))
		})

		It("is refused above the limit", func(ctx SpecContext) {
			problem := expectProblem(start(ctx, bounded).create(ctx, bodyOf(limit+1)), http.StatusRequestEntityTooLarge, "body-too-large")
			Expect(problem["detail"]).To(ContainSubstring("100 bytes"))
			Expect(count(ctx, "users")).To(BeZero())
		})

		It("is refused above the limit in chunks", func(ctx SpecContext) {
			refused := start(ctx, bounded).do(ctx, http.MethodPost, "/v1/users", chunked(limit+1))
			expectProblem(refused, http.StatusRequestEntityTooLarge, "body-too-large")
			Expect(count(ctx, "users")).To(BeZero())
		})
	})
})
