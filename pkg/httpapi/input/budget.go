package input

import (
	"io"
	"sync/atomic"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// smallBytes is the first part of a body. It counts against a quarter of the budget, and the
// rest of the body against three quarters. So large bodies do not displace small ones. A
// read reserves at most as many bytes.
const smallBytes = 64 << 10

// MinBudget is the smallest limit of a Budget, so that it has space for several small
// bodies.
const MinBudget = 1 << 20

// Budget limits the bytes of all request bodies that the process holds at the same time.
// It is safe for concurrent use.
type Budget struct{ small, large pool }

// NewBudget returns a budget of limit bytes, but at least MinBudget. A body may have up to
// three quarters of it.
func NewBudget(limit int64) *Budget {
	limit = max(limit, MinBudget)
	return &Budget{small: pool{limit: limit / 4}, large: pool{limit: limit - limit/4}}
}

// Held returns the bytes that are reserved for all bodies.
func (b *Budget) Held() int64 { return b.small.held.Load() + b.large.held.Load() }

// Body returns a body that reserves bytes of the budget before it reads them. length is the
// number of bytes, or -1 if it is unknown. If the budget is exhausted, Read returns a
// *problem.Error. The caller must call Release.
func (b *Budget) Body(body io.ReadCloser, length int64) *Body {
	return &Body{ReadCloser: body, budget: b, length: length}
}

// pool is a part of a budget.
type pool struct {
	limit int64
	held  atomic.Int64
}

// reserve reports whether the pool has n more bytes.
func (p *pool) reserve(n int64) bool {
	if p.held.Add(n) > p.limit {
		p.held.Add(-n)
		return false
	}
	return true
}

// Body is the body of a request.
type Body struct {
	io.ReadCloser

	budget       *Budget
	length       int64
	read         int64
	small, large int64 // the bytes that are reserved
}

// Read implements io.Reader.
func (b *Body) Read(p []byte) (int, error) {
	p = p[:min(len(p), smallBytes)]
	if !b.reserve(b.read + int64(len(p))) {
		return 0, &problem.Error{Kind: problem.Overloaded}
	}
	n, err := b.ReadCloser.Read(p)
	b.read += int64(n)
	return n, err //nolint:wrapcheck // io.Reader
}

// reserve reserves the first n bytes of the body. It reserves the rest of a large body
// together: otherwise several large bodies could each hold a part of the budget, and none
// of them would arrive.
func (b *Body) reserve(n int64) bool {
	if more := min(n, smallBytes) - b.small; more > 0 {
		if !b.budget.small.reserve(more) {
			return false
		}
		b.small += more
	}
	if more := n - smallBytes - b.large; more > 0 {
		more = max(more, b.length-smallBytes-b.large)
		if !b.budget.large.reserve(more) {
			return false
		}
		b.large += more
	}
	return true
}

// Release returns the bytes of the body to the budget.
func (b *Body) Release() {
	b.budget.small.held.Add(-b.small)
	b.budget.large.held.Add(-b.large)
	b.small, b.large = 0, 0
}
