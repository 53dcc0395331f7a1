package store

import (
	"context"
	"errors"
	"fmt"
)

// ErrEventsMissing says that events of the batch were deleted from the outbox. The
// remaining events are not inserted, because every attempt under a token must insert the
// same rows.
var ErrEventsMissing = errors.New("events of the batch were deleted from the outbox")

// Read replaces the content of events by all events of the batch, in the order of their
// ids. It returns ErrEventsMissing if it does not find all of them. After an error the
// content of events is undefined until the next Read.
func (l *Lease) Read(ctx context.Context, events *Events) error {
	events.Reset()
	events.Grow(l.Events, max(0, int(l.Bytes)-l.Events*eventOverhead))
	return l.read(ctx, l.store.sql(readEventsSQL), &chunk{}, l.EventIDs, l.Events, events)
}

// ReadSome returns the events of the batch with these ascending ids. It returns the same
// errors as Read.
func (l *Lease) ReadSome(ctx context.Context, ids []int64) (*Events, error) {
	events := &Events{}
	if err := l.read(ctx, l.store.sql(readEventsSQL), &chunk{}, multirange(ids), len(ids), events); err != nil {
		return nil, err
	}
	return events, nil
}

// read appends the n events with the ids of the multirange. The statement returns them in
// chunks.
func (l *Lease) read(ctx context.Context, statement string, c *chunk, ids string, n int, events *Events) error {
	// lib/pq reads binary values only from a prepared statement. Within a transaction
	// a connection pooler keeps the statement.
	prepared, err := l.tx.PreparexContext(ctx, statement)
	if err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	defer prepared.Close()
	rows, err := prepared.QueryxContext(ctx, ids, l.chunkIDs())
	if err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	defer rows.Close()
	columns := c.columns()
	for rows.Next() {
		if err := rows.Scan(columns...); err != nil {
			return fmt.Errorf("scan events: %w", err)
		}
		if err := c.appendTo(events); err != nil {
			return fmt.Errorf("decode events: %w", err)
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	return checkMembers(events.ID, n)
}

// checkMembers checks that these are n ids, once each and in order.
func checkMembers(ids []int64, n int) error {
	for i := 1; i < len(ids); i++ {
		if ids[i] <= ids[i-1] {
			return fmt.Errorf("%w: event %d follows event %d", ErrLeaseLost, ids[i], ids[i-1])
		}
	}
	if len(ids) != n {
		return fmt.Errorf("%w: found %d of %d", ErrEventsMissing, len(ids), n)
	}
	return nil
}
