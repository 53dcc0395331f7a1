package chserver

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// nativeQuery is a running query of a native client.
type nativeQuery struct {
	*nativeClient
	proto.Query

	cancel   func()
	settings []setting
	set      bool     // the session has the settings
	tables   []string // external tables
	method   string   // the compression method of blocks
	blocks   int      // data blocks sent
	header   bool     // whether the result's header was sent
}

// serveQuery reads a query and sends its result, or the error of the query, to the
// client. It returns only errors of the connection.
func (c *nativeClient) serveQuery(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	q := &nativeQuery{nativeClient: c, cancel: cancel}
	if err := q.DecodeAware(c.wire.Reader, c.revision); err != nil {
		return fmt.Errorf("read a query: %w", err)
	}
	for _, s := range q.Settings {
		if s.Key == "network_compression_method" {
			q.method = s.Value
		}
		q.settings = append(q.settings, setting{name: s.Key, value: s.Value})
	}

	refused, err := q.readTables(ctx)
	if err == nil {
		err = refused
	}
	if err == nil {
		err = q.run(ctx)
	}
	if broken, ok := errors.AsType[*connectionError](err); ok {
		return q.fail(broken)
	}
	if err := q.cleanUp(context.WithoutCancel(ctx)); err != nil {
		return q.fail(err)
	}
	if err != nil {
		q.appendException(err)
	} else {
		proto.ServerCodeEndOfStream.Encode(&q.out)
	}
	return q.flush()
}

// connectionError is an error after which the server cannot interpret the
// client's next bytes, so the connection must end.
type connectionError struct{ cause error }

func (e *connectionError) Error() string { return e.cause.Error() }
func (e *connectionError) Unwrap() error { return e.cause }

// readTables reads the blocks before the query: external tables, and an empty block
// after the last one. If the engine fails, readTables returns the engine's error as
// refused, but still reads all blocks.
func (q *nativeQuery) readTables(ctx context.Context) (refused, err error) {
	for {
		reader, head, table, err := q.receiveBlock()
		if err != nil {
			return nil, err
		}
		if head.Columns == 0 {
			return refused, nil
		}
		var columns []string
		var data proto.Buffer
		appendBlockHead(&data, head.Columns, head.Rows, engineRevision)
		err = reader.columns(head, func(c blockColumn, column []byte) error {
			columns = append(columns, quoteName(c.name)+" "+c.kind)
			appendColumnHead(&data, c, engineRevision)
			data.PutRaw(column)
			return nil
		})
		if err != nil {
			return nil, &connectionError{err}
		}
		if refused == nil {
			refused = q.loadTable(ctx, table, strings.Join(columns, ", "), data.Buf)
		}
	}
}

func (q *nativeQuery) loadTable(ctx context.Context, table, structure string, data []byte) error {
	if err := createExternalTable(ctx, q.session, table, structure); err != nil {
		return err
	}
	q.tables = append(q.tables, table)
	insert := chengine.Statement{SQL: "INSERT INTO " + quoteName(table), Format: "Native"}
	_, err := insertFrom(ctx, q.session, insert, bytes.NewReader(data))
	return err
}

// receiveBlock reads the beginning of a client's block and the name of its
// table. It returns errors of the connection, or the exception of a canceled
// query.
func (q *nativeQuery) receiveBlock() (*blockReader, proto.Block, string, error) {
	p := q.receive()
	switch {
	case p.err != nil:
		return nil, proto.Block{}, "", &connectionError{p.err}
	case p.code == proto.ClientCodeCancel:
		return nil, proto.Block{}, "", newException(proto.ErrQueryWasCancelled, "QUERY_WAS_CANCELLED", "Query was cancelled")
	case p.code != proto.ClientCodeData:
		return nil, proto.Block{}, "", &connectionError{newException(proto.ErrUnexpectedPacketFromClient, "UNEXPECTED_PACKET_FROM_CLIENT",
			"Unexpected packet %d from client: expected Data", p.code)}
	}
	var data proto.ClientData
	if err := data.DecodeAware(q.wire.Reader, q.revision); err != nil {
		return nil, proto.Block{}, "", &connectionError{err}
	}
	reader := q.wire
	if q.Compression == proto.CompressionEnabled {
		if q.frames == nil {
			q.frames = newBlockReader(newFrameReader(q.wire.buffered), q.revision, q.server.version)
		}
		reader = q.frames
	}
	head, err := reader.head()
	if err != nil {
		return nil, proto.Block{}, "", &connectionError{err}
	}
	return reader, head, data.TableName, nil
}

