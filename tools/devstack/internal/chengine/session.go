package chengine

import (
	"context"
	"time"
	"unsafe"
)

// sessionSetting is the setting that holds a session's id, so that KILL QUERY finds the
// session's statement. libchdb chooses query ids and does not return them. The setting
// has no other effect: it labels entries of the query cache, and libchdb has no such
// cache.
const sessionSetting = "query_cache_tag"

// killInterval is the pause between attempts to kill a canceled statement. The
// statement may not yet be on the list of running queries.
const killInterval = 20 * time.Millisecond

// Session runs one statement at a time. The result must be closed before the
// next statement. A Session is not safe for concurrent use.
type Session struct {
	engine     *Engine
	connection *unsafe.Pointer
	id         string
}

// Statement is one SQL statement.
type Statement struct {
	// SQL is the statement. For an INSERT with data it is the part before
	// FORMAT or VALUES.
	SQL string
	// Format is the format of the data to insert, or of the result if the SQL names
	// no format.
	Format string
	// Parameters are the values of {name:Type} in the SQL, in escaped form.
	Parameters []Parameter
}

// Parameter is the value of a query parameter.
type Parameter struct {
	Name, Value string
}

// Stats counts the rows and bytes that a statement has read, written and returned.
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

// Exec runs a statement and drops its result. The error is an *Exception.
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

// start starts a statement with one of libchdb's three functions.
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

// killWhenDone kills the session's statement when ctx ends. The caller must
// call release when the statement has ended; release guarantees that no later
// statement is killed.
func (s *Session) killWhenDone(ctx context.Context) (release func()) {
	ended, killed := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		ticker := time.NewTicker(killInterval)
		defer ticker.Stop()
		for {
			// An error means that the engine has no free session, so the next
			// attempt may succeed.
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

// resultError returns the exception of a result, or nil.
func (e *Engine) resultError(handle unsafe.Pointer) error {
	if text := e.lib.resultError(handle); text != "" {
		return newException(text)
	}
	return nil
}

// resultData returns the result's memory, which is valid until the result is
// destroyed.
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
