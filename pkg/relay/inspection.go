package relay

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

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
// it is stalled only after the longest insert, and so long after the last fault.
func (i *inspection) add(found *stalledError, item, text string, patience time.Duration, special []string) {
	reasons, fault := special, i.fault()
	if fault != nil && (len(special) == 0 || !errors.Is(fault, errNotChecked)) {
		reasons = append(reasons, fault.Error())
	}
	if longest := max(patience, i.o.FlushTimeout+i.watchdog.margin); len(reasons) == 0 && (!i.watchdog.unchanged(item, longest) || !i.watchdog.faultless(longest)) {
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
	if before != "" && i.fault() == nil { // a fault is the reason why the batches wait
		reasons = append(reasons, before)
	}
	i.add(found, eventItem(event), fmt.Sprintf("event %d, published %s, is in no batch", event.ID, ago(event.Age)), patience, reasons)
}

// line adds the stalled batches of a line. A batch that no worker can claim is stalled. Of
// the other batches, only the first can be stalled, because the others wait for their turn.
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
