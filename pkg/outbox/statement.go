package outbox

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// The publisher sends every value as a string or a number. PostgreSQL infers the types of
// the parameters from the columns, so that a statement works with any driver. It also
// works behind a pooler that has no prepared statements.

const (
	eventColumns     = "event_id, event_type, event_date_time, event_context, metadata_version, traceparent, environment"
	columnsPerInsert = 7
	// eventsPerInsert keeps a statement well below PostgreSQL's limit of 65,535
	// parameters.
	eventsPerInsert = 1000
)

// insert returns a statement that inserts the events, and its arguments. If an
// event has no environment, the column's default applies.
func (p *Publisher) insert(events []Event) (query string, args []any) {
	if len(events) == 1 && p.environmentOf(&events[0]) != "" {
		return p.insertOne, p.appendArgs(make([]any, 0, columnsPerInsert), &events[0])
	}
	args = make([]any, 0, len(events)*columnsPerInsert)
	for i := range events {
		args = p.appendArgs(args, &events[i])
	}
	return p.buildInsert(events), args
}

func (p *Publisher) buildInsert(events []Event) string {
	var query strings.Builder
	query.WriteString("INSERT INTO " + p.table + " (" + eventColumns + ") VALUES ")
	parameter := 0
	write := func(separator string) {
		parameter++
		query.WriteString(separator)
		query.WriteByte('$')
		query.WriteString(strconv.Itoa(parameter))
	}
	for i := range events {
		if i > 0 {
			query.WriteString(", ")
		}
		write("(")
		for range columnsPerInsert - 2 {
			write(", ")
		}
		if p.environmentOf(&events[i]) == "" {
			query.WriteString(", DEFAULT")
		} else {
			write(", ")
		}
		query.WriteByte(')')
	}
	return query.String()
}

func (p *Publisher) appendArgs(args []any, e *Event) []any {
	var traceparent any
	if !e.Traceparent.IsZero() {
		traceparent = e.Traceparent.String()
	}
	args = append(args, e.EventID.String(), e.EventType, timestamp(e.EventDateTime), e.EventContext.String(), e.MetadataVersion, traceparent)
	if environment := p.environmentOf(e); environment != "" {
		args = append(args, environment)
	}
	return args
}

// timestamp returns the time in PostgreSQL's input format, truncated to microseconds.
func timestamp(t time.Time) string {
	return t.UTC().Truncate(time.Microsecond).Format(time.RFC3339Nano)
}

// insertWith returns a statement that executes insert and publishes the events, and its
// arguments. The arguments of insert come first, then one array for each column of the
// events. The events are inserted in the order of the arrays.
func (p *Publisher) insertWith(insert Insert, events []Event) (query string, args []any) {
	const columns = 8
	arrays := make([]arrayLiteral, columns)
	byDefault := false
	for i := range events {
		e := &events[i]
		environment := p.environmentOf(e)
		byDefault = byDefault || environment == ""
		for column, value := range []string{
			insert.RowIDs[i].String(), e.EventID.String(), e.EventType, timestamp(e.EventDateTime), e.EventContext.String(),
			strconv.FormatInt(e.MetadataVersion, 10), e.Traceparent.String(), environment,
		} {
			arrays[column].append(value)
		}
	}
	args = make([]any, 0, len(insert.Args)+columns)
	args = append(args, insert.Args...)
	for i := range arrays {
		args = append(args, arrays[i].String())
	}
	return p.buildInsertWith(insert, byDefault), args
}

// buildInsertWith builds the statement of insertWith. If events without an environment
// exist (byDefault), it adds a second INSERT for them, because a SELECT cannot return a
// column's default.
func (p *Publisher) buildInsertWith(insert Insert, byDefault bool) string {
	first := len(insert.Args)
	published := func(columns, values, condition string) string {
		return fmt.Sprintf(`(
    INSERT INTO %s (%s)
    SELECT %s
    FROM unnest($%d::uuid[], $%d::uuid[], $%d::text[], $%d::timestamptz[], $%d::text[], $%d::bigint[], $%d::text[], $%d::text[])
         WITH ORDINALITY AS event (row_id, event_id, event_type, event_date_time, event_context, metadata_version,
                                   traceparent, environment, place)
    WHERE row_id IN (SELECT id FROM inserted)%s
    ORDER BY place
)`, p.table, columns, values, first+1, first+2, first+3, first+4, first+5, first+6, first+7, first+8, condition)
	}
	const (
		columns = "event_id, event_type, event_date_time, event_context, metadata_version, traceparent"
		values  = "event_id, event_type, event_date_time, event_context::json, metadata_version, nullif(traceparent, '')"
	)
	query := "WITH inserted AS (" + insert.SQL + "),\npublished AS "
	if byDefault {
		query += published(columns+", environment", values+", environment", " AND environment <> ''") +
			",\npublished_by_default AS " + published(columns, values, " AND environment = ''")
	} else {
		query += published(columns+", environment", values+", environment", "")
	}
	if insert.Additional != "" {
		query += ",\nadditional AS (" + insert.Additional + ")"
	}
	return query + "\nSELECT id FROM inserted"
}

// arrayLiteral is the text form of a PostgreSQL array of texts. See
// https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO.
type arrayLiteral struct{ text strings.Builder }

var arrayEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

func (a *arrayLiteral) append(value string) {
	if a.text.Len() == 0 {
		a.text.WriteByte('{')
	} else {
		a.text.WriteByte(',')
	}
	a.text.WriteByte('"')
	_, _ = arrayEscaper.WriteString(&a.text, value) // a Builder does not fail
	a.text.WriteByte('"')
}

// String returns the array.
func (a *arrayLiteral) String() string {
	if a.text.Len() == 0 {
		return "{}"
	}
	return a.text.String() + "}"
}

// Insert is a statement that inserts rows. Each row has one event.
type Insert struct {
	// SQL inserts the rows. It returns the UUIDs of the inserted rows in a column id. Its
	// parameters are numbered from $1.
	SQL  string
	Args []any
	// RowIDs contains the row id of each event.
	RowIDs []uuid.UUID
	// Additional is an optional statement that is executed together with SQL, such as an
	// INSERT into another table. It shares the parameters of SQL. It can read the ids of
	// the inserted rows from a relation named inserted.
	Additional string
}
