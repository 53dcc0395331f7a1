package httpapi

import (
	"context"
	"errors"

	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

const (
	// maxBatchItems limits the items of one request.
	maxBatchItems = 1000
	// maxBatchValues limits the invalid values in the response to a batch. Each invalid item
	// lists at least one value.
	maxBatchValues = 1000
)

// batch is a request with several items, {"data": […]}. The items share one
// transaction. Each invalid item gets its own problem, and the valid items take effect.
// If the batch is atomic, an invalid item fails the whole request.
type batch struct {
	items  []*input.Object
	atomic bool
	// problems has the problem of each item, in the order of the items; nil if the item
	// is valid.
	problems []error
}

// batchResponse has a result for each item, in the order of the items.
type batchResponse[T any] struct {
	Data []T `json:"data"`
}

// readBatch reads the query and the items of the body.
func readBatch(c echo.Context, body *input.Object) (*batch, error) {
	if len(c.Request().Header.Values(headerIfMatch)) > 0 {
		return nil, &problem.Error{Kind: problem.MalformedRequest, Detail: "A batch cannot have an If-Match"}
	}
	query, err := input.ReadQuery(c.Request())
	if err != nil {
		return nil, err
	}
	b := &batch{atomic: query.Boolean("atomic")}
	if err := query.Check(nil); err != nil {
		return nil, err
	}
	if b.items, err = body.RequiredObjects(c.Request().Context(), "data", maxBatchItems); err != nil {
		return nil, err
	}
	if err := body.Check(nil); err != nil {
		return nil, err
	}
	b.problems = make([]error, len(b.items))
	return b, nil
}

// each calls read for every item. read reads the item's members and returns the rules
// that the members break. each returns the result of whole, or the cause of ctx.
func (b *batch) each(ctx context.Context, read func(index int, item *input.Object) []input.BrokenRule) error {
	limit := max(1, maxBatchValues/len(b.items))
	for i, item := range b.items {
		if ctx.Err() != nil {
			return context.Cause(ctx) //nolint:wrapcheck // the caller's own
		}
		var broken []input.BrokenRule
		if item.IsObject() {
			broken = read(i, item)
		}
		b.problems[i] = item.Check(broken)
		if p, ok := errors.AsType[*problem.Error](b.problems[i]); ok {
			p.Limit(limit)
		}
	}
	return b.whole(b.problems)
}

// validOf returns the values of the valid items, and the indexes of these items.
func validOf[T any](b *batch, values []T) (valid []T, indexes []int) {
	for i, err := range b.problems {
		if err == nil {
			valid, indexes = append(valid, values[i]), append(indexes, i)
		}
	}
	return valid, indexes
}

// whole returns the problem of the whole batch: nil, or the combined problems of
// the items if the batch is atomic.
func (b *batch) whole(problems []error) error {
	if !b.atomic {
		return nil
	}
	var whole *problem.Error
	for _, err := range problems {
		if p, ok := errors.AsType[*problem.Error](err); ok {
			if whole == nil {
				whole = &problem.Error{Kind: p.Kind}
			}
			whole.Values = append(whole.Values, p.Values...)
			whole.Omitted += p.Omitted
		}
	}
	if whole == nil {
		return nil
	}
	whole.Limit(problem.MaxValues)
	return whole
}

// itemProblem returns the problem that a request with this item alone would get. The
// problem has no request id.
func itemProblem(err error) *problem.Details {
	details := problemOf(context.Background(), err).Details("")
	return &details
}
