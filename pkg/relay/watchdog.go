package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

const (
	// watchInterval is the time between two looks of the watchdog at the outbox.
	watchInterval = 10 * time.Second
	// watchPatience is the time after which an event or a batch that has not changed is
	// stalled. Together with one interval and watchTimeout it is one minute.
	watchPatience = 40 * time.Second
	// watchTimeout bounds a look.
	watchTimeout = 10 * time.Second
	// watchMargin is added to the times for which an event or a batch may wait as planned:
	// two polls, the linger, and an insert while all workers are busy.
	watchMargin = 10 * time.Second
	// queuePatience multiplies watchPatience for an event behind batches.
	queuePatience = 10
	// maxReportedStalls bounds the stalled events and batches of an error.
	maxReportedStalls = 3
)

// watchdog finds events and batches that nobody works on. An event is stalled if it is the
// first that is not in a batch, and no cut takes it for watchPatience. A batch is stalled
// if it is the first in its line, and no batch of the line has changed for watchPatience.
// A backlog that drains is old, but it changes. A batch that no worker can claim is stalled
// even if the workers claim the batches behind it. The watchdog counts its own looks and
// does not compare clocks, so it works after a clock was set back. A process that was
// suspended makes no looks.
type watchdog struct {
	interval, patience, margin, timeout time.Duration

	// The goroutine of watchUntil uses these fields.
	seen     map[string]sighting
	healthy  int // consecutive looks that have succeeded without a fault of a database
	starving bool

	mu     sync.Mutex
	cause  *stalledError
	logged time.Time // the log record of the beginning, or zero
}

// sighting is the number of consecutive looks that have found an item in the same state.
type sighting struct {
	state string
	looks int
	line  string // of a batch
}

// stalledError says what waits, and why.
type stalledError struct {
	stalls []string
	// fault says that the reason is a fault that Ready returns and the log has anyway.
	fault bool
}

func (e *stalledError) Error() string { return "stalled: " + strings.Join(e.stalls, "; ") }

func newWatchdog(pollInterval time.Duration) *watchdog {
	patience := max(watchPatience, 2*pollInterval+watchMargin)
	return &watchdog{
		interval: watchInterval, patience: patience, margin: watchMargin, timeout: watchTimeout,
		seen: map[string]sighting{},
	}
}

// err returns nil if nothing is stalled.
func (w *watchdog) err() *stalledError {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cause
}

// watchUntil looks at the outbox until ctx ends.
func (r *Relay) watchUntil(ctx context.Context) error {
	looks := time.NewTicker(r.watchdog.interval)
	defer looks.Stop()
	for {
		r.turned(loopWatch)
		r.watch(ctx)
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended ctx
		case <-looks.C:
		}
	}
}

const (
	lookItem       = "look" // of looks that fail
	quarantineItem = "quarantine"
)

// watch looks at the outbox once.
func (r *Relay) watch(ctx context.Context) {
	w := r.watchdog
	if r.o.Store.Paused() != nil { // nothing is expected to happen
		w.seen = map[string]sighting{}
		r.stalled(ctx, nil)
		return
	}
	waiting, err := within(ctx, w.timeout, func(ctx context.Context) (store.Waiting, error) {
		return r.o.Store.Waiting(ctx, w.patience+r.o.FlushTimeout)
	})
	switch {
	case ctx.Err() != nil:
		return
	case err != nil:
		w.healthy = 0
		w.sight(lookItem, sighting{})
		if w.unchanged(lookItem, w.patience) {
			r.stalled(ctx, r.unreadable(ctx, err))
		}
		return
	}
	w.look(waiting, r.fault())
	r.starving(ctx, waiting)
	if !w.unchanged(quarantineItem, w.patience) && !slices.ContainsFunc(waiting.Events, func(e store.WaitingEvent) bool { return w.unchanged(eventItem(e), w.patience) }) &&
		!slices.ContainsFunc(waiting.Batches, func(b store.WaitingBatch) bool { return w.unchanged(batchItem(b), w.patience) }) {
		r.stalled(ctx, nil)
		return
	}
	var transactions []string
	for _, batch := range waiting.Batches {
		transactions = append(transactions, batch.Lock)
	}
	lockers, err := r.lockers(ctx, transactions)
	if ctx.Err() != nil {
		return
	}
	r.stalled(ctx, (&inspection{r, waiting, lockers, err}).run())
}

// sight counts a look at an item, as of the earlier looks.
func (w *watchdog) sight(item string, now sighting) {
	if before := w.seen[item]; before.state == now.state {
		now.looks = before.looks
	}
	now.looks++
	w.seen[item] = now
}

