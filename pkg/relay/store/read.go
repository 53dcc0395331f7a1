package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
)

// Record is an event of the outbox. Its ID orders the events of a batch.
type Record struct {
	ID              int64
	EventID         uuid.UUID
	EventType       string
	EventDateTime   time.Time
	Environment     string
	EventContext    string
	MetadataVersion int64
	Traceparent     string // empty if the event has none
	PublishedAt     time.Time
}

// ErrEventsMissing says that events of the batch were deleted from the outbox. The
// remaining events are not inserted, because the token must stand for the same rows in
// every attempt.
var ErrEventsMissing = errors.New("events of the batch were deleted from the outbox")

// Read passes all events of the batch to add, in the order of their ids. It returns
// ErrEventsMissing if it does not find all of them.
func (l *Lease) Read(ctx context.Context, add func(Record) error) error {
	// lib/pq reads binary values only from a prepared statement. Within a transaction
	// a connection pooler keeps the statement.
	statement, err := l.tx.PreparexContext(ctx, l.sql(readEventsSQL))
	if err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	defer statement.Close()
	rows, err := statement.QueryxContext(ctx, l.EventIDs, l.chunkIDs())
	if err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	decoder := chunkDecoder{kinds: make(interner)}
	return l.scan(rows, func(take func(int64) error) error {
		var c chunk
		if err := rows.Scan(&c.keys, &c.kinds, &c.traceparents, &c.contexts); err != nil {
			return fmt.Errorf("scan events: %w", err)
		}
		records, err := decoder.decode(&c)
		if err != nil {
			return fmt.Errorf("decode events: %w", err)
		}
		for _, record := range records {
			if err := take(record.ID); err != nil {
				return err
			}
			if err := add(record); err != nil {
				return err
			}
		}
		return nil
	})
}

// scan reads the rows of a query over the batch's members, and checks that they are
// all of them, once and in order. row passes the id of each event to take.
func (l *Lease) scan(rows *sqlx.Rows, row func(take func(id int64) error) error) error {
	defer rows.Close()
	events, last := 0, int64(0)
	take := func(id int64) error {
		if id <= last {
			return fmt.Errorf("%w: event %d follows event %d", ErrLeaseLost, id, last)
		}
		last = id
		events++
		return nil
	}
	for rows.Next() {
		if err := row(take); err != nil {
			return err
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	if events != l.Events {
		return fmt.Errorf("%w: found %d of %d", ErrEventsMissing, events, l.Events)
	}
	return nil
}
