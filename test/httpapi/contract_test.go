package httpapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	"github.com/pb33f/libopenapi-validator/content"
	"github.com/pb33f/libopenapi-validator/errors"
	"github.com/pb33f/libopenapi-validator/paths"
	"github.com/pb33f/libopenapi-validator/schema_validation"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"
)

// contract is the OpenAPI document with its validator for requests and responses.
type contract struct {
	*v3.Document

	validator validator.Validator
	options   *config.ValidationOptions
}

// theContract returns the contract. Only the first call reads the document. The
// validator reports values that break their schema, and undeclared fields, headers and
// parameters. It ignores general HTTP headers, because the document does not declare
// them for each response. It does not check API keys.
var theContract = sync.OnceValue(func() *contract {
	text, err := os.ReadFile("../../pkg/httpapi/openapi.json")
	Expect(err).NotTo(HaveOccurred())
	document, err := libopenapi.NewDocument(text)
	Expect(err).NotTo(HaveOccurred())
	model, err := document.BuildV3Model()
	Expect(err).NotTo(HaveOccurred())
	options := config.NewValidationOptions(
		config.WithFormatAssertions(),
		config.WithStrictMode(),
		config.WithStrictIgnoredHeaders("X-Forwarded-For", "X-Real-Ip", // set by proxies
			"Accept-Encoding", "Cache-Control", "Connection", "Content-Encoding", "Content-Length", "Content-Type",
			"Date", "User-Agent", "X-Content-Type-Options"),
		config.WithStrictIgnorePaths("$.body.event_context.**", "$.body.data[*].event_context.**"), // any JSON
		config.WithBodyDecoder("application/json", content.DecoderFunc(decodeJSON)),
		config.WithBodyDecoder("application/merge-patch+json", content.DecoderFunc(decodeJSON)),
		config.WithoutSecurityValidation(),
	)
	checked, errs := validator.NewValidator(document, config.WithExistingOpts(options))
	Expect(errs).To(BeEmpty())
	return &contract{Document: &model.Model, validator: checked, options: options}
})

// decodeJSON replaces numbers beyond float64 by the largest float64. The validator
// ignores the fields that contain such numbers.
func decodeJSON(input *content.DecodeInput) (value any, err error) {
	decoder := json.NewDecoder(input.Body)
	decoder.UseNumber()
	err = decoder.Decode(&value)
	return withFloats(value), err
}

func withFloats(value any) any {
	switch value := value.(type) {
	case json.Number:
		number, err := value.Float64()
		if err != nil {
			return math.Copysign(math.MaxFloat64, number)
		}
		return number
	case []any:
		for i := range value {
			value[i] = withFloats(value[i])
		}
	case map[string]any:
		for name := range value {
			value[name] = withFloats(value[name])
		}
	}
	return value
}

// exchange is a request and its response.
type exchange struct {
	request  *http.Request
	sent     []byte
	response *http.Response
	received []byte
}

// asked returns the request with its body unread.
func (e exchange) asked() *http.Request {
	request := e.request.Clone(e.request.Context())
	request.Body = io.NopCloser(bytes.NewReader(e.sent))
	return request
}

// expectAsDocumented checks the response against the document. If the request
// succeeded, it also checks the request. Paths outside /v1 are not in the document.
func expectAsDocumented(e exchange) {
	GinkgoHelper()
	if !strings.HasPrefix(e.request.URL.Path, "/v1/") {
		return
	}
	c := theContract()
	request := e.asked()
	if request.Method == http.MethodHead { // the document has only GET
		return
	}
	_, errs, _ := paths.FindPath(request, c.Document, c.options)
	// FindPath ignores a trailing slash. It finds /v1/users/{id} for /v1/users/batch with
	// another method.
	if len(errs) > 0 || strings.HasSuffix(request.URL.Path, "/") || e.response.StatusCode == http.StatusMethodNotAllowed {
		c.expectRefusal(e)
		return
	}
	_, errs = c.validator.ValidateHttpResponse(request, &http.Response{
		StatusCode: e.response.StatusCode, Header: e.response.Header, Body: io.NopCloser(bytes.NewReader(e.received)),
	})
	e.expectNone(errs)
	if e.succeeded() {
		request = e.asked()
		_, errs = c.validator.ValidateHttpRequestSync(request)
		e.expectNone(errs)
	}
}

// succeeded reports whether the whole request succeeded. A batch can have refused items
// although the status of the response is 200.
func (e exchange) succeeded() bool {
	return e.response.StatusCode < http.StatusMultipleChoices && !bytes.Contains(e.received, []byte(`"problem":{`))
}

