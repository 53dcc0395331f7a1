package httpapi

import (
	"context"
	"errors"

	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// maxBatchItems bounds the items of one request.
const maxBatchItems = 1000

// batch is a request with several items, {"data": […]}, which share one
// transaction. Each invalid item gets a problem of its own, and the others take
// effect, unless the request asks for all or nothing.
type batch struct {
	body   *input.Object
	items  []*input.Object
	atomic bool
	// problems are the items' problems, by the items' places; nil for a valid one.
	problems []error
}

// batchAnswer has a result for each of the items, in their order.
type batchAnswer[T any] struct {
	Data []T `json:"data"`
}

// readBatch reads the request, and splits it into its items.
func (s *Server) readBatch(c echo.Context) (*batch, error) {
	query, err := input.ReadQuery(c.Request())
	if err != nil {
		return nil, err
	}
	b := &batch{atomic: query.Boolean("atomic")}
	if err := query.Check(nil); err != nil {
		return nil, err
	}
	if b.body, err = s.readObject(c); err != nil {
		return nil, err
	}
	b.items = b.body.RequiredObjects("data", maxBatchItems)
	if err := b.body.Check(nil); err != nil {
		return nil, err
	}
	b.problems = make([]error, len(b.items))
	return b, nil
}

// each calls read for every item, which takes its members out and returns the
// rules that they break. It returns the problem with the batch as a whole: when
// it is all or nothing, those of the items.
func (b *batch) each(read func(place int, item *input.Object) []input.BrokenRule) error {
	for i, item := range b.items {
		var broken []input.BrokenRule
		if item.IsObject() {
			broken = read(i, item)
		}
		b.problems[i] = item.Check(broken)
	}
	return b.whole()
}

// whole returns the problem with the batch as a whole.
func (b *batch) whole() error {
	if !b.atomic {
		return nil
	}
	var whole *problem.Error
	for _, err := range b.problems {
		if p, ok := errors.AsType[*problem.Error](err); ok {
			if whole == nil {
				whole = &problem.Error{Kind: p.Kind}
			}
			whole.Values = append(whole.Values, p.Values...)
		}
	}
	if whole == nil {
		return nil
	}
	whole.Values = whole.Values[:min(len(whole.Values), problem.MaxValues)]
	return whole
}

// itemProblem returns the problem that a request for the item alone would be
// answered with. It has no request's id.
func itemProblem(err error) *problem.Details {
	details := problemOf(context.Background(), err).Details("")
	return &details
}
