// Package groupcommit makes changes that are requested at the same time share
// one transaction.
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

// SlotTimeout is how long a group holds its slot. After that the next group
// starts beside it. It is short for a client and long for PostgreSQL.
const SlotTimeout = 100 * time.Millisecond

const (
	// slots is the number of groups that are committed at once, unless one takes
	// longer than SlotTimeout. With two slots the groups are smaller, which costs
	// more than the wait for the slot.
	slots = 1
	// gatherTimeout is about as long as a commit takes.
	gatherTimeout = time.Millisecond
	// maxMisses bounds the misses that count. After so many, one group in 64
	// waits.
	maxMisses = 6
	// maxGroup bounds the changes of a group.
	maxGroup = 100
)

// ErrCommitAlone is the error of Do when PostgreSQL refused the group's
// transaction. The change was not made, and the caller may make it in a
// transaction of its own.
var ErrCommitAlone = errors.New("the change cannot share a transaction")

// ErrLeaderPanicked is the error of Do when commit panicked in another request's
// goroutine. The change may have been made.
var ErrLeaderPanicked = errors.New("the request that led the group panicked")

// Committer forms groups of changes and commits each group in one transaction.
// The changes of a group share its cost: the round trips, and the wait for the
// disk at the commit. It is safe for concurrent use.
//
// A group holds a slot while it is committed. Requests that arrive meanwhile
// form the next group. A request that arrives alone forms its own group.
//
// Clients that send their next request once they are answered would split into
// two groups that alternate. So a group waits a moment for as many requests as
// the last group left to be expected. When they do not arrive, groups wait less
// often.
//
// The changes of a group share its fate. When the outcome is unknown, it is
// unknown for each of them. When PostgreSQL refuses the transaction, each of
// them gets ErrCommitAlone.
type Committer[T, R any] struct {
	commit        func(ctx context.Context, items []T) ([]R, error)
	slotTimeout   time.Duration
	gatherTimeout time.Duration

	mu    sync.Mutex
	slots int // free ones
	queue []*request[T, R]
	// expected is the number of requests when the last group was answered: in
	// that group, and in the queue.
	expected int
	gathered chan struct{} // closed when as many have arrived; nil when no group waits
	// misses counts consecutive waits in which fewer than half of the missing
	// requests arrived.
	misses int
	skips  int // how many of the next groups do not wait
}

// request is one change.
type request[T, R any] struct {
	ctx  context.Context //nolint:containedctx // the group ends with its requests' contexts
	item T

	lead   chan struct{} // closed when the request is to lead the next group
	done   chan struct{} // closed after result and err are set
	result R
	err    error
}

// New returns a Committer. commit makes the changes in one transaction, and
// returns a result for each of them, in their order.
func New[T, R any](commit func(ctx context.Context, items []T) ([]R, error)) *Committer[T, R] {
	return &Committer[T, R]{commit: commit, slots: slots, slotTimeout: SlotTimeout, gatherTimeout: gatherTimeout}
}

// Do makes the change, in one transaction with the changes that arrive
// meanwhile, and returns its result. commit runs in the goroutine of one of the
// requests. Its context ends with the first deadline of the group's requests, or
// when all of their contexts have ended.
//
// Do returns ErrCommitAlone, ErrLeaderPanicked, the error of commit, or the
// cause of ctx when that ends before the change is part of a group.
func (c *Committer[T, R]) Do(ctx context.Context, item T) (R, error) {
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
		case <-r.lead: // others wait for its slot
			c.lead(r)
		case <-r.done: // soon: the context of its group ends as well
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

// leave takes the request out of the queue, and reports whether it was there.
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

// haveAllArrived reports whether as many requests as expected have arrived. The
// leader is one of them and is not in the queue. The caller holds the lock.
func (c *Committer[T, R]) haveAllArrived() bool { return 1+len(c.queue) >= c.expected }

// gather waits for the requests that are expected, unless earlier waits were
// misses.
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

// lead forms a group of the leader and the queue, commits it, and passes the
// slot on.
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
	defer func() { // also when commit panics
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
	results, err = c.commit(ctx, items)
	if err != nil {
		err = errors.Join(err, context.Cause(ctx))
	}
	if _, refused := errors.AsType[*pq.Error](err); refused && ctx.Err() == nil &&
		!postgres.IsUnavailable(err) && !errors.Is(err, postgres.ErrOutcomeUnknown) {
		err = ErrCommitAlone
	}
}

// form takes the requests of the next group out of the queue. It ends requests
// whose contexts have ended: they would end the group's context.
func (c *Committer[T, R]) form(leader *request[T, R]) (group []*request[T, R], items []T) {
	c.mu.Lock()
	n := min(len(c.queue), maxGroup-1)
	waiting := append([]*request[T, R]{leader}, c.queue[:n]...)
	c.queue = c.queue[n:]
	c.mu.Unlock()
	for _, r := range waiting {
		if r.ctx.Err() != nil {
			r.err = context.Cause(r.ctx)
			close(r.done)
			continue
		}
		group, items = append(group, r), append(items, r.item)
	}
	return group, items
}

// contextOf returns a context that ends with the first deadline of the group's
// requests, or when all of their contexts have ended.
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
