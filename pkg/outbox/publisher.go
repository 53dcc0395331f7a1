package outbox

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"
	"strings"
	"time"

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
	for i := range events {
		if broken := events[i].broken(i, p.maxEventBytes); len(broken) > 0 {
			return broken[0]
		}
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

// Validate returns every rule that the event breaks: what Publish would refuse it
// for.
func (p *Publisher) Validate(event Event) []*ValidationError {
	return event.broken(0, p.maxEventBytes)
}

func (p *Publisher) values(events []Event) []any {
	values := make([]any, 0, len(events)*columnsPerInsert)
	for i := range events {
		e := &events[i]
		environment := e.Environment
		if environment == "" {
			environment = p.environment
		}
		var traceparent any
		if e.Traceparent != "" {
			traceparent = e.Traceparent
		}
		values = append(values, e.EventID, e.EventType, e.EventDateTime.UTC().Truncate(time.Microsecond),
			environment, []byte(e.EventContext), e.MetadataVersion, traceparent)
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
