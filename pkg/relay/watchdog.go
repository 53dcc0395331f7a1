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
	waiting, err := within(ctx, w.timeout, func(ctx context.Context) (store.Waiting, error) {
		return r.o.Store.Waiting(ctx, w.patience+r.o.FlushTimeout)
	})
	switch {
	case ctx.Err() != nil:
		return
	case err != nil:
		w.sight(lookItem, sighting{})
		if w.unchanged(lookItem, w.patience) {
			r.stalled(ctx, r.unreadable(ctx, err))
		}
		return
	}
	w.look(waiting)
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

// look counts a look at everything that waits, and forgets everything else.
func (w *watchdog) look(waiting store.Waiting) {
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

// lockedTables describes the locks that exclude relays from a table of the outbox, or
// from the cursor. A younger lock is not the reason of a stall.
func (r *Relay) lockedTables(lockers []store.Locker) (reasons []string) {
	named := map[int]bool{} // a session can hold several locks
	for _, l := range lockers {
		switch {
		case named[l.PID]:
			continue
		case l.Lock != "" || l.Seconds.Valid && l.Seconds.Float64 < r.watchdog.patience.Seconds():
			continue
		case l.Mode == "":
			reasons = append(reasons, l.String()+" blocks a session that needs a table of the outbox")
		case l.IsRowLock():
			reasons = append(reasons, l.String()+" has locked the row of "+l.Table)
		case l.Granted:
			reasons = append(reasons, fmt.Sprintf("%s holds the lock %s of %s", l, l.Mode, l.Table))
		default:
			reasons = append(reasons, fmt.Sprintf("%s waits for the lock %s of %s, and all others wait behind it", l, l.Mode, l.Table))
		}
		named[l.PID] = l.PID != 0
	}
	return reasons
}

func reasonText(reasons []string) string {
	if len(reasons) == 0 {
		return "no obstacle is known to this relay"
	}
	return strings.Join(reasons, ", ")
}

// inspection finds out why events and batches wait that have not changed.
type inspection struct {
	*Relay
	waiting    store.Waiting
	lockers    []store.Locker
	lockersErr error
}

// run returns nil if nothing is stalled.
func (i *inspection) run() *stalledError {
	found := &stalledError{fault: true}
	firstFailing := slices.IndexFunc(i.waiting.Batches, func(b store.WaitingBatch) bool { return b.Failures > 0 })
	if firstFailing < 0 {
		firstFailing = len(i.waiting.Batches)
	}
	i.line(found, i.waiting.Batches[:firstFailing])
	i.line(found, i.waiting.Batches[firstFailing:])
	for _, event := range i.waiting.Events {
		i.event(found, event)
	}
	if i.watchdog.unchanged(quarantineItem, i.watchdog.patience) {
		i.add(found, quarantineItem, fmt.Sprintf("%d batches of quarantined event types", i.waiting.Quarantined), i.watchdog.patience,
			[]string{"the sink takes no event of these types (" + i.waiting.Quarantine + ")"})
	}
	if len(found.stalls) == 0 {
		return nil
	}
	if more := len(found.stalls) - maxReportedStalls; more > 0 {
		found.stalls = append(found.stalls[:maxReportedStalls], fmt.Sprintf("and %d more", more))
	}
	return found
}

// add adds a stall. special are the reasons of this event or batch. Without any reason,
// it is stalled only after the longest insert.
func (i *inspection) add(found *stalledError, item, text string, patience time.Duration, special []string) {
	reasons, fault := special, i.fault()
	if fault != nil && (len(special) == 0 || !errors.Is(fault, errNotChecked)) {
		reasons = append(reasons, fault.Error())
	}
	if len(reasons) == 0 && !i.watchdog.unchanged(item, max(patience, i.o.FlushTimeout+i.watchdog.margin)) {
		return
	}
	if len(special) > 0 || fault == nil || errors.Is(fault, errNotChecked) {
		found.fault = false
	}
	var facts []string
	if busy := int(i.busy.Load()); busy == i.o.Workers {
		facts = append(facts, fmt.Sprintf("all %d workers of this relay are busy", busy))
	}
	if level := i.backpressure.Load(); level > 0 {
		facts = append(facts, fmt.Sprintf("the sink is overloaded and the linger is %s", i.minLinger()))
	}
	facts = append(facts, fmt.Sprintf("batches: %d delivering, %d of them without an attempt, %d failing",
		i.waiting.Delivering, i.waiting.Unattempted, i.waiting.Failing))
	if i.waiting.Cuts > 0 {
		facts = append(facts, "last cut "+ago(i.waiting.SinceCut))
	}
	if i.lockersErr != nil {
		facts = append(facts, "the locks of PostgreSQL are unknown: "+i.lockersErr.Error())
	}
	found.stalls = append(found.stalls, fmt.Sprintf("%s: %s (%s)", text, reasonText(reasons), strings.Join(facts, ", ")))
}

// event adds an event that is in no batch, if it is stalled. If batches are in front of
// it, they are judged themselves, and the event waits for its turn.
func (i *inspection) event(found *stalledError, event store.WaitingEvent) {
	patience := max(i.watchdog.patience, i.minLinger()+i.watchdog.margin)
	before, isBehind := i.waiting.Behind()
	if isBehind {
		patience *= queuePatience
	}
	if !i.watchdog.unchanged(eventItem(event), patience) {
		return
	}
	reasons := i.lockedTables(i.lockers)
	if before != "" {
		reasons = append(reasons, before)
	}
	i.add(found, eventItem(event), fmt.Sprintf("event %d, published %s, is in no batch", event.ID, ago(event.Age)), patience, reasons)
}

// line adds the stalled batches of a line: those that no worker can claim, and the first
// other batch. The batches behind it wait for their turn.
func (i *inspection) line(found *stalledError, batches []store.WaitingBatch) {
	// A claim does not lock the row of the cursor.
	onTables := slices.DeleteFunc(slices.Clone(i.lockers), store.Locker.IsRowLock)
	for _, batch := range batches {
		if i.isLeased(batch) {
			continue
		}
		if !i.watchdog.unchanged(batchItem(batch), i.watchdog.patience) {
			return
		}
		reasons, isBlocked := i.lockedTables(onTables), false
		if holder := i.holder(batch.Lock); holder != nil {
			reasons, isBlocked = append(reasons, holder.String()+" has locked the row of the batch"), true
		}
		if i.o.Store.IsElsewhere(batch) {
			reasons, isBlocked = append(reasons, "its first attempt went to another destination, "+batch.Destination), true
		}
		if batch.Delay > 0 {
			reasons, isBlocked = append(reasons, fmt.Sprintf("its next attempt is due in %s, which is longer than any delay",
				batch.Delay.Round(time.Second))), true
		}
		text := fmt.Sprintf("batch %s with %d events, cut %s, waits for attempt %d", batch.ID, batch.Events, ago(batch.Age), batch.Attempts+1)
		if batch.SinceAttempt >= 0 {
			text += ", last attempt " + ago(batch.SinceAttempt)
		}
		if batch.LastError != "" {
			text += ", last error: " + batch.LastError
		}
		if isBlocked {
			i.add(found, batchItem(batch), text, i.watchdog.patience, reasons)
			continue
		}
		if line := lineOf(batch); i.watchdog.unchanged(line, i.watchdog.patience) {
			i.add(found, line, text, i.watchdog.patience, reasons)
		}
		return
	}
}

// holder returns the session that has locked a row as the transaction, or nil if the
// transaction has ended.
func (i *inspection) holder(transaction string) *store.Locker {
	for n := range i.lockers {
		if transaction != "" && i.lockers[n].Lock == transaction {
			return &i.lockers[n]
		}
	}
	return nil
}

// isLeased returns whether a worker holds the lease of the batch and can still be
// working. The transaction of a lease begins right after the attempt is counted. An
// attempt has fewer than ten steps of FlushTimeout.
func (i *inspection) isLeased(batch store.WaitingBatch) bool {
	holder := i.holder(batch.Lock)
	if holder == nil || !holder.Seconds.Valid || batch.SinceAttempt < 0 {
		return false
	}
	began := batch.SinceAttempt.Seconds() - holder.Seconds.Float64 // after the attempt was counted
	return began > -1 && began < 10 && batch.SinceAttempt < 10*i.o.FlushTimeout+time.Minute
}

// ago returns the time as "5s ago". A time in the future, after the clock was set back,
// is "just now".
func ago(d time.Duration) string {
	if d < time.Second {
		return "just now"
	}
	return d.Round(time.Second).String() + " ago"
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

// fault returns the fault of PostgreSQL or of the sink that stops this relay, or nil.
func (r *Relay) fault() error {
	if err := r.postgres.err(); err != nil {
		return fmt.Errorf("postgresql: %w", err)
	}
	if err := r.circuit.err(); err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	return nil
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
