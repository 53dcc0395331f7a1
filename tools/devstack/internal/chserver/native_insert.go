package chserver

import (
	"context"
	"strings"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// insert runs an INSERT with the client's blocks. If the client disconnects
// before the end of the data, no row is inserted.
func (q *nativeQuery) insert(ctx context.Context, query chengine.Statement, parsed statement) error {
	columns, err := q.insertColumns(ctx, query, parsed)
	if err != nil {
		return err
	}
	insert, err := q.session.Insert(ctx, query)
	if err != nil {
		return err
	}
	if err := q.appendHeader(columns); err != nil {
		insert.Cancel()
		return err
	}
	if err := q.flush(); err != nil {
		insert.Cancel()
		return &connectionError{err}
	}

	q.conn.limit.Store(int64(receiveTimeout(q.settings)))
	refused, err := q.insertBlocks(insert)
	q.conn.limit.Store(0)
	if err == nil {
		err = refused
	}
	if err != nil {
		insert.Cancel()
		return err
	}
	defer q.watch(q.cancel)()
	stats, err := insert.Commit()
	if err != nil {
		return err
	}
	q.appendProgress(stats)
	return nil
}

// insertBlocks passes blocks to the engine until an empty block ends the data. If the
// engine fails, insertBlocks returns the engine's error as refused, but still reads all
// blocks, because the client reads no response before it has sent everything.
func (q *nativeQuery) insertBlocks(insert *chengine.Insert) (refused, err error) {
	write := func(data []byte) {
		if refused == nil {
			_, refused = insert.Write(data)
		}
	}
	for {
		reader, head, _, err := q.receiveBlock()
		if err != nil {
			return refused, err
		}
		if head.Columns == 0 {
			return refused, nil
		}
		var out proto.Buffer
		appendBlockHead(&out, head.Columns, head.Rows, engineRevision)
		write(out.Buf)
		err = reader.columns(head, func(c blockColumn, data []byte) error {
			out.Reset()
			appendColumnHead(&out, c, engineRevision)
			write(out.Buf)
			write(data)
			return nil
		})
		if err != nil {
			return refused, &connectionError{err}
		}
	}
}

// described caches the columns of a selection. It also holds the server's count of
// changes at the time when the columns were read.
type described struct {
	selection string
	changes   uint64
	columns   []blockColumn
}

// insertColumns returns the columns that an INSERT expects. It caches the columns,
// because a client usually repeats its INSERT, and asking the engine takes a fifth of the
// time of a small INSERT.
func (q *nativeQuery) insertColumns(ctx context.Context, query chengine.Statement, parsed statement) ([]blockColumn, error) {
	list := "*"
	if parsed.columns != "" {
		list = parsed.columns[1 : len(parsed.columns)-1]
	}
	selection := query
	selection.SQL = "SELECT " + list + " FROM " + parsed.target
	changes := q.server.changes.Load()
	if last := q.inserted; last.columns != nil && last.selection == selection.SQL && last.changes == changes {
		return last.columns, nil
	}
	columns, err := q.server.describe(ctx, q.session, selection)
	if err == nil {
		isFunction := strings.Contains(parsed.target, "(")
		if !isFunction && len(query.Parameters) == 0 {
			q.inserted = described{selection.SQL, changes, columns}
		}
		return columns, nil
	}
	// The engine's error for the INSERT itself is clearer.
	insert, insertErr := q.session.Insert(ctx, query)
	if insertErr != nil {
		return nil, insertErr
	}
	insert.Cancel()
	return nil, err
}