// run runs the query.
func (q *nativeQuery) run(ctx context.Context) error {
	parsed, err := parseStatement(q.Body)
	if err != nil {
		return err
	}
	query := chengine.Statement{SQL: parsed.sql, Format: "Native"}
	for _, p := range q.Parameters {
		query.Parameters = append(query.Parameters, chengine.Parameter{Name: p.Key, Value: unquote(p.Value)})
	}

	if parsed.takesData {
		settings, err := assign(q.settings, setting.quoted)
		if err != nil {
			return err
		}
		query.SQL = parsed.withSettings(settings)
		inline := q.Body[parsed.dataStart:]
		if strings.TrimSpace(inline) == "" {
			return q.insert(ctx, query, parsed)
		}
		query.Format = cmp.Or(parsed.format, "Values")
		defer q.watch(q.cancel)()
		stats, err := insertFrom(ctx, q.session, query, strings.NewReader(inline))
		q.appendProgress(stats)
		return err
	}

	defer q.server.ran(parsed)
	q.set = len(q.settings) > 0
	if err := setAll(ctx, q.session, q.settings); err != nil {
		return err
	}
	if err := q.sendResult(ctx, query, parsed); err != nil {
		return err
	}
	if parsed.verb == "SET" {
		q.sets = append(q.sets, parsed.sql)
	}
	return nil
}

// cleanUp drops the query's temporary tables and resets its settings.
func (q *nativeQuery) cleanUp(ctx context.Context) error {
	for _, table := range q.tables {
		if err := q.session.Exec(ctx, chengine.Statement{SQL: "DROP TEMPORARY TABLE " + quoteName(table)}); err != nil {
			return err
		}
	}
	if !q.set {
		return nil
	}
	if err := resetAll(ctx, q.session, q.settings); err != nil {
		// A setting does not exist, so no setting was changed.
		if asException(err).Code == proto.ErrUnknownSetting {
			return nil
		}
		return err
	}
	for _, sql := range q.sets {
		if err := q.session.Exec(ctx, chengine.Statement{SQL: sql}); err != nil {
			return err
		}
	}
	return nil
}

// sendResult runs any query other than an INSERT with data, and sends its rows.
func (q *nativeQuery) sendResult(ctx context.Context, query chengine.Statement, parsed statement) error {
	defer q.watch(q.cancel)()
	result, err := q.session.Query(ctx, query)
	if err != nil {
		return err
	}
	err = q.sendBlocks(result)
	stats := result.Stats()
	result.Close()
	if err != nil {
		return err
	}

	if !q.header && parsed.returnsRows() {
		columns, err := q.server.columnsOf(ctx, q.session, query, parsed.verb)
		if err != nil {
			return err
		}
		if err := q.appendHeader(columns); err != nil {
			return err
		}
	}
	proto.Profile{Rows: stats.RowsReturned, Blocks: uint64(q.blocks), Bytes: stats.BytesRead}.EncodeAware(&q.out, q.revision) //nolint:gosec // a count is not negative
	q.appendProgress(stats)
	return nil
}

func (q *nativeQuery) sendBlocks(result *chengine.Result) error {
	for {
		piece, err := result.Next()
		if err != nil || piece == nil {
			return err
		}
		err = q.server.transcode(piece, q.revision, func(columns []blockColumn, block []byte) error {
			if !q.header {
				if err := q.appendHeader(columns); err != nil {
					return err
				}
			}
			q.blocks++
			if err := q.appendData(block); err != nil {
				return err
			}
			if err := q.flush(); err != nil {
				return &connectionError{err}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// appendHeader appends the block without rows that begins a result.
func (q *nativeQuery) appendHeader(columns []blockColumn) error {
	q.header = true
	var block proto.Buffer
	appendEmptyBlock(&block, columns, q.revision)
	return q.appendData(block.Buf)
}

func (q *nativeQuery) appendData(block []byte) error {
	proto.ServerCodeData.Encode(&q.out)
	q.out.PutString("") // no table name
	if q.Compression != proto.CompressionEnabled {
		q.out.PutRaw(block)
		return nil
	}
	_, err := newFrameWriter(&bufferWriter{&q.out}, q.method).Write(block)
	return err
}

func (q *nativeQuery) appendProgress(stats chengine.Stats) {
	proto.ServerCodeProgress.Encode(&q.out)
	proto.Progress{
		Rows:       stats.RowsRead,
		Bytes:      stats.BytesRead,
		WroteRows:  stats.RowsWritten,
		WroteBytes: stats.BytesWritten,
	}.EncodeAware(&q.out, q.revision)
}

// unquote removes the quotes around a parameter's value.
func unquote(value string) string {
	if len(value) < 2 || value[0] != '\'' || value[len(value)-1] != '\'' {
		return value
	}
	var text strings.Builder
	for rest := value[1 : len(value)-1]; rest != ""; {
		before, after, found := strings.Cut(rest, `\`)
		text.WriteString(before)
		if !found || after == "" {
			break
		}
		text.WriteByte(unescape(after[0]))
		rest = after[1:]
	}
	return text.String()
}

func unescape(c byte) byte {
	switch c {
	case 'b':
		return '\b'
	case 'f':
		return '\f'
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	case '0':
		return 0
	default:
		return c
	}
}
