package chengine

import (
	"context"
	"slices"
	"strings"
	"unsafe"
)

// blockFormats are formats whose blocks can be written one after another. In
// the others libchdb would give each block a beginning and an end of its own,
// so they need the whole result at once.
var blockFormats = []string{"Native", "RowBinary", "TabSeparated", "TSV"}

// Result is what a statement returns, in its format, piece by piece.
type Result struct {
	session *Session
	release func()
	stream  unsafe.Pointer // nil where the piece is the whole result
	piece   unsafe.Pointer // the piece that Next gave, or the whole result before that
	waiting bool           // the piece has not been given yet
	stats   Stats
}

// Query runs a statement. A SELECT in a format that allows it is read block by
// block while it runs; everything else has run when Query returns. The end of
// ctx kills the statement. Errors are an *Exception.
func (s *Session) Query(ctx context.Context, statement Statement) (*Result, error) {
	r := &Result{session: s, release: s.killWhenDone(ctx)}
	if err := r.start(statement); err != nil {
		r.release()
		return nil, err
	}
	return r, nil
}

// QueryWhole is Query without streaming: an exception cannot come after the
// first piece.
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

// isNotStreamable says whether libchdb refused to stream, which it does before
// it runs anything.
func isNotStreamable(err error) bool {
	exception, ok := err.(*Exception) //nolint:errorlint // made by resultError
	return ok && strings.HasPrefix(exception.Message, "Streaming query is not supported")
}

// Next gives the next piece, valid until the following call, or nil at the end.
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

// Stats counts what the pieces given so far took.
func (r *Result) Stats() Stats {
	return r.stats
}

// Close frees the result, and ends the statement where it is still running.
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