// expectRefusal checks the response to a request whose path or method is not in the
// document.
func (c *contract) expectRefusal(e exchange) {
	GinkgoHelper()
	refusals := map[int]string{
		http.StatusNotFound: "NotFound", http.StatusMethodNotAllowed: "MethodNotAllowed", http.StatusUnauthorized: "Unauthorized",
		http.StatusTooManyRequests: "RateLimited", http.StatusMisdirectedRequest: "MisdirectedRequest",
	}
	if e.request.Method == http.MethodOptions {
		Expect(e.response.StatusCode).To(Or(Equal(http.StatusNoContent), Equal(http.StatusNotFound)))
		return
	}
	Expect(refusals).To(HaveKey(e.response.StatusCode))
	refusal := c.Components.Responses.GetOrZero(refusals[e.response.StatusCode])
	for name, header := range refusal.Headers.FromOldest() {
		Expect(e.response.Header.Get(name) != "" || !header.Required).To(BeTrue(), "%s is missing", name)
	}
	schema := refusal.Content.GetOrZero(e.response.Header.Get("Content-Type")).Schema.Schema()
	_, errs := schema_validation.NewSchemaValidator(config.WithExistingOpts(c.options)).ValidateSchemaBytes(schema, e.received)
	e.expectNone(errs)
}

// expectNone fails if there are errors. The message has the errors, the request and the
// response.
func (e exchange) expectNone(errs []*errors.ValidationError) {
	GinkgoHelper()
	if len(errs) == 0 {
		return
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %.500q\n%d %v %.1000q\n", e.request.Method, e.request.URL.RequestURI(), e.sent,
		e.response.StatusCode, e.response.Header, e.received)
	for _, err := range errs {
		fmt.Fprintf(&b, "%s: %s\n", err.Message, err.Reason)
		for _, broken := range err.SchemaValidationErrors {
			fmt.Fprintf(&b, "  %s %s\n", broken.FieldPath, broken.Reason)
		}
	}
	Fail("contradicts the OpenAPI document: " + b.String())
}

// slugs returns the slugs that the pattern finds in the file, sorted and without
// duplicates.
func slugs(file, pattern string) (found []string) {
	GinkgoHelper()
	text, err := os.ReadFile(file)
	Expect(err).NotTo(HaveOccurred())
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(text), -1) {
		found = append(found, match[1])
	}
	slices.Sort(found)
	return slices.Compact(found)
}

