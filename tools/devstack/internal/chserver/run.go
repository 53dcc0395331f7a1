package chserver

import (
	"bytes"
	"context"
	"errors"
	"io"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// insertPiece is the size of the pieces in which INSERT data go to the engine.
const insertPiece = 256 << 10

// insertFrom runs an INSERT with the data of a reader. If reading fails, no row
// is inserted.
func insertFrom(ctx context.Context, session *chengine.Session, s chengine.Statement, data io.Reader) (chengine.Stats, error) {
	insert, err := session.Insert(ctx, s)
	if err != nil {
		return chengine.Stats{}, err
	}
	piece := make([]byte, insertPiece)
	for {
		n, readErr := data.Read(piece)
		if _, err := insert.Write(piece[:n]); err != nil {
			insert.Cancel()
			return chengine.Stats{}, err
		}
		if errors.Is(readErr, io.EOF) {
			return insert.Commit()
		}
		if readErr != nil {
			insert.Cancel()
			return chengine.Stats{}, asException(readErr)
		}
	}
}

// createExternalTable creates the temporary table for data that a client sends
// with its query.
func createExternalTable(ctx context.Context, session *chengine.Session, name, structure string) error {
	return session.Exec(ctx, chengine.Statement{
		SQL: "CREATE TEMPORARY TABLE " + quoteName(name) + " (" + structure + ") ENGINE = Memory",
	})
}

// ran must be called after each statement. It counts statements that may have changed a
// table.
func (s *Server) ran(parsed statement) {
	if parsed.verb != "INSERT" && !parsed.returnsRows() {
		s.changes.Add(1)
	}
}

// describe returns the columns of a SELECT without running it.
func (s *Server) describe(ctx context.Context, session *chengine.Session, query chengine.Statement) ([]blockColumn, error) {
	query.SQL = "DESCRIBE (" + query.SQL + "\n)"
	query.Format = "RowBinary"
	result, err := session.QueryWhole(ctx, query)
	if err != nil {
		return nil, err
	}
	defer result.Close()
	rows, err := result.Next()
	if err != nil {
		return nil, err
	}

	// The fields: name, type, kind and expression of the default, comment,
	// codec, TTL.
	const fields = 7
	var columns []blockColumn
	reader := proto.NewReader(bytes.NewReader(rows))
	for {
		var row [fields]string
		for i := range row {
			if row[i], err = reader.Str(); err != nil {
				if i == 0 && errors.Is(err, io.EOF) {
					return columns, nil
				}
				return nil, asException(err)
			}
		}
		columns = append(columns, blockColumn{name: row[0], kind: row[1]})
	}
}

// columnsOf returns the columns of a query that has returned no rows. In this
// case the engine writes no header.
func (s *Server) columnsOf(ctx context.Context, session *chengine.Session, query chengine.Statement, verb string) ([]blockColumn, error) {
	switch verb {
	case "SELECT", "WITH", "FROM", "(":
		return s.describe(ctx, session, query)
	}
	// SHOW and similar statements cannot be described, so they run again.
	query.Format = "RowBinaryWithNamesAndTypes"
	result, err := session.QueryWhole(ctx, query)
	if err != nil {
		return nil, err
	}
	defer result.Close()
	head, err := result.Next()
	if err != nil {
		return nil, err
	}
	reader := proto.NewReader(bytes.NewReader(head))
	count, err := reader.Int()
	if err != nil {
		return nil, asException(err)
	}
	columns := make([]blockColumn, count)
	for i := range columns {
		if columns[i].name, err = reader.Str(); err != nil {
			return nil, asException(err)
		}
	}
	for i := range columns {
		if columns[i].kind, err = reader.Str(); err != nil {
			return nil, asException(err)
		}
	}
	return columns, nil
}
