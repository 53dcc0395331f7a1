package chengine

import (
	"context"
	"slices"
	"strings"
	"unsafe"
)

// blockFormats lists formats whose blocks can be written one after another. In other
// formats libchdb would write a start and an end for each block. Therefore a result in
// another format is read in one piece.
var blockFormats = []string{"Native", "RowBinary", "TabSeparated", "TSV"}

// Result is the output of a statement, in its format, piece by piece.
type Result struct {
	session *Session
	release func()
	stream  unsafe.Pointer // nil if the piece is the whole result
	piece   unsafe.Pointer // the piece that Next returned, or the whole result before the first Next
	waiting bool           // Next has not returned the piece yet
	stats   Stats
}

// Query runs a statement. If the format allows it, the result of a SELECT is read block by
// block while the SELECT runs. Other statements have completed when Query returns. The
// statement is killed when ctx ends. The error is an *Exception.
func (s *Session) Query(ctx context.Context, statement Statement) (*Result, error) {
	r := &Result{session: s, release: s.killWhenDone(ctx)}
	if err := r.start(statement); err != nil {
		r.release()
		return nil, err
	}
	return r, nil
}

// QueryWhole is like Query, but returns the result in one piece. So an exception cannot
// occur after the caller has received a part of the result.
func (s *Session) QueryWhole(ctx context.Context, statement Statement) (*Result, error) {
	r := &Result{session: s, release: s.killWhenDone(ctx)}
	if err := r.startWhole(statement); err != nil {
		r.release()
		return nil, err
	}
	return r, nil
}

func (r *Result) start(statement Statement) error {
	isFormat := func(format string) bool { return strings.EqualFold(format, statement.Format) }
	if !slices.ContainsFunc(blockFormats, isFormat) {
		return r.startWhole(statement)
	}

	engine := r.session.engine
	stream := r.session.start(engine.lib.streamQuery, statement)
	err := engine.resultError(stream)
	if err == nil {
		r.stream = stream
		return nil
	}
	engine.lib.destroyResult(stream)
	if isNotStreamable(err) {
		return r.startWhole(statement)
	}
	return err
}

func (r *Result) startWhole(statement Statement) error {
	engine := r.session.engine
	handle := r.session.start(engine.lib.query, statement)
	if err := engine.resultError(handle); err != nil {
		engine.lib.destroyResult(handle)
		return err
	}
	r.piece, r.waiting = handle, true
	return nil
}

// isNotStreamable reports whether libchdb refused to stream. In this case libchdb has not
// run the statement.
func isNotStreamable(err error) bool {
	exception, ok := err.(*Exception) //nolint:errorlint // resultError returns this type
	return ok && strings.HasPrefix(exception.Message, "Streaming query is not supported")
}

// Next returns the next piece, or nil at the end. The piece is valid until the
// next call.
func (r *Result) Next() ([]byte, error) {
	engine := r.session.engine
	if !r.waiting {
		r.dropPiece()
		if r.stream == nil {
			return nil, nil
		}
		r.piece = engine.lib.fetchResult(*r.session.connection, r.stream)
		if err := engine.resultError(r.piece); err != nil {
			return nil, err
		}
	}
	r.waiting = false
	r.stats.add(engine.resultStats(r.piece))
	data := engine.resultData(r.piece)
	if len(data) == 0 {
		return nil, nil
	}
	return data, nil
}

// Stats returns the work counted for the pieces so far.
func (r *Result) Stats() Stats {
	return r.stats
}

// Close frees the result, and ends the statement if it is still running.
func (r *Result) Close() {
	r.dropPiece()
	if r.stream != nil {
		r.session.engine.lib.cancelQuery(*r.session.connection, r.stream)
		r.session.engine.lib.destroyResult(r.stream)
		r.stream = nil
	}
	r.release()
}

func (r *Result) dropPiece() {
	if r.piece != nil {
		r.session.engine.lib.destroyResult(r.piece)
		r.piece = nil
	}
}
