package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
)

// Record is an event as it is kept in the outbox. Its ID orders the events of
// a batch.
type Record struct {
	ID              int64
	EventID         uuid.UUID
	EventType       string
	EventDateTime   time.Time
	Environment     string
	EventContext    string
	MetadataVersion int64
	Traceparent     string // empty where there is none
	PublishedAt     time.Time
}

// ErrEventsMissing says that events which the manifest names are no longer in
// the outbox: somebody has deleted them. The rest is not sent, since fewer rows
// under the batch's token would make it worthless.
var ErrEventsMissing = errors.New("events of the batch have been deleted from the outbox")

// Read passes the batch's events to add, in the order of their ids, exactly
// as many as the manifest names; otherwise it fails with ErrEventsMissing.
func (l *Lease) Read(ctx context.Context, add func(Record) error) error {
	// Prepared, since lib/pq asks for binary values only then. In a transaction no
	// pooler parts a statement from its name.
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

// scan goes through the rows of a query over the batch's members and verifies
// that they are exactly these: fewer under the batch's token would burn it. row
// passes take the id of each event.
func (l *Lease) scan(rows *sqlx.Rows, row func(take func(id int64) error) error) error {
	defer rows.Close()
	events, last := 0, int64(0)
	take := func(id int64) error {
		if id <= last {
			return fmt.Errorf("%w: event %d came after %d", ErrLeaseLost, id, last)
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
		return fmt.Errorf("%w: %d of its %d are there", ErrEventsMissing, events, l.Events)
	}
	return nil
}
