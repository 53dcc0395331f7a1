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
	// stopPatience is how long a server may take to stop cleanly before it is
	// ended like in a crash.
	stopPatience = 30 * time.Second
	killPatience = 5 * time.Second
)

// server is what both engines have in common: a data folder, and a process that
// can be started again on it.
type server struct {
	keep string    // the data folder; "" is a temporary one
	out  io.Writer // takes the log

	life       sync.Mutex             // held while the server starts and stops; guards what follows
	dataDir    string                 // where the data are
	supervisor *supervisor.Supervisor // nil before the first start and once stopped
	log        tail.Buffer            // since the last start
	releases   []func()               // of its ports

	mu      sync.Mutex // for a moment only, so that a start or a stop can be cut short
	current *supervisor.Process
}

// Done is closed when the server's process has ended; each Start begins a new
// one.
func (s *server) Done() <-chan struct{} {
	return s.process().Done()
}

// PID is the id of the server's process, which is the parent of its others.
func (s *server) PID() int {
	return s.process().PID()
}

// DataDir is where the data are, while the server is not stopped.
func (s *server) DataDir() string {
	s.life.Lock()
	defer s.life.Unlock()
	return s.dataDir
}

// process is the last one, or nil before the first.
func (s *server) process() *supervisor.Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// prepare makes ready for run, and says whether this is the first time since
// the server was made or stopped. The caller holds life.
func (s *server) prepare(name string) (first bool, err error) {
	if s.running() {
		return false, errors.New("it is running")
	}
	if s.supervisor != nil {
		return false, nil
	}
	if s.keep == "" && s.dataDir != "" {
		return false, errors.New("its temporary folder is gone")
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

// reserve returns a free port, which stays the server's until it is stopped, also
// while it is down. The caller holds life.
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

// kill ends the process, also one that is starting or stopping.
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
