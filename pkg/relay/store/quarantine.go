package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/lib/pq"
)

// Quarantine returns the event types that were in quarantine at the last Poll, sorted.
func (s *Store) Quarantine() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.quarantine))
}

func (s *Store) setQuarantine(types []string) {
	quarantine := make(map[string]struct{}, len(types))
	for _, eventType := range types {
		quarantine[eventType] = struct{}{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quarantine = quarantine
}

// IsQuarantined returns whether the event type is in quarantine.
func (s *Store) IsQuarantined(eventType string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, quarantined := s.quarantine[eventType]
	return quarantined
}

// PutIntoQuarantine puts an event type into quarantine, for the whole fleet. SetAside then
// separates its events from other events.
func (s *Store) PutIntoQuarantine(ctx context.Context, eventType string, cause error) error {
	if _, err := s.exec(ctx, quarantineSQL, eventType, reason(cause)); err != nil {
		return fmt.Errorf("put an event type into quarantine: %w", err)
	}
	s.setQuarantine(append(s.Quarantine(), eventType))
	return nil
}

// EndQuarantine releases event types, and makes the batches that were set aside due.
func (s *Store) EndQuarantine(ctx context.Context, types []string) error {
	var released int
	if err := s.get(ctx, &released, releaseSQL, pq.Array(types)); err != nil {
		return fmt.Errorf("end the quarantine: %w", err)
	}
	s.setQuarantine(slices.DeleteFunc(s.Quarantine(), func(eventType string) bool { return slices.Contains(types, eventType) }))
	return nil
}

// SetAside moves events of quarantined types from the batch to a quarantined batch. It
// ends the lease, and the remaining events are due again. This attempt must be the first
// attempt of the batch, and must have sent nothing. Quarantined batches that were never
// attempted collect events, so that few batches exist.
func (l *Lease) SetAside(ctx context.Context, aside, remaining []int64) error {
	return l.finish(endingShrink, func() error {
		if l.Attempts != 1 {
			return fmt.Errorf("%w: the batch was attempted", ErrLeaseLost)
		}
		if err := l.expectEvents(len(aside)+len(remaining), l.Events); err != nil {
			return err
		}
		if err := l.keep(ctx, remaining, false, 1, nil); err != nil {
			return err
		}
		return l.collect(ctx, aside)
	})
}

// Hold releases a batch whose events are all of quarantined types. The more such batches
// exist, the later each is due. The end of a quarantine makes all of them due.
func (l *Lease) Hold(ctx context.Context, cause error) error {
	return l.finish(endingRetry, func() error {
		_, err := l.tx.ExecContext(ctx, l.store.sql(holdSQL), reason(cause), l.ID,
			l.store.o.MaxDelay.Seconds(), l.store.longestQuarantine())
		return err //nolint:wrapcheck // finish adds the operation
	})
}

// collect adds the events to a quarantined batch, or writes one.
func (l *Lease) collect(ctx context.Context, ids []int64) error {
	var events int
	err := l.tx.GetContext(ctx, &events, l.store.sql(collectSQL), multirange(ids), l.store.o.MaxRows, l.store.o.MaxBytes)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return l.insertBatch(ctx, batchTime(l.ID).Add(time.Microsecond), ids, errQuarantined, true)
	case err != nil:
		return fmt.Errorf("add events to a batch: %w", err)
	}
	return l.expectEvents(events, len(ids))
}

var errQuarantined = errors.New("the sink takes no event of these types")

// longestQuarantine returns the longest wait of a quarantined batch, in seconds.
func (s *Store) longestQuarantine() float64 { return max(time.Hour, s.o.MaxDelay).Seconds() }
