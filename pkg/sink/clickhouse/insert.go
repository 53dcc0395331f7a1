package clickhouse

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
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

// The range of DateTime64(6) in microseconds. For a time outside of this range, the
// server stores a different time and returns no error.
//
// https://clickhouse.com/docs/sql-reference/data-types/datetime64
var (
	minTime = time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
	maxTime = time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC).UnixMicro()
)

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

// insertSettings are sent with every insert. They do not depend on a profile or on the
// server's version.
//
// https://clickhouse.com/docs/operations/settings/settings
var insertSettings = chgo.Settings{
	// The server checks the token. It acknowledges the insert only after its execution.
	"insert_deduplicate": 1,
	"async_insert":       0,
	// A timeout is an error, even if a profile makes it a success.
	"timeout_overflow_mode": "throw",
	// A batch may have events of more than 100 months. The default would then cause an
	// error that looks like backpressure (TOO_MANY_PARTS).
	"max_partitions_per_insert_block": 0,
	// The server neither splits the client's block nor joins it with another block.
	"max_insert_block_size":       MaxBatchRows + 1,
	"min_insert_block_size_rows":  MaxBatchRows + 1,
	"min_insert_block_size_bytes": 256 << 20,
	// The server does not merge the rows before it stores them. The merge would take a
	// sixth of the insert's time, and would hide an event that was inserted twice.
	"optimize_on_insert": 0,
}

// optionalInsertSettings are sent with an insert if the server knows them. The server
// refuses an insert with an unknown setting.
var optionalInsertSettings = chgo.Settings{
	// Overrides insert_deduplicate.
	"deduplicate_insert": "enable",
	// If these settings were on, the server would split the client's block.
	"use_strict_insert_block_limits": 0,
	"max_insert_block_size_bytes":    0,
}

// httpSettings are settings of the HTTP interface. The server sends the status line after
// the execution, so that a 200 is an acknowledgement.
//
// https://clickhouse.com/docs/interfaces/http#response-buffering
var httpSettings = chgo.Settings{"wait_end_of_query": 1}

// optionalSettings contains the settings of optionalInsertSettings that the server knows.
type optionalSettings struct {
	dials  uint64
	values chgo.Settings
}

// Insert implements sink.Sink. It sends the batch once, as one block of columns.
func (s *Sink) Insert(ctx context.Context, batch sink.Batch) error {
	if err := validate(batch); err != nil {
		return err
	}
	settings, err := s.settingsOfInsert(ctx)
	if err != nil {
		return err
	}
	settings["insert_deduplication_token"] = batch.Token
	if deadline, ok := ctx.Deadline(); ok {
		seconds := max(1, int64(math.Ceil(time.Until(deadline).Seconds())))
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
		return s.classify(ctx, "begin the insert", err)
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
		return s.classify(ctx, "insert", err)
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

// settingsOfInsert returns a copy of the settings of an insert. It reads the optional
// settings again after each new connection.
func (s *Sink) settingsOfInsert(ctx context.Context) (chgo.Settings, error) {
	settings := maps.Clone(insertSettings)
	if s.http {
		maps.Copy(settings, httpSettings)
	}
	optional := s.optional.Load()
	if optional == nil || optional.dials != s.dials.Load() {
		var err error
		if optional, err = s.readOptionalSettings(ctx); err != nil {
			return nil, err
		}
		s.optional.Store(optional)
	}
	maps.Copy(settings, optional.values)
	return settings, nil
}

func (s *Sink) readOptionalSettings(ctx context.Context) (*optionalSettings, error) {
	names := make([]string, 0, len(optionalInsertSettings))
	for name := range optionalInsertSettings {
		names = append(names, quoteString(name))
	}
	var known []string
	err := s.conn.QueryRow(ctx,
		"SELECT groupArray(name) FROM system.settings WHERE name IN ("+strings.Join(names, ", ")+")").Scan(&known)
	if err != nil {
		return nil, s.classify(ctx, "read the server's settings", err)
	}
	o := &optionalSettings{dials: s.dials.Load(), values: make(chgo.Settings, len(known))}
	for _, name := range known {
		o.values[name] = optionalInsertSettings[name]
	}
	return o, nil
}

// validate returns an error if the batch must not be sent.
func validate(batch sink.Batch) error {
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
		if !storable(at) {
			bad = append(bad, sink.BadEvent{Index: i, Err: fmt.Errorf(
				"event_date_time %s is outside the range of DateTime64(6), the years 1900 to 2299",
				time.UnixMicro(at).UTC().Format(time.RFC3339Nano))})
		}
	}
	if bad != nil {
		return &sink.Error{Class: sink.Permanent, Err: &sink.BadEventsError{Events: bad}}
	}
	return nil
}

func storable(micros int64) bool { return micros >= minTime && micros <= maxTime }
