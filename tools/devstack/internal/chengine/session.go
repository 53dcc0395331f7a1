package chengine

import (
	"context"
	"time"
	"unsafe"
)

// sessionSetting carries a session's id, by which KILL QUERY finds what it is
// running: libchdb makes up query ids and does not tell them. The setting is
// a label for entries of the query cache, which libchdb does not have.
const sessionSetting = "query_cache_tag"

// killInterval is how often a canceled statement is killed again: it may not
// have been on the list of running queries yet.
const killInterval = 20 * time.Millisecond

// Session runs one statement at a time; what it returns must be closed before
// the next one. It is not safe for concurrent use.
type Session struct {
	engine     *Engine
	connection *unsafe.Pointer
	id         string
}

// Statement is one SQL statement.
type Statement struct {
	// SQL is the statement. Of an INSERT with data, what stands before FORMAT
	// or VALUES.
	SQL string
	// Format is the format of the result where the SQL names none, or of the
	// data to insert.
	Format string
	// Parameters are the values of {name:Type} in the SQL, in escaped form.
	Parameters []Parameter
}

// Parameter is the value of a query parameter.
type Parameter struct {
	Name, Value string
}

// Stats counts what a statement did.
type Stats struct {
	RowsReturned, RowsRead, BytesRead, RowsWritten, BytesWritten uint64
}

func (s *Stats) add(o Stats) {
	s.RowsReturned += o.RowsReturned
	s.RowsRead += o.RowsRead
	s.BytesRead += o.BytesRead
	s.RowsWritten += o.RowsWritten
	s.BytesWritten += o.BytesWritten
}

// Close ends the session and drops its temporary tables.
func (s *Session) Close() {
	s.disconnect()
	s.engine.open.Done()
}

func (s *Session) disconnect() {
	s.engine.lib.close(s.connection)
	s.connection = nil
}

// Exec runs a statement and drops its result. Its error is an *Exception.
func (s *Session) Exec(ctx context.Context, statement Statement) error {
	result, err := s.QueryWhole(ctx, statement)
	if err != nil {
		return err
	}
	result.Close()
	return nil
}

func (s *Session) exec(sql string) error {
	handle := s.start(s.engine.lib.query, Statement{SQL: sql})
	defer s.engine.lib.destroyResult(handle)
	return s.engine.resultError(handle)
}

// start passes a statement to one of libchdb's three ways to run it.
func (s *Session) start(by startStatement, statement Statement) unsafe.Pointer {
	parameters := newParameterArrays(statement.Parameters)
	defer parameters.pinner.Unpin()
	sql, format := []byte(statement.SQL), []byte(statement.Format)
	return by(
		*s.connection,
		unsafe.SliceData(sql), uintptr(len(sql)),
		unsafe.SliceData(format), uintptr(len(format)),
		unsafe.SliceData(parameters.names), unsafe.SliceData(parameters.nameLengths),
		unsafe.SliceData(parameters.values), unsafe.SliceData(parameters.valueLengths),
		uintptr(len(statement.Parameters)),
	)
}

// killWhenDone has the session's statement killed when ctx ends. The function
// returned must be called when the statement has ended; after it nothing will
// be killed any more.
func (s *Session) killWhenDone(ctx context.Context) (release func()) {
	ended, killed := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		ticker := time.NewTicker(killInterval)
		defer ticker.Stop()
		for {
			// An error means that the engine has no session to spare: try again.
			_ = s.engine.kill(s.id)
			select {
			case <-ended:
				return
			case <-ticker.C:
			}
		}
	})
	return func() {
		close(ended)
		if !stop() {
			<-killed
		}
	}
}

// resultError is the exception that a result carries, or nil.
func (e *Engine) resultError(handle unsafe.Pointer) error {
	if text := e.lib.resultError(handle); text != "" {
		return newException(text)
	}
	return nil
}

// resultData is the result's memory, valid until the result is destroyed.
func (e *Engine) resultData(handle unsafe.Pointer) []byte {
	return unsafe.Slice(e.lib.resultBuffer(handle), e.lib.resultLength(handle))
}

func (e *Engine) resultStats(handle unsafe.Pointer) Stats {
	return Stats{
		RowsReturned: e.lib.resultRows(handle),
		RowsRead:     e.lib.resultStorageRowsRead(handle),
		BytesRead:    e.lib.resultStorageBytesRead(handle),
		RowsWritten:  e.lib.resultRowsWritten(handle),
		BytesWritten: e.lib.resultBytesWritten(handle),
	}
}
