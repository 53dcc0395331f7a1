package httpapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"regexp/syntax"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/pb33f/libopenapi/datamodel/high/base"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"
	"golang.org/x/text/unicode/norm"
)

// maker makes valid and invalid requests from the document's schemas. The validator
// decides whether a request is valid.
type maker struct {
	*rand.Rand

	ids []string // of existing users
}

// one returns a random value of the list.
func one[T any](m maker, values ...T) T { return values[m.IntN(len(values))] }

// odd returns large values, unusual text, and values of types that most fields refuse. The
// caller may change them.
func odd() []any {
	return []any{
		nil, true, -1, 1.5, json.Number("1e30"), "", " ", "\x00", "é\u202e💥", strings.Repeat("a", 1000),
		[]any{},
		[]any{nil},
		map[string]any{},
		"2500-13-01T00:00:00Z", "ada@", "Ada <ada@example.com>",
	}
}

// value returns a value that the schema allows.
func (m maker) value(schema *base.Schema) any {
	switch {
	case len(schema.Type) == 0:
		return one(m, odd()...)
	case slices.Contains(schema.Type, "null") && m.IntN(4) == 0:
		return nil
	case schema.Type[0] == "object":
		object := make(map[string]any)
		for name, property := range schema.Properties.FromOldest() {
			if m.IntN(2) == 0 || slices.Contains(schema.Required, name) {
				object[name] = m.value(property.Schema())
			}
		}
		return object
	case schema.Type[0] == "array":
		array := make([]any, *schema.MinItems+m.Int64N(3))
		for i := range array {
			array[i] = m.value(schema.Items.A.Schema())
		}
		return array
	case schema.Type[0] == "integer":
		// The validator calculates in float64.
		least, most := int64(*schema.Minimum), int64(min(*schema.Maximum, 1<<53))
		return one(m, least, least+1, most-1, most, least+m.Int64N(most-least))
	case schema.Type[0] == "boolean":
		return m.IntN(2) == 0
	case schema.Format == "uuid":
		if len(m.ids) > 0 && m.IntN(2) == 0 {
			return one(m, m.ids...)
		}
		return fmt.Sprintf("00000000-0000-7000-8000-%012x", m.Uint32())
	case schema.Format == "date-time":
		zone := time.FixedZone("", 60*(m.IntN(24*60)-12*60))
		return time.Unix(m.Int64N(1<<33)-1<<31, m.Int64N(1e9)).In(zone).Format(time.RFC3339Nano)
	}
	return m.text(schema)
}

// text returns a text that the schema's pattern and bounds allow.
func (m maker) text(schema *base.Schema) string {
	pattern, err := syntax.Parse(schema.Pattern, syntax.Perl)
	Expect(err).NotTo(HaveOccurred())
	least, most := int64(0), int64(math.MaxInt64)
	if schema.MinLength != nil {
		least = *schema.MinLength
	}
	if schema.MaxLength != nil {
		most = *schema.MaxLength
	}
	for {
		var b strings.Builder
		m.match(&b, pattern.Simplify(), int(min(most, 100)))
		// The schemas do not contain two rules of their descriptions. The length of a
		// name counts in normalization form C. An address has at most 64 bytes before
		// the @.
		text := norm.NFC.String(b.String())
		n := int64(utf8.RuneCountInString(text))
		if least <= n && n <= most && strings.IndexByte(text, '@') <= 64 {
			return text
		}
	}
}

// match writes a text that the pattern matches. most limits the repetitions of a group.
func (m maker) match(b *strings.Builder, pattern *syntax.Regexp, most int) {
	repeat := func(least int) {
		for range max(least, one(m, 0, 1, 5, m.IntN(most+1), most)) {
			m.match(b, pattern.Sub[0], 3)
		}
	}
	switch pattern.Op {
	case syntax.OpLiteral:
		b.WriteString(string(pattern.Rune))
	case syntax.OpCharClass:
		at := 2 * m.IntN(len(pattern.Rune)/2)
		r := pattern.Rune[at] + m.Int32N(pattern.Rune[at+1]-pattern.Rune[at]+1)
		if !utf8.ValidRune(r) {
			r = 'é'
		}
		b.WriteRune(r)
	case syntax.OpConcat, syntax.OpCapture:
		for _, part := range pattern.Sub {
			m.match(b, part, most)
		}
	case syntax.OpAlternate:
		m.match(b, one(m, pattern.Sub...), most)
	case syntax.OpStar:
		repeat(0)
	case syntax.OpPlus:
		repeat(1)
	case syntax.OpQuest:
		if m.IntN(2) == 0 {
			m.match(b, pattern.Sub[0], most)
		}
	default: // anchors and the empty match write nothing
	}
}