// look counts a look at everything that waits, and forgets everything else. fault is the
// fault of a database at this time, or nil.
func (w *watchdog) look(waiting store.Waiting, fault error) {
	w.healthy++
	if fault != nil {
		w.healthy = 0
	}
	before := w.seen
	w.seen = map[string]sighting{}
	keep := func(item string, now sighting) {
		if seen, ok := before[item]; ok {
			w.seen[item] = seen
		}
		w.sight(item, now)
	}
	for _, event := range waiting.Events {
		keep(eventItem(event), sighting{})
	}
	for _, batch := range waiting.Batches {
		keep(batchItem(batch), sighting{state: batch.State, line: lineOf(batch)})
	}
	for _, line := range []string{deliveringLine, failingLine} {
		keep(line, sighting{})
	}
	if waiting.Quarantined > 0 {
		keep(quarantineItem, sighting{})
	}
	for item, batch := range before {
		if now := w.seen[item]; batch.line != "" && now.state != batch.state {
			w.seen[batch.line] = sighting{looks: 1}
		}
	}
}

// The lines of batches. Workers claim the first batch of a line that they can.
const (
	deliveringLine = "batches"
	failingLine    = "failing batches"
)

func lineOf(b store.WaitingBatch) string {
	if b.Failures > 0 {
		return failingLine
	}
	return deliveringLine
}

// unchanged returns whether the item was the same in all looks of the time d, or longer.
func (w *watchdog) unchanged(item string, d time.Duration) bool {
	return time.Duration(w.seen[item].looks-1)*w.interval >= d
}

// faultless returns whether no database had a fault in all looks of the time d, or longer.
func (w *watchdog) faultless(d time.Duration) bool {
	return time.Duration(w.healthy-1)*w.interval >= d
}

func eventItem(e store.WaitingEvent) string { return fmt.Sprintf("event %d", e.ID) }
func batchItem(b store.WaitingBatch) string { return "batch " + b.ID.String() }

var errNoAnswer = errors.New("postgresql has not answered in time")

// within calls read with a timeout. If read does not return then, for example because the
// network drops its packets, within does not wait for it.
func within[T any](ctx context.Context, timeout time.Duration, read func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	results := make(chan result, 1)
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errNoAnswer)
	go func() {
		defer cancel()
		value, err := read(ctx)
		results <- result{value, err}
	}()
	var nothing T
	select {
	case <-ctx.Done():
	case result := <-results:
		if result.err == nil || ctx.Err() == nil {
			return result.value, result.err
		}
	}
	return nothing, context.Cause(ctx) //nolint:wrapcheck // errNoAnswer, or the caller has ended ctx
}

func (r *Relay) lockers(ctx context.Context, transactions []string) ([]store.Locker, error) {
	return within(ctx, watchTimeout, func(ctx context.Context) ([]store.Locker, error) {
		return r.o.Store.Lockers(ctx, transactions)
	})
}

// unreadable explains why the outbox cannot be read.
func (r *Relay) unreadable(ctx context.Context, cause error) *stalledError {
	lockers, err := r.lockers(ctx, nil)
	reasons := r.lockedTables(lockers)
	fault := r.postgres.err()
	locked := len(reasons) > 0
	switch {
	case locked || err == nil && fault == nil:
	case fault != nil:
		reasons = append(reasons, "postgresql: "+fault.Error())
	default:
		reasons = append(reasons, "the locks of PostgreSQL cannot be read either: "+err.Error())
	}
	return &stalledError{
		stalls: []string{fmt.Sprintf("the outbox cannot be read (%v): %s", cause, reasonText(reasons))},
		fault:  fault != nil && !locked,
	}
}

// stalled records the result of a look. It logs the beginning and the end, unless the log
// has the reason already.
func (r *Relay) stalled(ctx context.Context, cause *stalledError) {
	w := r.watchdog
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cause = cause
	switch {
	case cause != nil && !cause.fault && w.logged.IsZero():
		w.logged = time.Now()
		r.log.ErrorContext(ctx, "delivery stalled", "err", cause)
	case cause == nil && !w.logged.IsZero():
		r.log.InfoContext(ctx, "delivery continues", "stalled_for", time.Since(w.logged))
		w.logged = time.Time{}
	}
}

// starving warns if failing batches wait for the worker of failing batches for a long
// time, although this worker makes progress.
func (r *Relay) starving(ctx context.Context, waiting store.Waiting) {
	starving := waiting.Starving > 0
	if starving && !r.watchdog.starving {
		lastError := ""
		for _, batch := range waiting.Batches {
			if batch.Failures > 0 {
				lastError = batch.LastError
				break
			}
		}
		r.log.WarnContext(ctx, "failing batches wait for a worker",
			"failing", waiting.Failing, "waiting", waiting.Starving, "last_error", lastError,
			"hint", "failing batches use one worker of each relay")
	}
	r.watchdog.starving = starving
}

// withStall adds what the watchdog has found to err, unless err is the reason.
func (r *Relay) withStall(err error) error {
	stall := r.watchdog.err()
	switch {
	case stall == nil || err != nil && stall.fault:
		return err
	case err == nil:
		return stall
	}
	return fmt.Errorf("%w; %w", err, stall)
}
