package chserver

import (
	"context"
	"strings"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// insert runs an INSERT with the blocks that the client sends. If it goes away
// before the end of the data, nothing is inserted.
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

// insertBlocks passes blocks on until an empty one ends the data. What the
// engine says against them is refused: the client reads no answer before it
// has sent everything.
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

// described are the columns of a selection as they were at a count of changes.
type described struct {
	selection string
	changes   uint64
	columns   []blockColumn
}

// insertColumns gives the columns that an INSERT takes. To ask the engine takes
// it a fifth of the time of a small INSERT, and a client repeats the same one.
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
	// The INSERT itself says better what is wrong with it.
	insert, insertErr := q.session.Insert(ctx, query)
	if insertErr != nil {
		return nil, insertErr
	}
	insert.Cancel()
	return nil, err
}