// spoil changes a random part of the value.
func (m maker) spoil(value any) any {
	switch value := value.(type) {
	case map[string]any:
		names := append(slices.Sorted(maps.Keys(value)), "unknown")
		switch name := names[m.IntN(len(names))]; m.IntN(5) {
		case 0:
			return one(m, odd()...)
		case 1:
			delete(value, name)
		case 2:
			value[name] = one(m, odd()...)
		default:
			value[name] = m.spoil(value[name])
		}
		return value
	case []any:
		if len(value) == 0 || m.IntN(4) == 0 {
			return one[any](m, []any{}, make([]any, 1001), "x")
		}
		i := m.IntN(len(value))
		value[i] = m.spoil(value[i])
		return value
	}
	return one(m, odd()...)
}

// made is a generated request.
type made struct {
	method, target string
	body           []byte   // nil if there is no body
	headers        []string // with the media type of the body
}

func (m maker) request(method, path string, operation *v3.Operation) made {
	request := made{method: strings.ToUpper(method)}
	query := make(url.Values)
	for _, parameter := range operation.Parameters {
		value := func() string {
			if schema := parameter.Schema.Schema(); schema.Type[0] != "string" || schema.Pattern != "" || schema.Format == "uuid" {
				return fmt.Sprint(m.value(schema))
			}
			return parameter.Example.Value // only the server knows other valid values
		}
		switch {
		case parameter.In == "path":
			path = strings.Replace(path, "{"+parameter.Name+"}", value(), 1)
		case m.IntN(3) > 0:
		case parameter.In == "header":
			request.headers = append(request.headers, parameter.Name+": "+value())
		default:
			query.Set(parameter.Name, value())
			if parameter.Name != "cursor" && m.IntN(3) == 0 {
				query.Set(parameter.Name, fmt.Sprint(one(m, odd()...)))
			}
		}
	}
	request.target = path
	if len(query) > 0 {
		request.target += "?" + query.Encode()
	}
	if operation.RequestBody == nil {
		return request
	}
	mediaType := one(m, slices.Collect(operation.RequestBody.Content.KeysFromOldest())...)
	request.headers = append(request.headers, "Content-Type: "+mediaType)
	content := m.value(operation.RequestBody.Content.GetOrZero(mediaType).Schema.Schema())
	if m.IntN(2) == 0 {
		content = m.spoil(content)
	}
	text, err := json.Marshal(content)
	Expect(err).NotTo(HaveOccurred())
	if m.IntN(10) == 0 {
		text = text[:m.IntN(len(text))]
	}
	request.body = text
	return request
}

// isValid reports whether the document allows the request.
func (r made) isValid(ctx context.Context) bool {
	GinkgoHelper()
	request, err := http.NewRequestWithContext(ctx, r.method, r.target, bytes.NewReader(r.body))
	Expect(err).NotTo(HaveOccurred())
	for _, line := range r.headers {
		name, value, _ := strings.Cut(line, ": ")
		request.Header.Set(name, value)
	}
	valid, _ := theContract().validator.ValidateHttpRequestSync(request)
	return valid
}

var _ = Describe("Requests made from the OpenAPI document", func() {
	// api.do checks the response against the document.
	DescribeTable("are accepted if the document allows them, and refused otherwise", func(ctx SpecContext, seed uint64) {
		api, m := start(ctx), maker{Rand: rand.New(rand.NewPCG(seed, 0))} //nolint:gosec // a seed repeats a failed run
		times, statuses := map[bool]int{}, map[int]int{}
		for path, item := range theContract().Paths.PathItems.FromOldest() {
			for method, operation := range item.GetOperations().FromOldest() {
				for range 100 {
					request := m.request(method, path, operation)
					var body io.Reader
					if request.body != nil {
						body = bytes.NewReader(request.body)
					}
					answered := api.do(ctx, request.method, request.target, body, request.headers...)
					if strings.Contains(answered.body, "#idempotency-key-reused") { // the maker has used the key before
						continue
					}
					valid := request.isValid(ctx)
					times[valid]++
					statuses[answered.status]++
					if answered.status == http.StatusCreated {
						m.ids = append(m.ids, answered.object()["id"].(string))
					}
					refused := strings.Contains(answered.body, "#validation-failed") || answered.status == http.StatusBadRequest
					Expect(answered.status).To(BeNumerically("<", 500), answered.body)
					Expect(refused).To(Equal(!valid), "%s %s %q %.2000q: %d %.1000s",
						request.method, request.target, request.headers, request.body, answered.status, answered.body)
				}
			}
		}
		Expect(times[true]).To(BeNumerically(">", 100))
		Expect(times[false]).To(BeNumerically(">", 100))
		for _, status := range []int{http.StatusOK, http.StatusNoContent, http.StatusNotFound, http.StatusPreconditionFailed} {
			Expect(statuses[status]).To(BeNumerically(">", 0), "%d", status)
		}
	},
		Entry("seed 1", uint64(1)), Entry("seed 2", uint64(2)), Entry("seed 3", uint64(3)),
	)
})
