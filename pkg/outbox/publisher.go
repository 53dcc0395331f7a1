package outbox

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"strings"

	"github.com/google/uuid"
)

// DefaultMaxEventBytes bounds an event's context if PublisherOptions has no bound: 16
// MiB.
const DefaultMaxEventBytes = 16 << 20

// PublisherOptions configure a Publisher. The zero value is usable.
type PublisherOptions struct {
	// Environment is used for events that have no environment of their own. If both are
	// empty, the event gets the default of the column outbox_events.environment. This
	// default is Local unless a deployment has changed it.
	Environment string
	// MaxEventBytes bounds an event's context; DefaultMaxEventBytes by default. The table
	// accepts at most 128 MiB.
	MaxEventBytes int
	// Schema is the schema of the outbox's tables. If Schema is empty, PostgreSQL finds
	// the tables by the session's search_path.
	Schema string
}

// Publisher writes events into the outbox. It is safe for concurrent use and holds
// no connection.
type Publisher struct {
	environment   string
	maxEventBytes int
	table         string // quoted
	insertOne     string // the statement for one event with an environment
}

// NewPublisher returns a Publisher.
func NewPublisher(o PublisherOptions) *Publisher {
	p := &Publisher{
		environment:   o.Environment,
		maxEventBytes: cmp.Or(max(o.MaxEventBytes, 0), DefaultMaxEventBytes),
		table:         "outbox_events",
	}
	if o.Schema != "" {
		p.table = quoteIdentifier(o.Schema) + "." + p.table
	}
	p.insertOne = p.buildInsert([]Event{{Environment: "any"}})
	return p
}

func quoteIdentifier(name string) string {
	return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
}

// Publish writes the events into the outbox in tx. The relay delivers them if and only if
// tx commits.
//
// If an event breaks a rule, it returns a *ValidationError and writes no event. After any
// other error the caller must roll back the transaction.
func (p *Publisher) Publish(ctx context.Context, tx Tx, events ...Event) error {
	if err := p.check(events); err != nil {
		return err
	}
	for start := 0; start < len(events); start += eventsPerInsert {
		query, args := p.insert(events[start:min(start+eventsPerInsert, len(events))])
		if _, err := tx.ExecContext(ctx, query, args...); err != nil {
			return fmt.Errorf("insert into the outbox: %w", err)
		}
	}
	return nil
}

// Queryer is the caller's transaction, or a connection on which each statement is a
// transaction of its own.
type Queryer interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// PublishInserted executes the statement and publishes the events of the inserted rows,
// in one round trip. It returns the ids of the inserted rows, and the same errors as
// Publish.
func (p *Publisher) PublishInserted(ctx context.Context, q Queryer, insert Insert, events ...Event) ([]uuid.UUID, error) {
	if err := p.check(events); err != nil {
		return nil, err
	}
	query, args := p.insertWith(insert, events)
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("insert rows and their events: %w", err)
	}
	defer rows.Close()
	var inserted []uuid.UUID
	for rows.Next() {
		var id uuid.UUID
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("insert rows and their events: %w", err)
		}
		inserted = append(inserted, id)
	}
	// The server reports success only after the last row.
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("insert rows and their events: %w", err)
	}
	return inserted, nil
}

func (p *Publisher) check(events []Event) error {
	for i := range events {
		if broken := events[i].broken(i, p.maxEventBytes); len(broken) > 0 {
			return broken[0]
		}
	}
	return nil
}

// Validate returns an error for every rule that the event breaks. Publish refuses an
// event that breaks a rule.
func (p *Publisher) Validate(event Event) []*ValidationError {
	return event.broken(0, p.maxEventBytes)
}

func (p *Publisher) environmentOf(e *Event) string { return cmp.Or(e.Environment, p.environment) }
