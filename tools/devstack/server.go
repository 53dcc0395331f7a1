package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/tail"
)

const (
	// stopPatience limits the time of a clean stop. After this time the server is
	// killed.
	stopPatience = 30 * time.Second
	killPatience = 5 * time.Second
)

// server is the common part of both engines: a data folder, and a process that
// can be restarted on it.
type server struct {
	keep string    // the caller's data folder; "" means a temporary folder
	out  io.Writer // receives the log

	life       sync.Mutex             // held while the server starts or stops; guards the fields below
	dataDir    string                 // the current data folder
	supervisor *supervisor.Supervisor // nil before the first start and once stopped
	log        tail.Buffer            // of the current start
	releases   []func()               // release the reserved ports

	mu      sync.Mutex // held only briefly, so that a start or a stop can be interrupted
	current *supervisor.Process
}

// Done returns a channel that is closed when the server's process has ended. Each Start
// makes a new channel.
func (s *server) Done() <-chan struct{} {
	return s.process().Done()
}

// PID returns the id of the server's process, which is the parent of its other
// processes.
func (s *server) PID() int {
	return s.process().PID()
}

// DataDir returns the data folder until the server is stopped.
func (s *server) DataDir() string {
	s.life.Lock()
	defer s.life.Unlock()
	return s.dataDir
}

// process returns the last process, or nil before the first start.
func (s *server) process() *supervisor.Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// prepare prepares the server for run. It reports whether this is the first start of the
// server, or the first start after a stop. The caller holds life.
func (s *server) prepare(name string) (first bool, err error) {
	if s.running() {
		return false, errors.New("the server is already running")
	}
	if s.supervisor != nil {
		return false, nil
	}
	if s.keep == "" && s.dataDir != "" {
		return false, errors.New("the temporary folder was removed")
	}
	path, err := program()
	if err != nil {
		return false, err
	}
	started, err := supervisor.Start(path, s.keep == "")
	if err != nil {
		return false, err
	}
	s.supervisor = started
	if s.keep == "" {
		s.dataDir = filepath.Join(started.TempDir(), name)
	} else if s.dataDir, err = filepath.Abs(s.keep); err != nil {
		return false, fmt.Errorf("find the data folder: %w", err)
	}
	return true, nil
}

// reserve returns a free port. The port stays reserved until the server is stopped, even
// while the server is down. The caller holds life.
func (s *server) reserve(ctx context.Context) (port int, err error) {
	port, release, err := reservePort(ctx)
	if err != nil {
		return 0, err
	}
	s.releases = append(s.releases, release)
	return port, nil
}

// run starts the process. The caller holds life.
func (s *server) run(c supervisor.Command, stdout io.Writer) error {
	var log io.Writer = &s.log
	if s.out != nil {
		log = io.MultiWriter(&s.log, s.out)
	}
	if stdout == nil {
		stdout = log
	}
	s.log.Reset()
	process, err := s.supervisor.Run(c, supervisor.Output{Stdout: stdout, Stderr: log})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = process
	return nil
}

func (s *server) running() bool {
	process := s.process()
	if process == nil {
		return false
	}
	select {
	case <-process.Done():
		return false
	default:
		return true
	}
}

// kill ends the process, even while it starts or stops.
func (s *server) kill(signal syscall.Signal) {
	if s.running() {
		s.process().End(killPatience, signal)
	}
}

func (s *server) stop(signals ...syscall.Signal) {
	s.life.Lock()
	defer s.life.Unlock()
	if s.supervisor == nil {
		return
	}
	if s.running() {
		s.process().End(stopPatience, signals...)
	}
	s.supervisor.Close()
	s.supervisor = nil
	for _, release := range s.releases {
		release()
	}
	s.releases = nil
}
