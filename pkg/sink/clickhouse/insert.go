package clickhouse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/ch-go/proto"
	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/column"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// MaxBatchRows is the most events of a batch. The server may split more rows into two
// blocks, and the token deduplicates each block separately.
//
// https://clickhouse.com/docs/operations/settings/settings#min_insert_block_size_rows
const MaxBatchRows = 1_048_448

// The range of DateTime64(6). For a time outside of it, the server stores another time
// and returns no error.
//
// https://clickhouse.com/docs/sql-reference/data-types/datetime64
var (
	minTime = time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)
	maxTime = time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC)
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

// With columns the driver needs no DESCRIBE TABLE before each insert over HTTP.
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
	// The server checks the token, and acknowledges the insert after its execution.
	"insert_deduplicate": 1,
	"async_insert":       0,
	// A timeout is an error. A profile may make it a success.
	"timeout_overflow_mode": "throw",
	// A batch may have events of 101 months. The error would look like backpressure
	// (TOO_MANY_PARTS).
	"max_partitions_per_insert_block": 0,
	// The server neither splits the client's block nor joins it with another.
	"max_insert_block_size":       MaxBatchRows + 1,
	"min_insert_block_size_rows":  MaxBatchRows + 1,
	"min_insert_block_size_bytes": 256 << 20,
	// The server stores the rows as they are. Merging them first would take a sixth of
	// the insert's time, and would hide an event that was inserted twice.
	"optimize_on_insert": 0,
}

// optionalInsertSettings are sent with an insert if the server knows them. Otherwise it
// would refuse the insert.
var optionalInsertSettings = chgo.Settings{
	// Overrides insert_deduplicate.
	"deduplicate_insert": "enable",
	// With these settings the server would split the client's block.
	"use_strict_insert_block_limits": 0,
	"max_insert_block_size_bytes":    0,
}

// httpSettings are settings of the HTTP interface. The server sends the status line after
// the execution, so that a 200 is an acknowledgement.
//
// https://clickhouse.com/docs/interfaces/http#response-buffering
var httpSettings = chgo.Settings{"wait_end_of_query": 1}

// optionalSettings are those of optionalInsertSettings that the server knows.
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
		// If the client is suspended while it sends, the server waits 5 minutes for
		// the rest, and the insert is in flight meanwhile. Over HTTP it waits 30
		// seconds, which no setting of a statement changes.
		settings["receive_timeout"] = seconds
	}

	insert, err := s.connFor(batch.Events).PrepareBatch( //nolint:clickhouselint // ends with Abort or Send
		chgo.Context(undated{ctx}, chgo.WithSettings(settings), chgo.WithColumnNamesAndTypes(columns)),
		s.insertStatement())
	if err != nil {
		return s.classify(ctx, "begin the insert", err)
	}
	failpoint.At(failpoint.FlushBegun)
	if err := appendColumns(insert, batch.Events); err != nil {
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
	// (https://github.com/ClickHouse/clickhouse-go/blob/v2.50.0/conn_batch.go#L201).
	// Over HTTP the body is a pipe, which net/http cannot repeat.
	if err := insert.Send(); err != nil {
		return s.classify(ctx, "insert", err)
	}
	return nil
}

// keptBytes bounds the contexts of an insert whose connection keeps the memory of the
// encoded and the compressed insert. New memory for each insert would cost more than all
// other work of an insert. A typical batch has 50,000 events of 200 bytes.
const keptBytes = 12 << 20

func (s *Sink) connFor(e *sink.Events) driver.Conn {
	size := 0
	for _, c := range e.EventContext {
		if size += len(c); size > keptBytes {
			return s.conn
		}
	}
	return s.inserts
}

// undated hides the deadline from the driver, which would give the server 5 seconds more,
// and no limit if less than a second is left. The context ends at the deadline all the
// same.
type undated struct{ context.Context } //nolint:containedctx // is one

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
	case len(e.EventType) != n, len(e.EventDateTime) != n, len(e.Environment) != n,
		len(e.EventContext) != n, len(e.MetadataVersion) != n:
		// Over HTTP the driver would send an empty body and lose the error
		// (conn_http_batch.go, the deferred CloseWithError).
		return &sink.Error{Class: sink.Unknown, Err: errors.New("the batch's columns differ in length")}
	}
	var bad []sink.BadEvent
	for i, t := range e.EventDateTime {
		if !storable(t) {
			bad = append(bad, sink.BadEvent{Index: i, Err: fmt.Errorf(
				"event_date_time %s is outside of what DateTime64(6) holds, the years 1900 to 2299", t.UTC().Format(time.RFC3339Nano))})
		}
	}
	if bad != nil {
		return &sink.Error{Class: sink.Permanent, Err: &sink.BadEventsError{Events: bad}}
	}
	return nil
}

func storable(t time.Time) bool {
	t = t.Truncate(time.Microsecond)
	return !t.Before(minTime) && !t.After(maxTime)
}

// contextChunk is how many events' contexts are copied before their strings are
// let go.
const contextChunk = 64

