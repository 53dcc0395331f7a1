// Package chengine runs ClickHouse's engine, libchdb, inside this process. It
// loads the library at run time, without cgo.
//
// libchdb keeps its state in the process, so only one Engine with one data
// folder can be open at a time. Any number of its sessions work in parallel.
package chengine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// Engine is ClickHouse's engine on one data folder. It is safe for concurrent
// use.
type Engine struct {
	lib     *library
	dataDir string
	anchor  *Session
	lastID  atomic.Uint64

	mu     sync.Mutex
	closed bool
	open   sync.WaitGroup // open sessions
}

// Open loads libchdb from the file named library and starts the engine on dataDir. It
// creates the folder if missing. It returns an *InUseError if another process uses the
// folder.
func Open(library, dataDir string) (*Engine, error) {
	dataDir, err := filepath.Abs(dataDir)
	if err != nil {
		return nil, fmt.Errorf("resolve the data folder: %w", err)
	}
	if err := os.MkdirAll(dataDir, 0o750); err != nil {
		return nil, fmt.Errorf("create the data folder: %w", err)
	}
	if err := checkFree(dataDir); err != nil {
		return nil, err
	}

	if err := os.WriteFile(configFile(dataDir), []byte(config), 0o600); err != nil {
		return nil, fmt.Errorf("write the engine's configuration: %w", err)
	}

	lib, err := loadLibrary(library)
	if err != nil {
		return nil, err
	}
	// Go turns SIGSEGV into a panic. ClickHouse's handlers would end the process instead.
	lib.setSignalHandlersEnabled(0)

	e := &Engine{lib: lib, dataDir: dataDir}
	// The engine starts with its first connection and stops with its last one.
	// This connection stays open, unused.
	e.anchor, err = e.connect()
	if err != nil {
		return nil, fmt.Errorf("start the engine on %s: %w", dataDir, err)
	}
	return e, nil
}

// config sets the lifetime of merged parts to the default of clickhouse-server. The
// default of libchdb is zero: it deletes merged parts before the new part is synced.
const config = `<clickhouse>
    <merge_tree>
        <old_parts_lifetime>480</old_parts_lifetime>
    </merge_tree>
</clickhouse>
`

func configFile(dataDir string) string {
	return filepath.Join(dataDir, "config.xml")
}

// Close waits until all sessions are closed, and stops the engine.
func (e *Engine) Close() {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.open.Wait()
	e.anchor.disconnect()
}

// NewSession opens a session with its own current database, settings and
// temporary tables. It takes about 0.1 ms.
func (e *Engine) NewSession() (*Session, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, errors.New("the engine is stopping")
	}
	session, err := e.connect()
	if err != nil {
		return nil, err
	}
	e.open.Add(1)
	return session, nil
}

func (e *Engine) connect() (*Session, error) {
	id := strconv.FormatUint(e.lastID.Add(1), 10)
	arguments := []string{
		"clickhouse",
		"--path=" + e.dataDir,
		// Without this option the engine searches the working directory and the
		// home folder for a configuration.
		"--config-file=" + configFile(e.dataDir),
		// clickhouse-local accepts `1+1` as a query; the server does not.
		"--implicit_select=0",
		"--" + sessionSetting + "=" + id,
	}

	var pinner runtime.Pinner
	defer pinner.Unpin()
	argv := make([]*byte, len(arguments))
	for i, argument := range arguments {
		argv[i] = unsafe.SliceData(append([]byte(argument), 0))
		pinner.Pin(argv[i])
	}
	pinner.Pin(&argv[0])

	connection := e.lib.connect(int32(len(argv)), &argv[0]) //nolint:gosec // few arguments
	if connection == nil {
		return nil, errors.New("libchdb refused the connection; it prints the reason to standard error")
	}
	return &Session{engine: e, id: id, connection: connection}, nil
}

// kill cancels the statement of the session with this id. It does not wait for the end
// of the statement, because KILL QUERY with SYNC can hang.
func (e *Engine) kill(id string) error {
	session, err := e.connect()
	if err != nil {
		return err
	}
	defer session.disconnect()
	return session.exec("KILL QUERY WHERE Settings['" + sessionSetting + "'] = '" + id + "' ASYNC FORMAT Null")
}

// InUseError reports that another process uses the data folder.
type InUseError struct {
	DataDir string
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("the data folder %s is in use by another ClickHouse", e.DataDir)
}

// checkFree tries the lock that ClickHouse itself holds on its data folder.
// Without this check the engine would refuse the connection and return no
// error.
func checkFree(dataDir string) error {
	status, err := os.OpenFile(filepath.Join(dataDir, "status"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("check the data folder: %w", err)
	}
	defer status.Close()

	err = syscall.Flock(int(status.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return &InUseError{DataDir: dataDir}
	}
	if err != nil {
		return fmt.Errorf("check the data folder: %w", err)
	}
	return nil
}
