package outboxtest

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// selectPublished returns the events of the current transaction as one JSON text, in
// the order in which they were published.
//
// A visible row belongs to the current transaction if the transaction that inserted the
// row is in progress. The two transaction ids can differ, because a savepoint begins a
// subtransaction with its own id. A transaction has no id before its first write.
//
// The context is a string in the JSON text, because a string keeps it byte for byte.
const selectPublished = `
SELECT coalesce(json_agg(json_build_object(
           'event_id', event_id,
           'event_type', event_type,
           'event_microseconds', (extract(epoch FROM event_date_time) * 1000000)::bigint,
           'environment', environment,
           'event_context', event_context::text,
           'metadata_version', metadata_version,
           'traceparent', coalesce(traceparent, '')
       ) ORDER BY id), '[]')::text
FROM (SELECT pg_current_xact_id_if_assigned()::text::bigint AS own) AS xact,
     (SELECT *, xmin::text::bigint AS inserted_by FROM %soutbox_events) AS event
WHERE pg_xact_status((` + fullXactID + `)::text::xid8) = 'in progress'`

// fullXactID adds the epoch to inserted_by, the lower 32 bits of a transaction id. The
// full id is the candidate that is nearest to own. No transaction has the id 0.
const fullXactID = "greatest(own + (inserted_by - own)::bit(32)::int, 0)"

// Published returns the events that were published in the transaction so far, in the
// order in which they were published. EventDateTime is in UTC.
func Published[R Row](ctx context.Context, tx Tx[R]) ([]outbox.Event, error) {
	schema := ""
	if named, ok := tx.(schemaTx[R]); ok {
		schema = `"` + strings.ReplaceAll(named.schema, `"`, `""`) + `".`
	}
	var text string
	if err := tx.QueryRowContext(ctx, fmt.Sprintf(selectPublished, schema)).Scan(&text); err != nil {
		return nil, fmt.Errorf("read the events of the transaction: %w", err)
	}
	var rows []row
	if err := json.Unmarshal([]byte(text), &rows); err != nil {
		return nil, fmt.Errorf("read the events of the transaction: %w", err)
	}
	events := make([]outbox.Event, len(rows))
	for i, row := range rows {
		var err error
		if events[i], err = row.event(); err != nil {
			return nil, fmt.Errorf("read event %d of the transaction: %w", i, err)
		}
	}
	return events, nil
}

// row is an event as selectPublished returns it.
type row struct {
	EventID           uuid.UUID `json:"event_id"`
	EventType         string    `json:"event_type"`
	EventMicroseconds int64     `json:"event_microseconds"`
	Environment       string    `json:"environment"`
	EventContext      string    `json:"event_context"`
	MetadataVersion   int64     `json:"metadata_version"`
	Traceparent       string    `json:"traceparent"`
}

func (r row) event() (outbox.Event, error) {
	event := outbox.Event{
		EventID:         r.EventID,
		EventType:       r.EventType,
		EventDateTime:   time.UnixMicro(r.EventMicroseconds).UTC(),
		Environment:     r.Environment,
		MetadataVersion: r.MetadataVersion,
	}
	var err error
	if event.EventContext, err = outbox.ParseJSON([]byte(r.EventContext)); err != nil {
		return outbox.Event{}, fmt.Errorf("event_context %w", err)
	}
	// A publisher that uses SQL may have sent an invalid value that satisfies the
	// column's constraint.
	if r.Traceparent != "" {
		if event.Traceparent, err = outbox.ParseTraceparent(r.Traceparent); err != nil {
			return outbox.Event{}, fmt.Errorf("traceparent %q %w", r.Traceparent, err)
		}
	}
	return event, nil
}
