package clickhouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// MaxBatchRows is the maximum number of events in a batch. The server may split a larger
// batch into two blocks, and the token deduplicates each block separately.
//
// https://clickhouse.com/docs/operations/settings/settings#min_insert_block_size_rows
const MaxBatchRows = 1_048_448

// The columns in the order in which they are sent.
const (
	columnEventID = iota
	columnEventType
	columnEventDateTime
	columnEnvironment
	columnEventContext
	columnMetadataVersion
)

// If the statement names the columns, the driver needs no DESCRIBE TABLE before each
// insert over HTTP.
var columns = []chgo.ColumnNameAndType{
	columnEventID:         {Name: "event_id", Type: "UUID"},
	columnEventType:       {Name: "event_type", Type: "LowCardinality(String)"},
	columnEventDateTime:   {Name: "event_date_time", Type: "DateTime64(6, 'UTC')"},
	columnEnvironment:     {Name: "environment", Type: "LowCardinality(String)"},
	columnEventContext:    {Name: "event_context", Type: "String"},
	columnMetadataVersion: {Name: "metadata_version", Type: "UInt64"},
}

func (s *Sink) insertStatement() string {
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.Name
	}
	return "INSERT INTO " + s.table + " (" + strings.Join(names, ", ") + ")"
}

// Insert implements sink.Sink. It sends the batch once, as one block of columns.
func (s *Sink) Insert(ctx context.Context, batch sink.Batch) error {
	facts, err := s.facts(ctx)
	if err != nil {
		return err
	}
	if err := validate(batch, facts.times); err != nil {
		return err
	}
	settings, err := s.settingsOfInsert(ctx)
	if err != nil {
		return err
	}
	settings["insert_deduplication_token"] = batch.Token
	if deadline, ok := ctx.Deadline(); ok {
		seconds := secondsUntil(deadline)
		settings["max_execution_time"] = seconds
		// If the client is suspended while it sends, the server waits 5 minutes for the
		// rest of the data. The insert stays in flight for that time. Over HTTP the
		// server waits 30 seconds, and no setting of a statement changes this.
		settings["receive_timeout"] = seconds
	}

	insert, err := s.connFor(batch.Events).PrepareBatch( //nolint:clickhouselint // ends with Abort or Send
		chgo.Context(undated{ctx}, chgo.WithSettings(settings), chgo.WithColumnNamesAndTypes(columns)),
		s.insertStatement())
	if err != nil {
		return s.classifyInsert(ctx, "begin the insert", err)
	}
	failpoint.At(failpoint.FlushBegun)
	if err := s.fill(insert, batch.Events); err != nil {
		// Close would end the insert successfully, without rows.
		_ = insert.Abort()
		return &sink.Error{Class: sink.Unknown, Err: fmt.Errorf("encode the batch: %w", err)}
	}
	// The context's timer may fire late in a process that was suspended.
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		_ = insert.Abort()
		return s.classify(ctx, "insert", context.DeadlineExceeded)
	}
	// Send is called once, without a Flush. A second Send would start a second insert
	// (https://github.com/ClickHouse/clickhouse-go/blob/v2.50.0/conn_batch.go#L201). Over
	// HTTP the body is a pipe, so net/http cannot repeat the request.
	if err := insert.Send(); err != nil {
		return s.classifyInsert(ctx, "insert", err)
	}
	return nil
}

// keptBytes bounds the contexts of the inserts that use the connections in Sink.inserts.
// These connections keep the memory of the encoded and the compressed insert. Allocating
// new memory for each insert would cost more than all other work of the insert. A typical
// batch has 50,000 events of 200 bytes.
const keptBytes = 12 << 20

func (s *Sink) connFor(e *sink.Events) driver.Conn {
	if len(e.EventContext.Data) > keptBytes {
		return s.conn
	}
	return s.inserts
}

// undated hides the deadline from the driver. The driver would add 5 seconds to the
// server's limit, and would set no limit if less than a second is left. The context still
// ends at the deadline.
type undated struct{ context.Context } //nolint:containedctx // the type is a context

// Deadline implements context.Context.
func (undated) Deadline() (time.Time, bool) { return time.Time{}, false }

// validate returns an error if the batch must not be sent.
func validate(batch sink.Batch, times timeRange) error {
	e := batch.Events
	n := e.Len()
	switch {
	case batch.Token == "":
		return &sink.Error{Class: sink.Unknown, Err: errors.New("the batch has no token")}
	case n == 0 || n > MaxBatchRows:
		return &sink.Error{Class: sink.Unknown, Err: fmt.Errorf("a batch of %d events cannot be one block", n)}
	case e.EventType.Len() != n, len(e.EventDateTime) != n, e.Environment.Len() != n,
		e.EventContext.Len() != n, len(e.MetadataVersion) != n:
		// Over HTTP the driver would send an empty body and lose the error
		// (conn_http_batch.go, the deferred CloseWithError).
		return &sink.Error{Class: sink.Unknown, Err: errors.New("the batch's columns differ in length")}
	}
	var bad []sink.BadEvent
	for i, at := range e.EventDateTime {
		if !times.holds(at) {
			bad = append(bad, sink.BadEvent{Index: i, Err: fmt.Errorf(
				"event_date_time %s is outside the range of DateTime64(6), %s",
				time.UnixMicro(at).UTC().Format(time.RFC3339Nano), times)})
		}
	}
	if bad != nil {
		return &sink.Error{Class: sink.Permanent, Err: &sink.BadEventsError{Events: bad}}
	}
	return nil
}
