package outbox

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// DefaultMaxEventBytes bounds an event's context where PublisherOptions does
// not: 16 MiB.
const DefaultMaxEventBytes = 16 << 20

// PublisherOptions configure a Publisher. The zero value is usable.
type PublisherOptions struct {
	// Environment goes with every event that names none; "Local" by default.
	Environment string
	// MaxEventBytes bounds an event's context; DefaultMaxEventBytes by default.
	// The table takes no more than 128 MiB.
	MaxEventBytes int
}

// Publisher writes events into the outbox. It is safe for concurrent use and
// holds no connection.
type Publisher struct {
	environment   string
	maxEventBytes int
}

// NewPublisher returns a Publisher.
func NewPublisher(o PublisherOptions) *Publisher {
	if o.Environment == "" {
		o.Environment = "Local"
	}
	if o.MaxEventBytes <= 0 {
		o.MaxEventBytes = DefaultMaxEventBytes
	}
	return &Publisher{environment: o.Environment, maxEventBytes: o.MaxEventBytes}
}

// Tx is the caller's transaction: *sqlx.Tx, *sql.Tx and what embeds them. It
// asks for Commit only to keep a *sql.DB out, which would publish outside of
// any transaction; Publish neither commits nor rolls back.
type Tx interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	Commit() error
}

// Publish writes the events into the outbox in tx: they are delivered if and
// only if tx commits. Events that break a rule are refused with a
// *ValidationError before anything is written. After any other error the
// transaction is of no more use and must be rolled back.
func (p *Publisher) Publish(ctx context.Context, tx Tx, events ...Event) error {
	if err := p.check(events); err != nil {
		return err
	}
	failpoint.At(failpoint.PublishBefore)
	for start := 0; start < len(events); start += eventsPerInsert {
		rows := events[start:min(start+eventsPerInsert, len(events))]
		if _, err := tx.ExecContext(ctx, insertEventsSQL(len(rows)), p.values(rows)...); err != nil {
			return fmt.Errorf("insert into the outbox: %w", err)
		}
	}
	failpoint.At(failpoint.PublishInserted)
	return nil
}

// Queryer is the caller's transaction, or a connection on which a statement is a
// transaction by itself.
type Queryer interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// Insert is a statement of the caller's that inserts rows of which events tell.
type Insert struct {
	// SQL inserts the rows and returns the ids, uuids, of those that it has
	// inserted, in a column id. Its parameters are $1 and on.
	SQL  string
	Args []any
	// RowIDs say which row each of the events tells of.
	RowIDs []uuid.UUID
}

// PublishInserted runs the statement and publishes the events of those rows that
// it has inserted, which takes one round trip. It returns those rows' ids. For the
// rest it is like Publish.
func (p *Publisher) PublishInserted(ctx context.Context, q Queryer, insert Insert, events ...Event) ([]uuid.UUID, error) {
	if err := p.check(events); err != nil {
		return nil, err
	}
	failpoint.At(failpoint.PublishBefore)
	rows, err := q.QueryContext(ctx, publishInsertedSQL(insert), slices.Concat(insert.Args, p.arrays(insert.RowIDs, events))...)
	if err != nil {
		return nil, fmt.Errorf("insert, and into the outbox: %w", err)
	}
	defer rows.Close()
	var inserted []uuid.UUID
	for rows.Next() {
		var id uuid.UUID
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("insert, and into the outbox: %w", err)
		}
		inserted = append(inserted, id)
	}
	// Not before the last row's end has the server said that all of it is done.
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("insert, and into the outbox: %w", err)
	}
	failpoint.At(failpoint.PublishInserted)
	return inserted, nil
}

// publishInsertedSQL publishes in the order of the arrays, which are the last
// parameters.
func publishInsertedSQL(insert Insert) string {
	first := len(insert.Args)
	return fmt.Sprintf(`
WITH inserted AS (%s),
published AS (
    INSERT INTO outbox_events
        (event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent)
    SELECT event_id, event_type, event_date_time, environment, event_context::json, metadata_version, nullif(traceparent, '')
    FROM unnest($%d::uuid[], $%d::uuid[], $%d::text[], $%d::timestamptz[], $%d::text[], $%d::text[], $%d::bigint[], $%d::text[])
         WITH ORDINALITY AS event (row_id, event_id, event_type, event_date_time, environment, event_context,
                                   metadata_version, traceparent, place)
    WHERE row_id IN (SELECT id FROM inserted)
    ORDER BY place
)
SELECT id FROM inserted`,
		insert.SQL, first+1, first+2, first+3, first+4, first+5, first+6, first+7, first+8)
}

// arrays are the events by column, each in the text form of an array.
func (p *Publisher) arrays(rowIDs []uuid.UUID, events []Event) []any {
	n := len(events)
	rows, ids, types, times := make(pq.StringArray, n), make(pq.StringArray, n), make(pq.StringArray, n), make(pq.StringArray, n)
	environments, contexts, traceparents := make(pq.StringArray, n), make(pq.StringArray, n), make(pq.StringArray, n)
	versions := make(pq.Int64Array, n)
	for i := range events {
		e := &events[i]
		rows[i], ids[i] = rowIDs[i].String(), e.EventID.String()
		types[i], times[i] = e.EventType, e.EventDateTime.UTC().Truncate(time.Microsecond).Format(time.RFC3339Nano)
		environments[i], contexts[i] = cmp.Or(e.Environment, p.environment), string(e.EventContext)
		versions[i], traceparents[i] = e.MetadataVersion, e.Traceparent
	}
	return []any{rows, ids, types, times, environments, contexts, versions, traceparents}
}

func (p *Publisher) check(events []Event) error {
	for i := range events {
		if broken := events[i].broken(i, p.maxEventBytes); len(broken) > 0 {
			return broken[0]
		}
	}
	return nil
}

// Validate returns every rule that the event breaks: what Publish would refuse it
// for.
func (p *Publisher) Validate(event Event) []*ValidationError {
	return event.broken(0, p.maxEventBytes)
}

func (p *Publisher) values(events []Event) []any {
	values := make([]any, 0, len(events)*columnsPerInsert)
	for i := range events {
		e := &events[i]
		var traceparent any
		if e.Traceparent != "" {
			traceparent = e.Traceparent
		}
		values = append(values, e.EventID, e.EventType, e.EventDateTime.UTC().Truncate(time.Microsecond),
			cmp.Or(e.Environment, p.environment), []byte(e.EventContext), e.MetadataVersion, traceparent)
	}
	return values
}

const (
	columnsPerInsert = 7
	// eventsPerInsert keeps a statement well below PostgreSQL's 65,535
	// parameters.
	eventsPerInsert = 1000
)

const insertEventsPrefix = `
INSERT INTO outbox_events
    (event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent)
VALUES `

var insertOneEventSQL = buildInsertEventsSQL(1)

func insertEventsSQL(events int) string {
	if events == 1 {
		return insertOneEventSQL
	}
	return buildInsertEventsSQL(events)
}

func buildInsertEventsSQL(events int) string {
	var query strings.Builder
	query.WriteString(insertEventsPrefix)
	for parameter := range events * columnsPerInsert {
		switch {
		case parameter == 0:
			query.WriteByte('(')
		case parameter%columnsPerInsert == 0:
			query.WriteString("), (")
		default:
			query.WriteString(", ")
		}
		query.WriteByte('$')
		query.WriteString(strconv.Itoa(parameter + 1))
	}
	query.WriteByte(')')
	return query.String()
}
