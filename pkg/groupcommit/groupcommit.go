// Package groupcommit commits concurrent changes in one transaction (group commit).
package groupcommit

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// SlotTimeout limits how long a group holds its slot. After this time, the next group
// starts, even if the first one has not ended. A commit normally takes much less time,
// and a client hardly notices the wait.
const SlotTimeout = 100 * time.Millisecond

const (
	// slots is the number of groups that commit at the same time. Groups that have
	// exceeded SlotTimeout do not count.
	slots = 1
	// gatherTimeout limits the wait for expected requests. It is about the duration
	// of a commit.
	gatherTimeout = time.Millisecond
	// maxMisses limits Committer.misses. After maxMisses misses, one group in 64 waits.
	maxMisses = 6
	// maxGroup limits the changes of a group.
	maxGroup = 100
)

// ErrCommitAlone is the error of Do when PostgreSQL refused the group's transaction, or
// when the change must not join a group. The change was not made. The caller may repeat it
// in its own transaction.
var ErrCommitAlone = errors.New("the change cannot share a transaction")

// ErrLeaderPanicked is the error of Do when Commit panicked in the goroutine of
// another request. The change may have been made.
var ErrLeaderPanicked = errors.New("the request that led the group panicked")

// Committer forms groups of changes and commits each group in one transaction. The
// changes of a group share the cost of the transaction: the round trips, and the wait
// for the disk at the commit. It is safe for concurrent use.
//
// A group holds a slot while it commits. Requests that arrive during the commit
// form the next group. A request that arrives alone forms its own group.
//
// Before a group commits, it waits briefly for more requests. It expects as many
// requests as were in the last group and in the queue behind that group. If the
// expected requests do not arrive, later groups wait less often.
//
// All changes of a group have the same outcome. If the outcome of the transaction
// is unknown, it is unknown for each change. If PostgreSQL refuses the
// transaction, each change gets ErrCommitAlone.
//
// See docs/adr/0010-group-commit.md.
type Committer[T, R any] struct {
	o             Options[T, R]
	slotTimeout   time.Duration
	gatherTimeout time.Duration

	mu    sync.Mutex
	slots int // free slots
	queue []*request[T, R]
	// expected is the number of requests in the last group and in the queue at the end
	// of that group.
	expected int
	gathered chan struct{} // closed when the expected requests have arrived; nil if no group waits
	// misses counts consecutive waits in which fewer than half of the missing
	// requests arrived.
	misses int
	skips  int // the number of next groups that do not wait
}

// request is one change.
type request[T, R any] struct {
	ctx  context.Context //nolint:containedctx // the group ends with its requests' contexts
	item T

	lead   chan struct{} // closed when the request must lead the next group
	done   chan struct{} // closed after result and err are set
	result R
	err    error
}

// Options configure a Committer. Commit is required.
type Options[T, R any] struct {
	// Commit makes the changes in one transaction. It returns the results in the order of
	// the changes.
	Commit func(ctx context.Context, items []T) ([]R, error)
	// MinTime is the least time that a change must have until its deadline to join a
	// group.
	MinTime time.Duration
	// Key returns the key of a change, or an empty string. A group has at most one change
	// with a key. Key may be nil.
	Key func(item T) string
}

// New returns a Committer.
func New[T, R any](o Options[T, R]) *Committer[T, R] {
	if o.Key == nil {
		o.Key = func(T) string { return "" }
	}
	return &Committer[T, R]{o: o, slots: slots, slotTimeout: SlotTimeout, gatherTimeout: gatherTimeout}
}

// Do makes the change in the transaction of its group, and returns its result.
// Commit runs in the goroutine of one of the group's requests, the leader. The
// context of Commit ends at the first deadline of the group's requests, or when
// the contexts of all requests have ended.
//
// The error is ErrCommitAlone, ErrLeaderPanicked, or the error of Commit. A change whose
// deadline is near gets ErrCommitAlone at once, because it would end the group. If ctx
// ends before the change is in a group, the error is the cause of ctx.
func (c *Committer[T, R]) Do(ctx context.Context, item T) (R, error) {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < c.o.MinTime {
		var none R
		return none, ErrCommitAlone
	}
	r := &request[T, R]{ctx: ctx, item: item, lead: make(chan struct{}), done: make(chan struct{})}
	c.mu.Lock()
	c.queue = append(c.queue, r)
	if c.gathered != nil && c.haveAllArrived() {
		close(c.gathered)
		c.gathered = nil
	}
	if c.slots > 0 {
		c.slots--
		c.passSlot()
	}
	c.mu.Unlock()
	select {
	case <-r.lead:
		c.lead(r)
	case <-r.done:
	case <-ctx.Done():
		if c.leave(r) {
			return r.result, context.Cause(ctx) //nolint:wrapcheck // the caller's own
		}
		select {
		case <-r.lead: // the queue waits for the slot of r
			c.lead(r)
		case <-r.done: // soon, because the group's context ends, too
		}
	}
	return r.result, r.err
}

