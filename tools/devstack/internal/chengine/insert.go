package chengine

import (
	"context"
	"errors"
	"unsafe"
)

// Insert is a running INSERT that receives its data in pieces. The caller must
// end it with Commit or Cancel.
type Insert struct {
	session *Session
	release func()
	handle  unsafe.Pointer
}

// Insert starts an INSERT whose data follow in the statement's format. The
// statement is killed when ctx ends. The error is an *Exception.
func (s *Session) Insert(ctx context.Context, statement Statement) (*Insert, error) {
	i := &Insert{session: s, release: s.killWhenDone(ctx)}
	i.handle = s.start(s.engine.lib.streamInsert, statement)
	if err := i.error(); err != nil {
		i.Cancel()
		return nil, err
	}
	return i, nil
}

// Write passes data to the engine. A piece may end within a row or a block.
// Write waits while the engine is busy. The error is an *Exception.
func (i *Insert) Write(data []byte) (int, error) {
	if len(data) == 0 {
		return 0, nil
	}
	if i.session.engine.lib.insertAppend(i.handle, &data[0], uintptr(len(data))) == 0 {
		return len(data), nil
	}
	if err := i.error(); err != nil {
		return 0, err
	}
	return 0, errors.New("libchdb refused more data for this insert")
}

// Commit ends the data and waits until all of them are inserted. The error is
// an *Exception.
func (i *Insert) Commit() (Stats, error) {
	engine := i.session.engine
	result := engine.lib.insertDone(i.handle)
	defer i.end()
	defer engine.lib.destroyResult(result)
	if err := engine.resultError(result); err != nil {
		return Stats{}, err
	}
	return engine.resultStats(result), nil
}

// Cancel ends the INSERT and drops the data that are not yet in the table. If the data
// fit into one block of the table, all of them are dropped.
func (i *Insert) Cancel() {
	i.end()
}

func (i *Insert) end() {
	i.session.engine.lib.destroyInsert(i.handle)
	i.release()
}

func (i *Insert) error() error {
	if text := i.session.engine.lib.insertError(i.handle); text != "" {
		return newException(text)
	}
	return nil
}
