package input_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

func TestInput(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "input")
}

// read reads a valid body. The suite in test/httpapi sends the invalid bodies of
// docs/input.md.
func read(ctx context.Context, body string) *input.Object {
	GinkgoHelper()
	request := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", strings.NewReader(body))
	request.Header.Set("Content-Type", "application/json")
	object, err := input.ReadObject(httptest.NewRecorder(), request, 1000)
	Expect(err).NotTo(HaveOccurred())
	return object
}

func query(ctx context.Context, raw string) *input.Query {
	GinkgoHelper()
	q, err := input.ReadQuery(httptest.NewRequestWithContext(ctx, http.MethodGet, "/?"+raw, http.NoBody))
	Expect(err).NotTo(HaveOccurred())
	return q
}

// expectInvalid expects a validation problem with exactly these values.
func expectInvalid(err error, values ...problem.Value) {
	GinkgoHelper()
	p, ok := errors.AsType[*problem.Error](err)
	Expect(ok).To(BeTrue(), "%v", err)
	Expect(p.Kind).To(Equal(problem.ValidationFailed))
	Expect(p.Values).To(Equal(values))
}

var _ = Describe("A body", func() {
	It("returns its members, or the fallbacks of missing ones", func(ctx SpecContext) {
		now := time.Now()
		object := read(ctx, `{"s":"a","t":"2026-01-31T12:00:00Z","i":7,"any": [1, 2]}`)
		Expect(string(object.Raw())).To(Equal(`{"s":"a","t":"2026-01-31T12:00:00Z","i":7,"any": [1, 2]}`))
		Expect(object.RequiredString("s")).To(Equal("a"))
		Expect(object.OptionalString("none")).To(BeEmpty())
		Expect(object.OptionalTime("t", now)).To(BeTemporally("==", time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)))
		Expect(object.OptionalTime("none", now)).To(Equal(now))
		Expect(object.OptionalInteger("i", 1)).To(Equal(int64(7)))
		Expect(object.OptionalInteger("none", 1)).To(Equal(int64(1)))
		Expect(string(object.Required("any"))).To(Equal(`[1, 2]`))
		Expect(object.Check(nil)).To(Succeed())
	})

	It("reports refused members, then broken rules, then unknown members by name", func(ctx SpecContext) {
		object := read(ctx, `{"z":1,"a/b":2,"type":3,"rule":"x"}`)
		object.RequiredString("type")
		object.RequiredString("missing")
		object.RequiredString("rule")
		expectInvalid(object.Check([]input.BrokenRule{{Name: "rule", Reason: "is bad"}, {Name: "type", Reason: "is not reported twice"}}),
			problem.InBody("/type", "must be a string"),
			problem.InBody("/missing", "is required"),
			problem.InBody("/rule", "is bad"),
			problem.InBody("/a~1b", "is an unknown field"),
			problem.InBody("/z", "is an unknown field"),
		)
	})

	It("returns the elements of an array, each with its own pointer", func(ctx SpecContext) {
		object := read(ctx, `{"data":[{"a":"x"},7,null,{"b":1}]}`)
		items := object.RequiredObjects("data", 4)
		Expect(object.Check(nil)).To(Succeed())
		Expect(items).To(HaveLen(4))
		Expect(items[0].IsObject()).To(BeTrue())
		Expect(items[0].RequiredString("a")).To(Equal("x"))
		Expect(items[0].Check(nil)).To(Succeed())
		for i, pointer := range map[int]string{1: "/data/1", 2: "/data/2"} {
			Expect(items[i].IsObject()).To(BeFalse())
			expectInvalid(items[i].Check(nil), problem.InBody(pointer, "must be an object"))
		}
		expectInvalid(items[3].Check(nil), problem.InBody("/data/3/b", "is an unknown field"))
		Expect(items[3].Place("b", "is taken")).To(Equal(problem.InBody("/data/3/b", "is taken")))
	})

	DescribeTable("that does not arrive is a problem", func(ctx SpecContext, reason error, deadline time.Time, kind *problem.Kind) {
		late, cancel := context.WithDeadline(ctx, deadline)
		defer cancel()
		request := httptest.NewRequestWithContext(late, http.MethodPost, "/", iotest.ErrReader(reason))
		request.Header.Set("Content-Type", "application/json")
		_, err := input.ReadObject(httptest.NewRecorder(), request, 1000)
		Expect(err).To(HaveField("Kind", kind))
	},
		Entry("if its framing is invalid", errors.New("malformed chunked encoding"), time.Now().Add(time.Hour), problem.MalformedRequest),
		Entry("if the deadline of the connection has passed", os.ErrDeadlineExceeded, time.Now().Add(time.Hour), problem.RequestTimeout),
		Entry("if the deadline of the request has passed", errors.New("use of closed connection"), time.Unix(0, 0), problem.RequestTimeout),
	)
})

var _ = Describe("A query", func() {
	It("returns its parameters, or the fallbacks of missing ones", func(ctx SpecContext) {
		q := query(ctx, "t=a%20b&i=7&b=true&empty=")
		Expect(q.Text("t")).To(Equal("a b"))
		Expect(q.Text("none")).To(BeEmpty())
		Expect(q.Integer("i", 1)).To(Equal(7))
		Expect(q.Integer("empty", 1)).To(Equal(1))
		Expect(q.Boolean("b")).To(BeTrue())
		Expect(q.Boolean("none")).To(BeFalse())
		Expect(q.Check(nil)).To(Succeed())
	})

	It("reports refused parameters, then broken rules, then unknown parameters by name", func(ctx SpecContext) {
		q := query(ctx, "i=x&b=1&t=1&t=2&rule=x&z&a%FF=")
		q.Integer("i", 1)
		q.Boolean("b")
		q.Text("t")
		q.Text("rule")
		expectInvalid(q.Check([]input.BrokenRule{{Name: "rule", Reason: "is bad"}, {Name: "i", Reason: "is not reported twice"}}),
			problem.InQuery("i", "must be a whole number"),
			problem.InQuery("b", "must be true or false"),
			problem.InQuery("t", "must not be given more than once"),
			problem.InQuery("rule", "is bad"),
			problem.InQuery("a\uFFFD", "is an unknown parameter"),
			problem.InQuery("z", "is an unknown parameter"),
		)
	})
})