// appendColumns moves the events into the insert's block, column by column. It
// lets go of each column as it goes, so that the memory that it takes and the
// block's are not needed both.
func appendColumns(insert driver.Batch, e *sink.Events) error {
	if err := insert.Column(columnEventID).Append(e.EventID); err != nil {
		return fmt.Errorf("event_id: %w", err)
	}
	e.EventID = nil
	if err := appendRepeated(insert, columnEventType, e.EventType); err != nil {
		return fmt.Errorf("event_type: %w", err)
	}
	e.EventType = nil
	if err := appendTimes(insert.Columns()[columnEventDateTime], e.EventDateTime); err != nil {
		return fmt.Errorf("event_date_time: %w", err)
	}
	e.EventDateTime = nil
	if err := appendRepeated(insert, columnEnvironment, e.Environment); err != nil {
		return fmt.Errorf("environment: %w", err)
	}
	e.Environment = nil
	if err := insert.Column(columnMetadataVersion).Append(e.MetadataVersion); err != nil {
		return fmt.Errorf("metadata_version: %w", err)
	}
	e.MetadataVersion = nil

	if err := reserve(insert.Columns()[columnEventContext], e.EventContext); err != nil {
		return fmt.Errorf("event_context: %w", err)
	}
	contexts := insert.Column(columnEventContext)
	for len(e.EventContext) > 0 {
		chunk := e.EventContext[:min(contextChunk, len(e.EventContext))]
		if err := contexts.Append(chunk); err != nil {
			return fmt.Errorf("event_context: %w", err)
		}
		clear(chunk)
		e.EventContext = e.EventContext[len(chunk):]
	}
	e.EventContext = nil
	return nil
}

// appendTimes fills the column with microseconds, in the form in which they are
// on the wire. The column's own Append takes a time by its nanoseconds, which
// an int64 holds up to the year 2262 only; later ones would become others
// (https://github.com/ClickHouse/ch-go/blob/v0.74.0/proto/datetime64.go#L54).
func appendTimes(target column.Interface, times []time.Time) error {
	c, ok := target.(*column.DateTime64)
	if !ok {
		return fmt.Errorf("the column is a %s", target.Type())
	}
	if precision, _ := c.Precision(); precision != int64(proto.PrecisionMicro) {
		return fmt.Errorf("the column is a %s", c.Type())
	}
	const size = 8
	wire := make([]byte, 0, size*len(times))
	for _, t := range times {
		wire = binary.LittleEndian.AppendUint64(wire, uint64(t.UnixMicro()))
	}
	return c.Decode(proto.NewReader(bytes.NewReader(wire)), len(times)) //nolint:wrapcheck // reads from memory
}

// appendRepeated fills a column of low cardinality in the form in which it is on
// the wire: each value once, and for each row its place among them. The column's
// own Append makes an interface of each value, and takes longer than all of the
// other columns together.
//
// https://github.com/ClickHouse/clickhouse-go/blob/v2.50.0/lib/column/lowcardinality.go#L157
func appendRepeated(insert driver.Batch, at int, values []string) error {
	c, ok := insert.Columns()[at].(*column.LowCardinality)
	if !ok || string(c.Type()) != columns[at].Type { // in a table that somebody else has made
		return insert.Column(at).Append(values) //nolint:wrapcheck // the caller does
	}
	distinct, places := []string{""}, map[string]uint32{"": 0} // the default comes first
	keys := make([]uint32, len(values))
	for i, value := range values {
		place, known := places[value]
		if !known {
			place = uint32(len(distinct)) //nolint:gosec // at most MaxBatchRows
			distinct, places[value] = append(distinct, value), place
		}
		keys[i] = place
	}
	keyType, keySize := uint64(0), 1
	switch {
	case len(distinct) > math.MaxUint16+1:
		keyType, keySize = 2, 4
	case len(distinct) > math.MaxUint8+1:
		keyType, keySize = 1, 2
	}
	const withItsValues = 1 << 9 // and not with a dictionary that blocks share
	wire := binary.LittleEndian.AppendUint64(nil, withItsValues|keyType)
	wire = binary.LittleEndian.AppendUint64(wire, uint64(len(distinct)))
	for _, value := range distinct {
		wire = append(binary.AppendUvarint(wire, uint64(len(value))), value...)
	}
	wire = binary.LittleEndian.AppendUint64(wire, uint64(len(keys)))
	wire = slices.Grow(wire, keySize*len(keys))
	for _, key := range keys {
		end := len(wire)
		wire = binary.LittleEndian.AppendUint32(wire, key)[:end+keySize]
	}
	return c.Decode(proto.NewReader(bytes.NewReader(wire)), len(values)) //nolint:wrapcheck // reads from memory
}

// reserve makes room in the column for the values. Without it the column grows
// by copying itself, again and again: at 64 MB that takes three times the
// memory. The driver has no other way to say how large a column will be than to
// let it read a string of that length, and to forget that.
func reserve(target column.Interface, values []string) error {
	var size uint64
	for _, s := range values {
		size += uint64(len(s))
	}
	wire := io.MultiReader(bytes.NewReader(binary.AppendUvarint(nil, size)), zeros{})
	if err := target.Decode(proto.NewReader(wire), 1); err != nil {
		return err //nolint:wrapcheck // reads from memory
	}
	target.Reset()
	return nil
}

// zeros reads as an endless row of them.
type zeros struct{}

// Read implements io.Reader.
func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
