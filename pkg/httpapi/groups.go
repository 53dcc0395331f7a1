package httpapi

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

// groups have changes that are asked for at the same time share a transaction,
// and so what one costs: its round trips, and the wait for the disk at its
// commit. A group is what came while the groups before it were on their way, and of
// a change that comes alone it is that change.
//
// Clients that come back as soon as they are answered would part into two groups
// that follow each other, each of half of them. So a group waits for those whom the
// last one has answered, where that has shown to bring them: a little while, and
// seldom where they do not come.
//
// What shares a transaction shares its fate. Where the outcome is unknown, it is
// so for each of the group; where PostgreSQL refuses something, each of them is
// told to go alone.
type groups[T, R any] struct {
	// commit makes the changes in one transaction of their own, and returns a
	// result for each.
	commit func(ctx context.Context, items []T) ([]R, error)
	// patience is for how long a group that does not get on keeps the next one
	// waiting.
	patience time.Duration
	// gathering is for how long a group waits for those who are expected.
	gathering time.Duration

	mu    sync.Mutex
	ways  int // how many more groups may be on their way
	queue []*member[T, R]
	// expected is how many there were when the last group was answered: in it, and
	// in the queue.
	expected int
	gathered chan struct{} // closed when as many are there; nil where nobody waits for it
	vain     int           // how many waits in a row have brought less than half of the missing
	pass     int           // how many groups are not to wait
}

const (
	// groupWays is how many groups that get on are on their way at once. With two
	// the groups are smaller, and cost more than the wait.
	groupWays = 1
	// groupPatience is short to a client, and long to PostgreSQL.
	groupPatience = 100 * time.Millisecond
	// groupGathering is about as long as a commit takes.
	groupGathering = time.Millisecond
	// maxVain bounds the waits in vain that count: after so many, one group in 64
	// tries it again.
	maxVain = 6
	// maxGroup bounds the changes of a group.
	maxGroup = 100
)

// errGoAlone says that a change has not been made with others, and that it may
// be made alone.
var errGoAlone = errors.New("the change cannot be made together with others")

// errLeaderPanicked is the others' error where the leader's goroutine panics. From
// where, nobody knows: their changes may have been made.
var errLeaderPanicked = errors.New("the request that led the changes' transaction has panicked")

// member is one change of a group.
type member[T, R any] struct {
	ctx  context.Context //nolint:containedctx // whose end the group heeds
	item T

	turn   chan struct{} // closed when the member is to lead those who wait
	done   chan struct{} // closed with result and err set
	result R
	err    error
}

func newGroups[T, R any](commit func(context.Context, []T) ([]R, error)) *groups[T, R] {
	return &groups[T, R]{commit: commit, ways: groupWays, patience: groupPatience, gathering: groupGathering}
}

// do makes the change, together with others where there are any. It returns
// errGoAlone where only the change's own transaction can tell what becomes of
// it.
func (g *groups[T, R]) do(ctx context.Context, item T) (R, error) {
	m := &member[T, R]{ctx: ctx, item: item, turn: make(chan struct{}), done: make(chan struct{})}
	g.mu.Lock()
	g.queue = append(g.queue, m)
	if g.gathered != nil && g.areAllHere() {
		close(g.gathered)
		g.gathered = nil
	}
	if g.ways > 0 {
		g.ways--
		g.giveTurn()
	}
	g.mu.Unlock()
	select {
	case <-m.turn:
		g.lead(m)
	case <-m.done:
	case <-ctx.Done():
		if g.leave(m) {
			return m.result, context.Cause(ctx) //nolint:wrapcheck // the caller's own
		}
		select {
		case <-m.turn: // others wait for the way that it was given
			g.lead(m)
		case <-m.done: // which the end of its members' contexts brings about
		}
	}
	return m.result, m.err
}

// giveTurn gives a way to the first of those who wait, or keeps it for whoever
// comes next. The caller has the lock.
func (g *groups[T, R]) giveTurn() {
	if len(g.queue) == 0 {
		g.ways++
		return
	}
	leader := g.queue[0]
	g.queue = g.queue[1:]
	close(leader.turn)
}

// leave takes the member out of the queue, and reports whether it was there.
func (g *groups[T, R]) leave(m *member[T, R]) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.queue, m)
	if i < 0 {
		return false
	}
	g.queue = slices.Delete(g.queue, i, i+1)
	return true
}

// areAllHere tells whether those who are expected are there with their leader, who
// is not in the queue any more. The caller has the lock.
func (g *groups[T, R]) areAllHere() bool { return 1+len(g.queue) >= g.expected }

// gather waits for those who are expected, unless that was in vain lately.
func (g *groups[T, R]) gather(ctx context.Context) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.areAllHere() {
		return
	}
	if g.pass > 0 {
		g.pass--
		return
	}
	gathered, before := make(chan struct{}), len(g.queue)
	missing := g.expected - 1 - before
	g.gathered = gathered
	g.mu.Unlock()
	timer := time.NewTimer(g.gathering)
	select {
	case <-gathered:
	case <-timer.C:
	case <-ctx.Done():
	}
	timer.Stop()
	g.mu.Lock()
	g.gathered = nil
	if came := len(g.queue) - before; 2*came >= missing {
		g.vain = 0
		return
	}
	g.vain = min(g.vain+1, maxVain)
	g.pass = 1<<g.vain - 1
}

// lead brings the leader and those who wait on their way, and gives the way to
// the next.
func (g *groups[T, R]) lead(leader *member[T, R]) {
	giveBack := sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.giveTurn()
	})
	defer giveBack()
	g.gather(leader.ctx)
	g.mu.Lock()
	n := min(len(g.queue), maxGroup-1)
	waiting := append([]*member[T, R]{leader}, g.queue[:n]...)
	g.queue = g.queue[n:]
	g.mu.Unlock()

	var members []*member[T, R]
	var items []T
	for _, m := range waiting {
		if m.ctx.Err() != nil { // it would have the others' end, too
			m.err = context.Cause(m.ctx)
			close(m.done)
			continue
		}
		members, items = append(members, m), append(items, m.item)
	}
	if len(members) == 0 {
		return
	}
	defer time.AfterFunc(g.patience, giveBack).Stop()

	results, err := []R(nil), errLeaderPanicked
	defer func() { // also where commit panics
		g.mu.Lock()
		g.expected = min(len(members)+len(g.queue), maxGroup)
		g.mu.Unlock()
		for i, m := range members {
			if m.err = err; err == nil {
				m.result = results[i]
			}
			close(m.done)
		}
	}()
	ctx, cancel := contextOf(members)
	defer cancel()
	results, err = g.commit(ctx, items)
	if err != nil {
		err = errors.Join(err, context.Cause(ctx))
	}
	if _, refused := errors.AsType[*pq.Error](err); refused && ctx.Err() == nil &&
		!postgres.IsUnavailable(err) && !errors.Is(err, postgres.ErrOutcomeUnknown) {
		err = errGoAlone
	}
}

// contextOf ends when the first of the members' deadlines is over, or when
// nobody waits for the group any more.
func contextOf[T, R any](members []*member[T, R]) (context.Context, context.CancelFunc) {
	if len(members) == 1 {
		return context.WithCancel(members[0].ctx)
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(members[0].ctx))
	waiting := new(atomic.Int64)
	waiting.Store(int64(len(members)))
	stops := make([]func() bool, len(members))
	for i, m := range members {
		stops[i] = context.AfterFunc(m.ctx, func() {
			cause := context.Cause(m.ctx)
			if waiting.Add(-1) == 0 || errors.Is(cause, errRequestTimeout) {
				cancel(cause)
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
