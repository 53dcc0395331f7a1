package relay

import (
	"sync"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// kind is an event type in a period. Events of a kind share their materialized views and
// nearly always their partition.
type kind struct {
	eventType string
	day       int64 // since 1970-01-01 UTC
}

const microsecondsPerDay = 24 * 60 * 60 * 1_000_000

func kindOf(keys *store.Events, index int) kind {
	at := keys.EventDateTime[index]
	day := at / microsecondsPerDay
	if at%microsecondsPerDay < 0 {
		day--
	}
	return kind{keys.EventType.At(index), day}
}

// evidence tells whether an event or the sink is the cause of a failed insert. If the
// sink takes other events of the same kind, the event is the cause. If other events of
// the kind fail too, the sink may be the cause, for example by a materialized view that
// throws for this kind.
//
// It is the memory of one process, and records a kind only after one of its events has
// failed alone.
type evidence struct {
	mu    sync.Mutex
	since time.Time // when the memory begins
	kinds map[kind]*outcomes
}

// outcomes are the last outcomes of the events of a kind.
type outcomes struct {
	delivered time.Time
	// failing has the events that have failed alone since the last delivery, with the
	// times of their last failures. It keeps the latest failingEvents.
	failing map[int64]time.Time
}

const (
	// maxKinds bounds the memory.
	maxKinds = 10_000
	// failingEvents is the number of failing events after which the sink seems to take no
	// event of the kind.
	failingEvents = 5
)

// delivered records events that the sink has taken.
func (e *evidence) delivered(keys *store.Events) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.kinds) == 0 {
		return
	}
	now := time.Now()
	for i := range keys.ID {
		if known := e.kinds[kindOf(keys, i)]; known != nil {
			known.delivered = now
			clear(known.failing)
		}
	}
}

// against records that an event has failed alone, and returns whether the event is the
// cause. previous is the time of its previous attempt.
func (e *evidence) against(k kind, id int64, previous time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.kinds == nil || len(e.kinds) >= maxKinds {
		e.kinds, e.since = map[kind]*outcomes{}, time.Now()
	}
	known := e.kinds[k]
	if known == nil {
		known = &outcomes{failing: map[int64]time.Time{}}
		e.kinds[k] = known
	}
	delete(known.failing, id)
	othersFail, oldest := false, id
	for other, at := range known.failing {
		othersFail = othersFail || at.After(previous)
		if before, ok := known.failing[oldest]; !ok || at.Before(before) {
			oldest = other
		}
	}
	if len(known.failing) == failingEvents {
		delete(known.failing, oldest)
	}
	known.failing[id] = time.Now()
	switch {
	case previous.Before(e.since):
		return false // other outcomes may be forgotten
	case known.delivered.After(previous):
		return true
	}
	// Without another event of the kind, the successful check of the sink is sufficient.
	return !othersFail
}

// isBroken returns whether several events of the kind have failed alone, and none was
// delivered since the first of these failures, nor in the time d.
func (e *evidence) isBroken(k kind, d time.Duration) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	known := e.kinds[k]
	return known != nil && len(known.failing) == failingEvents && time.Since(known.delivered) > d
}
