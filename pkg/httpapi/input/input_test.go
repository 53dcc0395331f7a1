package input_test

import (
	"context"
	"errors"
	"io"
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
	content, err := input.ReadBody(httptest.NewRecorder(), request, 1<<24, input.JSON)
	Expect(err).NotTo(HaveOccurred())
	Expect(string(content)).To(Equal(body))
	object, err := input.ParseObject(ctx, content)
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
		items, err := object.RequiredObjects(ctx, "data", 4)
		Expect(err).NotTo(HaveOccurred())
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
		_, err := input.ReadBody(httptest.NewRecorder(), request, 1000, input.JSON)
		Expect(err).To(HaveField("Kind", kind))
	},
		Entry("if its framing is invalid", errors.New("malformed chunked encoding"), time.Now().Add(time.Hour), problem.MalformedRequest),
		Entry("if the deadline of the connection has passed", os.ErrDeadlineExceeded, time.Now().Add(time.Hour), problem.RequestTimeout),
		Entry("if the deadline of the request has passed", errors.New("use of closed connection"), time.Unix(0, 0), problem.RequestTimeout),
	)
})

var _ = Describe("A parser", func() {
	It("stops when the request has ended", func(ctx SpecContext) {
		object := read(ctx, `{"data":[{"a":1}]}`)
		ended, end := context.WithCancelCause(ctx)
		end(errors.New("the deadline"))
		_, err := object.RequiredObjects(ended, "data", 1)
		Expect(err).To(MatchError("the deadline"))
		_, err = input.ParseObject(ended, []byte(`{"a":1}`))
		Expect(err).To(MatchError("the deadline"))
	})

	It("stops at the first element above the limit", func(ctx SpecContext) {
		object := read(ctx, `{"data":[`+strings.Repeat("{},", 100_000)+`{}]}`)
		allocated := testing.AllocsPerRun(1, func() {
			items, err := object.RequiredObjects(ctx, "data", 10)
			Expect(err).NotTo(HaveOccurred())
			Expect(items).To(BeNil())
			object = read(ctx, string(object.Raw()))
		})
		Expect(allocated).To(BeNumerically("<", 1000))
	})

	It("counts the names of open objects only", func(ctx SpecContext) {
		objects := strings.Repeat(`{"a":1,"b":":{["},`, 3*input.MaxNames/2)
		read(ctx, `{"data":[`+objects+`{}]}`)
	})
})

var _ = Describe("A budget", func() {
	// body returns a body of n bytes, whose length is unknown.
	body := func(budget *input.Budget, n int) *input.Body {
		return budget.Body(io.NopCloser(strings.NewReader(strings.Repeat("x", n))), -1)
	}
	beShed := HaveField("Kind", problem.Overloaded)

	It("counts the bytes of bodies until their release", func() {
		budget := input.NewBudget(input.MinBudget)
		const size = input.MinBudget / 2
		first, second := body(budget, size), body(budget, size)
		Expect(io.ReadAll(first)).To(HaveLen(size))
		held := budget.Held()
		Expect(held).To(BeNumerically("~", size, 1<<16))
		_, err := io.ReadAll(second)
		Expect(err).To(beShed)
		second.Release()
		Expect(budget.Held()).To(Equal(held))
		first.Release()
		first.Release()
		Expect(budget.Held()).To(BeZero())
	})

	It("reserves the rest of a large body together, so that one of several arrives", func() {
		budget := input.NewBudget(input.MinBudget)
		const size = input.MinBudget / 2
		sent := strings.Repeat("x", size)
		first, second := budget.Body(io.NopCloser(strings.NewReader(sent)), size), budget.Body(io.NopCloser(strings.NewReader(sent)), size)
		_, err := io.CopyN(io.Discard, first, 100_000)
		Expect(err).NotTo(HaveOccurred())
		_, err = io.ReadAll(second)
		Expect(err).To(beShed)
		Expect(io.ReadAll(first)).NotTo(BeEmpty())
	})

	It("leaves three quarters to large bodies and a quarter to small ones", func() {
		budget := input.NewBudget(input.MinBudget)
		const large = 3*input.MinBudget/4 - 1<<16
		for range 10 {
			Expect(io.ReadAll(body(budget, 10_000))).To(HaveLen(10_000))
		}
		Expect(io.ReadAll(body(budget, large))).To(HaveLen(large), "small bodies do not displace it")
		refused := body(budget, 200_000)
		_, err := io.ReadAll(refused)
		Expect(err).To(beShed)
		refused.Release()
		for range 4 {
			Expect(io.ReadAll(body(budget, 10_000))).To(HaveLen(10_000), "large bodies do not displace it")
		}
		_, err = io.ReadAll(body(budget, 60_000))
		Expect(err).To(beShed)
	})
})

var _ = Describe("A query", func() {
	It("returns its parameters, or the fallbacks of missing ones", func(ctx SpecContext) {
		q := query(ctx, "t=a%20b&i=7&b=true")
		Expect(q.Text("t")).To(Equal("a b"))
		Expect(q.Text("none")).To(BeEmpty())
		Expect(q.Integer("i", 1)).To(Equal(7))
		Expect(q.Integer("none", 1)).To(Equal(1))
		Expect(q.Boolean("b")).To(BeTrue())
		Expect(q.Boolean("none")).To(BeFalse())
		Expect(q.Check(nil)).To(Succeed())
	})

	It("reports refused parameters, then broken rules, then unknown parameters by name", func(ctx SpecContext) {
		q := query(ctx, "i=x&b=1&t=1&t=2&rule=x&empty=&z&a%FF=")
		q.Integer("i", 1)
		q.Boolean("b")
		q.Text("t")
		q.Text("rule")
		q.Text("empty")
		expectInvalid(q.Check([]input.BrokenRule{{Name: "rule", Reason: "is bad"}, {Name: "i", Reason: "is not reported twice"}}),
			problem.InQuery("i", "must be a whole number"),
			problem.InQuery("b", "must be true or false"),
			problem.InQuery("t", "must not be given more than once"),
			problem.InQuery("empty", "must not be empty"),
			problem.InQuery("rule", "is bad"),
			problem.InQuery("a\uFFFD", "is an unknown parameter"),
			problem.InQuery("z", "is an unknown parameter"),
		)
	})
})