// passSlot gives the caller's slot to the first request in the queue, or frees
// it when the queue is empty. The caller holds the lock.
func (c *Committer[T, R]) passSlot() {
	if len(c.queue) == 0 {
		c.slots++
		return
	}
	leader := c.queue[0]
	c.queue = c.queue[1:]
	close(leader.lead)
}

// leave removes the request from the queue. It reports whether the request was in
// the queue.
func (c *Committer[T, R]) leave(r *request[T, R]) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.Index(c.queue, r)
	if i < 0 {
		return false
	}
	c.queue = slices.Delete(c.queue, i, i+1)
	return true
}

// haveAllArrived reports whether the expected requests have arrived. The expected
// requests include the leader, but the queue does not. The caller holds the lock.
func (c *Committer[T, R]) haveAllArrived() bool { return 1+len(c.queue) >= c.expected }

// gather waits for the expected requests. After a wait in vain it skips the next waits.
func (c *Committer[T, R]) gather(ctx context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.haveAllArrived() {
		return
	}
	if c.skips > 0 {
		c.skips--
		return
	}
	gathered, before := make(chan struct{}), len(c.queue)
	missing := c.expected - 1 - before
	c.gathered = gathered
	c.mu.Unlock()
	timer := time.NewTimer(c.gatherTimeout)
	select {
	case <-gathered:
	case <-timer.C:
	case <-ctx.Done():
	}
	timer.Stop()
	c.mu.Lock()
	c.gathered = nil
	if arrived := len(c.queue) - before; 2*arrived >= missing {
		c.misses = 0
		return
	}
	c.misses = min(c.misses+1, maxMisses)
	c.skips = 1<<c.misses - 1
}

// lead forms a group of the leader and the queue, commits the group, and passes the
// slot to the next leader.
func (c *Committer[T, R]) lead(leader *request[T, R]) {
	passSlot := sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.passSlot()
	})
	defer passSlot()
	c.gather(leader.ctx)
	group, items := c.form(leader)
	if len(group) == 0 {
		return
	}
	defer time.AfterFunc(c.slotTimeout, passSlot).Stop()

	results, err := []R(nil), ErrLeaderPanicked
	defer func() { // runs even if Commit panics
		c.mu.Lock()
		c.expected = min(len(group)+len(c.queue), maxGroup)
		c.mu.Unlock()
		for i, r := range group {
			if r.err = err; err == nil {
				r.result = results[i]
			}
			close(r.done)
		}
	}()
	ctx, cancel := contextOf(group)
	defer cancel()
	results, err = c.o.Commit(ctx, items)
	if err != nil {
		err = errors.Join(err, context.Cause(ctx))
	}
	if _, refused := errors.AsType[*pq.Error](err); refused && ctx.Err() == nil &&
		!postgres.IsUnavailable(err) && !errors.Is(err, postgres.ErrOutcomeUnknown) {
		err = ErrCommitAlone
	}
}

// form removes the requests of the next group from the queue. A request whose context
// has ended does not join the group, because it would end the group's context. Its Do
// returns the cause of the context. A request whose key is in the group gets
// ErrCommitAlone.
func (c *Committer[T, R]) form(leader *request[T, R]) (group []*request[T, R], items []T) {
	c.mu.Lock()
	n := min(len(c.queue), maxGroup-1)
	waiting := append([]*request[T, R]{leader}, c.queue[:n]...)
	c.queue = c.queue[n:]
	c.mu.Unlock()
	keys := map[string]bool{}
	for _, r := range waiting {
		key := c.o.Key(r.item)
		switch {
		case r.ctx.Err() != nil:
			r.err = context.Cause(r.ctx)
		case keys[key]:
			r.err = ErrCommitAlone
		}
		if r.err != nil {
			close(r.done)
			continue
		}
		if key != "" {
			keys[key] = true
		}
		group, items = append(group, r), append(items, r.item)
	}
	return group, items
}

// contextOf returns a context that ends at the first deadline of the group's
// requests, or when the contexts of all requests have ended.
func contextOf[T, R any](group []*request[T, R]) (context.Context, context.CancelFunc) {
	if len(group) == 1 {
		return context.WithCancel(group[0].ctx)
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(group[0].ctx))
	waiting := new(atomic.Int64)
	waiting.Store(int64(len(group)))
	stops := make([]func() bool, len(group))
	for i, r := range group {
		stops[i] = context.AfterFunc(r.ctx, func() {
			if waiting.Add(-1) == 0 || errors.Is(r.ctx.Err(), context.DeadlineExceeded) {
				cancel(context.Cause(r.ctx))
			}
		})
	}
	return ctx, func() {
		for _, stop := range stops {
			stop()
		}
		cancel(nil)
	}
}
