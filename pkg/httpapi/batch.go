package httpapi

import (
	"context"
	"errors"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"
)

// maxBatchItems bounds the items of one request.
const maxBatchItems = 1000

// batch is a request with several items, {"data": […]}, which share one
// transaction. Those that break a rule are answered for one by one, and the
// others take effect, unless the request asks for all or nothing.
type batch struct {
	*object

	atomic bool
	items  []*object
	// problems are what is wrong with the items, or nil, by their place.
	problems []error
}

// batchAnswer has a result for each of the items, in their order.
type batchAnswer[T any] struct {
	Data []T `json:"data"`
}

// itemProblem is what is wrong with one item, on the wire: a problem without
// the request's id.
type itemProblem struct {
	Type   string       `json:"type"`
	Title  string       `json:"title"`
	Status int          `json:"status"`
	Detail string       `json:"detail"`
	Errors []valueError `json:"errors,omitempty"`
}

// readBatch reads the request, and takes it apart into its items.
func (s *Server) readBatch(c echo.Context) (*batch, error) {
	query, err := readQuery(c)
	if err != nil {
		return nil, err
	}
	b := &batch{atomic: query.boolean("atomic")}
	if err := query.check(nil); err != nil {
		return nil, err
	}
	if b.object, err = s.readObject(c); err != nil {
		return nil, err
	}
	values := b.requiredArray("data", maxBatchItems)
	if err := b.check(nil); err != nil {
		return nil, err
	}
	for i, value := range values {
		b.items = append(b.items, newItem(value, jsontext.Pointer("/data").AppendToken(strconv.Itoa(i))))
	}
	b.problems = make([]error, len(b.items))
	return b, nil
}

// newItem takes an item apart. What is no object has no members.
func newItem(value jsontext.Value, place jsontext.Pointer) *object {
	o := &object{findings: findings{place: inMember(place)}}
	if err := json.Unmarshal(value, &o.members); err != nil || o.members == nil {
		o.members, o.wrong = nil, []valueError{bodyError(string(place), "must be an object")}
	}
	return o
}

// each has read take the members out of every item and say which rules they
// break. It returns the problem with the batch as a whole: any of an item's,
// where it is all or nothing.
func (b *batch) each(read func(place int, item *object) []brokenRule) error {
	for i, item := range b.items {
		var broken []brokenRule
		if item.members != nil {
			broken = read(i, item)
		}
		b.problems[i] = item.check(broken)
	}
	return b.whole()
}

// whole returns the problem with the batch as a whole.
func (b *batch) whole() error {
	if !b.atomic {
		return nil
	}
	var whole *problemError
	for _, err := range b.problems {
		if p, ok := errors.AsType[*problemError](err); ok {
			if whole == nil {
				whole = &problemError{problem: p.problem}
			}
			whole.errors = append(whole.errors, p.errors...)
		}
	}
	if whole == nil {
		return nil
	}
	whole.errors = whole.errors[:min(len(whole.errors), maxValueErrors)]
	return whole
}

// newItemProblem returns the problem that a single request would be answered
// with.
func newItemProblem(err error) *itemProblem {
	p := problemOf(context.Background(), err)
	return &itemProblem{
		Type: typeBase + p.problem.slug, Title: p.problem.title, Status: p.problem.status,
		Detail: p.description(), Errors: p.errors,
	}
}