var _ = Describe("The OpenAPI document", func() {
	It("is served and valid", func(ctx SpecContext) {
		served := start(ctx).get(ctx, "/openapi.json")
		Expect(served.status).To(Equal(http.StatusOK))
		Expect(served.header.Get("Content-Type")).To(Equal("application/json"))
		text, err := os.ReadFile("../../pkg/httpapi/openapi.json")
		Expect(err).NotTo(HaveOccurred())
		Expect(served.body).To(Equal(string(text)))
		valid, errs := theContract().validator.ValidateDocument()
		Expect(valid).To(BeTrue(), "%v", errs)
	})

	It("has the routes of the server, and HEAD for each GET", func(ctx SpecContext) {
		var documented []string
		for path, item := range theContract().Paths.PathItems.FromOldest() {
			for method := range item.GetOperations().FromOldest() {
				route := strings.ToUpper(method) + " " + regexp.MustCompile(`\{(\w+)\}`).ReplaceAllString(path, ":$1")
				documented = append(documented, route)
				if after, ok := strings.CutPrefix(route, "GET "); ok {
					documented = append(documented, "HEAD "+after)
				}
			}
		}
		var served []string
		for _, route := range start(ctx).Routes() {
			if strings.Contains(route, " /v1/") {
				served = append(served, route)
			}
		}
		Expect(served).To(ConsistOf(documented))
	})

	It("has the same problems as the server and docs/errors.md", func() {
		documented := slugs("../../pkg/httpapi/openapi.json", `errors\.md#([a-z-]+)"`)
		known := slugs("../../pkg/httpapi/problem/kinds.go", `Slug: "([a-z-]+)"`)
		known = slices.DeleteFunc(known, func(slug string) bool { return slug == "client-gone" }) // no client receives it
		Expect(documented).To(Equal(known))
		Expect(slugs("../../docs/errors.md", `(?m)^## ([a-z-]+)$`)).To(Equal(known))
	})

	It("has the same statuses of problems as docs/errors.md", func() {
		text, err := os.ReadFile("../../docs/errors.md")
		Expect(err).NotTo(HaveOccurred())
		for name, response := range theContract().Components.Responses.FromOldest() {
			for _, part := range response.Content.GetOrZero("application/problem+json").Schema.Schema().AllOf[1:] {
				status := part.Schema().Properties.GetOrZero("status").Schema().Enum[0].Value
				for _, kind := range part.Schema().Properties.GetOrZero("type").Schema().Enum {
					_, slug, _ := strings.Cut(kind.Value, "#")
					Expect(string(text)).To(MatchRegexp(`(?m)^## %s\n%s\b`, slug, status), name)
				}
			}
		}
	})

	Describe("has examples", func() {
		It("of requests, which the server accepts", func(ctx SpecContext) {
			api, sent := start(ctx), 0
			for path, item := range theContract().Paths.PathItems.FromOldest() {
				for method, operation := range item.GetOperations().FromOldest() {
					if operation.RequestBody == nil {
						continue
					}
					for mediaType, body := range operation.RequestBody.Content.FromOldest() {
						for name, example := range body.Examples.FromOldest() {
							_, err := db.ExecContext(ctx, "TRUNCATE users")
							Expect(err).NotTo(HaveOccurred())
							if !isCreation(method, path) {
								insertExamples(ctx)
							}
							answered := api.do(ctx, strings.ToUpper(method), strings.ReplaceAll(path, "{id}", exampleID(operation)),
								bytes.NewReader(toJSON(example.Value)), "Content-Type: "+mediaType)
							Expect(answered.status).To(BeNumerically("<", 300), "%s %s %s: %s", method, path, name, answered.body)
							Expect(answered.body).NotTo(ContainSubstring(`"problem"`), "%s %s %s", method, path, name)
							sent++
						}
					}
				}
			}
			Expect(sent).To(Equal(12))
		})

		It("of responses, which are valid", func(ctx SpecContext) {
			checked := make(map[string]bool)
			for path, item := range theContract().Paths.PathItems.FromOldest() {
				for method, operation := range item.GetOperations().FromOldest() {
					for code, response := range operation.Responses.Codes.FromOldest() {
						status, err := strconv.Atoi(code)
						Expect(err).NotTo(HaveOccurred())
						check := func(name, mediaType string, body []byte) {
							request, err := http.NewRequestWithContext(ctx, strings.ToUpper(method), strings.ReplaceAll(path, "{id}", "x"), http.NoBody)
							Expect(err).NotTo(HaveOccurred())
							header := http.Header{}
							if mediaType != "" {
								header.Set("Content-Type", mediaType)
							}
							for name, documented := range response.Headers.FromOldest() {
								header.Set(name, documented.Example.Value)
							}
							_, errs := theContract().validator.ValidateHttpResponse(request, &http.Response{
								StatusCode: status, Header: header, Body: io.NopCloser(bytes.NewReader(body)),
							})
							Expect(errs).To(BeEmpty(), "%s %s %s %s: %v", method, path, code, name, errs)
							checked[path+method+code] = true
						}
						if status == http.StatusNoContent {
							check("no content", "", nil)
						}
						for mediaType, body := range response.Content.FromOldest() {
							for name, example := range body.Examples.FromOldest() {
								check(name, mediaType, toJSON(example.Value))
							}
						}
						Expect(checked).To(HaveKey(path+method+code), "an example is missing")
					}
				}
			}
		})
	})
})

// toJSON returns an example of the document.
func toJSON(node interface{ Decode(into any) error }) []byte {
	GinkgoHelper()
	var value any
	Expect(node.Decode(&value)).To(Succeed())
	text, err := json.Marshal(value)
	Expect(err).NotTo(HaveOccurred())
	return text
}

// isCreation reports whether the operation creates users.
func isCreation(method, path string) bool {
	return method == "post" && (path == "/v1/users" || path == "/v1/users/batch")
}

// exampleID returns the example of the path parameter id, or an empty string.
func exampleID(operation *v3.Operation) string {
	for _, parameter := range operation.Parameters {
		if parameter.In == "path" {
			return parameter.Example.Value
		}
	}
	return ""
}

// insertExamples inserts the users of the document's examples.
func insertExamples(ctx context.Context) {
	GinkgoHelper()
	_, err := db.ExecContext(ctx, `INSERT INTO users (id, email, created_at, updated_at) VALUES
		('019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c12', 'ada@example.com', now(), now()),
		('019c2f07-8a12-7d5e-9c3b-5f0d1e6a7b90', 'grace@example.com', now(), now())`)
	Expect(err).NotTo(HaveOccurred())
}
