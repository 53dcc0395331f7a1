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
	DescribeTable("is refused as no JSON where it",
		func(ctx SpecContext, body, pointer, detail string) {
			problem := expectProblem(start(ctx).create(ctx, body), http.StatusBadRequest, "invalid-json")
			Expect(problem["errors"]).To(ConsistOf(SatisfyAll(
				HaveKeyWithValue("pointer", pointer),
				HaveKeyWithValue("detail", ContainSubstring(detail)),
			)))
			Expect(count(ctx, "users")).To(BeZero())
		},
		Entry("is empty", "", "", "the body is empty"),
		Entry("is space", " \n\t", "", "the body is empty"),
		Entry("is text", "email=ada", "", "at or after byte 0"),
		Entry("is NaN", "NaN", "", "at or after byte 0"),
		Entry("holds NaN", `{"email":NaN}`, "/email", "at or after byte 9"),
		Entry("ends early", `{"email":"ada@exam`, "/email", "the body ends within a value"),
		Entry("has a comma too many", `{"email":"ada@example.com",}`, "", "at or after byte 26"),
		Entry("has a comment", `{"email":"ada@example.com"/**/}`, "", "at or after byte 26"),
		Entry("has single quotes", `{'email':"ada@example.com"}`, "", "at or after byte 1"),
		Entry("begins with a byte order mark", "\uFEFF{}", "", "at or after byte 0"),
		Entry("goes on after the object", `{"email":"ada@example.com"} {}`, "", "at or after byte 28"),
		Entry("has a name twice", `{"email":"a@example.com","email":"b@example.com"}`, "/email", "the object has this name more than once"),
		Entry("has a name twice, once escaped", `{"email":"a@example.com","\u0065mail":"b@example.com"}`, "/email", "the object has this name more than once"),
		Entry("has a name twice further down", `{"email":{"a":1,"a":2}}`, "/email/a", "the object has this name more than once"),
		Entry("is not UTF-8", "{\"email\":\"ada\xff@example.com\"}", "/email", "invalid UTF-8, at or after byte 13"),
		Entry("has a surrogate in UTF-8", "{\"first_name\":\"\xed\xa0\x80\"}", "/first_name", "invalid UTF-8, at or after byte 15"),
		Entry("has an escaped surrogate alone", `{"first_name":"\ud800"}`, "/first_name", "surrogate"),
		Entry("has an escaped surrogate pair in the wrong order", `{"first_name":"\udc00\ud800"}`, "/first_name", "surrogate"),
		Entry("has a raw control character", "{\"first_name\":\"a\nb\"}", "/first_name", "at or after byte 16"),
		Entry("has an escape that is none", `{"first_name":"\x41"}`, "/first_name", "escape"),
		Entry("is nested too deeply", strings.Repeat(`[`, 20_000), "", "deeper than 500 levels"),
	)

	DescribeTable("is refused for its values where",
		func(ctx SpecContext, body string, wrong ...any) {
			problem := expectProblem(start(ctx).create(ctx, body), http.StatusUnprocessableEntity, "validation-failed")
			Expect(problem["errors"]).To(Equal(wrong))
			Expect(count(ctx, "users")).To(BeZero())
		},
		Entry("it is an array", `[]`, wrongValue("pointer", "", "must be an object")),
		Entry("it is null", `null`, wrongValue("pointer", "", "must be an object")),
		Entry("it is a string", `"ada@example.com"`, wrongValue("pointer", "", "must be an object")),
		Entry("it is a number that is too great", `1e999`, wrongValue("pointer", "", "must be an object")),
		Entry("the e-mail is missing", `{}`, wrongValue("pointer", "/email", "is required")),
		Entry("the e-mail is empty", `{"email":""}`, wrongValue("pointer", "/email", "must not be empty")),
		Entry("the e-mail is a number", `{"email":1}`, wrongValue("pointer", "/email", "must be a string")),
		Entry("the e-mail is null", `{"email":null}`, wrongValue("pointer", "/email", "must be a string")),
		Entry("the e-mail is no address", `{"email":"ada"}`, wrongValue("pointer", "/email", "must be a bare address such as ada@example.com")),
		Entry("the e-mail has a name", `{"email":"Ada <ada@example.com>"}`, wrongValue("pointer", "/email", "must be a bare address such as ada@example.com")),
		Entry("the e-mail has NUL", `{"email":"ada\u0000@example.com"}`, wrongValue("pointer", "/email", "must be a bare address such as ada@example.com")),
		Entry("the e-mail is not ASCII", `{"email":"ada@bücher.example"}`, wrongValue("pointer", "/email", "must be in ASCII: write an international domain in its xn-- form")),
		Entry("the e-mail is too long", fmt.Sprintf(`{"email":"a@%s.com"}`, strings.Repeat("b", 250)), wrongValue("pointer", "/email", "must not be longer than 254 bytes")),
		Entry("a name is null", `{"email":"ada@example.com","first_name":null}`, wrongValue("pointer", "/first_name", "must be a string")),
		Entry("a name is an object", `{"email":"ada@example.com","last_name":{"a":[1]}}`, wrongValue("pointer", "/last_name", "must be a string")),
		Entry("a name has NUL", `{"email":"ada@example.com","first_name":"A\u0000"}`, wrongValue("pointer", "/first_name", "must not contain control characters")),
		Entry("a name is too long", fmt.Sprintf(`{"email":"ada@example.com","last_name":"%s"}`, strings.Repeat("é", 101)), wrongValue("pointer", "/last_name", "must not be longer than 100 characters")),
		Entry("a field is not known", `{"email":"ada@example.com","admin":true}`, wrongValue("pointer", "/admin", "is not a known field")),
		Entry("a field is in another case", `{"email":"ada@example.com","Email":"b@example.com"}`, wrongValue("pointer", "/Email", "is not a known field")),
		Entry("a field needs escaping in its pointer", `{"email":"ada@example.com","a/b~c":1}`, wrongValue("pointer", "/a~1b~0c", "is not a known field")),
		Entry("much is wrong at once", `{"z":1,"email":7,"first_name":"\u0007","last_name":[],"":0}`,
			wrongValue("pointer", "/email", "must be a string"),
			wrongValue("pointer", "/last_name", "must be a string"),
			wrongValue("pointer", "/first_name", "must not contain control characters"),
			wrongValue("pointer", "/", "is not a known field"),
			wrongValue("pointer", "/z", "is not a known field")),
	)

	It("has no more than 20 errors listed", func(ctx SpecContext) {
		var body strings.Builder
		for i := range 1000 {
			fmt.Fprintf(&body, `"f%d":0,`, i)
		}
		problem := expectProblem(start(ctx).create(ctx, "{"+body.String()+`"email":"ada@example.com"}`),
			http.StatusUnprocessableEntity, "validation-failed")
		Expect(problem["errors"]).To(HaveLen(20))
	})

	DescribeTable("is refused for its media type:",
		func(ctx SpecContext, header string) {
			api := start(ctx)
			expectProblem(api.create(ctx, `{"email":"ada@example.com"}`, header), http.StatusUnsupportedMediaType, "unsupported-media-type")
		},
		Entry("none", "Content-Type: "),
		Entry("a form", "Content-Type: application/x-www-form-urlencoded"),
		Entry("text", "Content-Type: text/plain"),
		Entry("something like JSON", "Content-Type: application/problem+json"),
		Entry("a malformed one", "Content-Type: application/json; charset"),
		Entry("another charset", "Content-Type: application/json; charset=latin1"),
		Entry("a compressed body", "Content-Encoding: gzip"),
	)

	DescribeTable("is taken for its media type:",
		func(ctx SpecContext, header string) {
			Expect(start(ctx).create(ctx, `{"email":"ada@example.com"}`, header).status).To(Equal(http.StatusCreated))
		},
		Entry("JSON", "Content-Type: application/json"),
		Entry("in capitals, with a charset", `Content-Type: Application/JSON; charset="UTF-8"`),
		Entry("uncompressed", "Content-Encoding: identity"),
	)

	Describe("of a bounded size", func() {
		const limit = 100
		bounded := func(o *httpapi.Options) { o.MaxBodyBytes = limit }
		bodyOf := func(size int) string {
			return fmt.Sprintf(`{"email":"ada@example.com"%s}`, strings.Repeat(" ", size-27))
		}
		// An io.Reader alone has no length: it goes in chunks.
		chunked := func(size int) io.Reader { return struct{ io.Reader }{strings.NewReader(bodyOf(size))} }

		It("is taken up to the limit", func(ctx SpecContext) {
			Expect(bodyOf(limit)).To(HaveLen(limit))
			Expect(start(ctx, bounded).create(ctx, bodyOf(limit)).status).To(Equal(http.StatusCreated))
		})

		It("is taken up to the limit in chunks", func(ctx SpecContext) {
			Expect(start(ctx, bounded).do(ctx, http.MethodPost, "/v1/users", chunked(limit)).status).To(Equal(http.StatusCreated))
		})

		It("is refused above it", func(ctx SpecContext) {
			problem := expectProblem(start(ctx, bounded).create(ctx, bodyOf(limit+1)), http.StatusRequestEntityTooLarge, "body-too-large")
			Expect(problem["detail"]).To(ContainSubstring("100 bytes"))
			Expect(count(ctx, "users")).To(BeZero())
		})

		It("is refused above it in chunks", func(ctx SpecContext) {
			refused := start(ctx, bounded).do(ctx, http.MethodPost, "/v1/users", chunked(limit+1))
			expectProblem(refused, http.StatusRequestEntityTooLarge, "body-too-large")
			Expect(count(ctx, "users")).To(BeZero())
		})
	})
})
