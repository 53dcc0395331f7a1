// Package supervisor runs processes that end with their parent, even if the parent
// crashes. The supervisor is a small process between the parent and such a process. It
// watches a pipe to the parent.
// See docs/adr/0041-a-supervisor-between-test-and-server.md.
package supervisor

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/tail"
)

// ErrClosed reports that the supervisor has ended or is ending.
var ErrClosed = errors.New("the supervisor has ended")

// Command is a process to run.
type Command struct {
	Path string
	Args []string // without the program's name
	Env  []string // complete; nil is the parent's
	Dir  string   // the working directory; User need not be able to reach it

	// Stdin is the path of the file that is the process's input; "" is an empty input.
	Stdin string

	// User is the user of the process; nil is the parent's.
	User *User

	// StopSignal is sent when the parent has ended. A process that does not end
	// within Grace is killed.
	StopSignal syscall.Signal
	Grace      time.Duration
}

// User is the user and group of a process.
type User struct {
	UID, GID uint32
}

// Output receives the output of a process. A single goroutine calls the writers, and only
// until the process's Done is closed. If a writer is nil, its output is dropped.
type Output struct {
	Stdout, Stderr io.Writer
}

// request is a message of the parent. Exactly one field is set.
type request struct {
	Run    *Command
	Signal syscall.Signal
}

// report is a message of the supervisor.
type report struct {
	TempDir string // only in the first report

	PID    int    // of the new process
	Failed string // the reason of a failed start

	Stdout, Stderr []byte

	Exited bool
	State  string // for example "exit status 1" or "signal: killed"
	OK     bool   // the process ended with status 0
}

// Supervisor is the parent's side. It runs one process at a time. Its methods
// are safe for concurrent use.
type Supervisor struct {
	tempDir string
	cmd     *exec.Cmd
	stdin   io.Closer
	errors  tail.Buffer // errors of the supervisor itself

	mu       sync.Mutex // guards requests and current
	requests *gob.Encoder
	current  *Process
	starting chan report

	done chan struct{}
}

// Process is one run of a command.
type Process struct {
	pid        int
	supervisor *Supervisor
	output     Output
	done       chan struct{}
	state      string
	ok         bool
}

// Start starts a supervisor. The argument program is the path of the devstack program. If
// temporary is set, the supervisor creates a folder and removes it when it ends.
func Start(program string, temporary bool) (*Supervisor, error) {
	args := []string{"supervise"}
	if temporary {
		args = append(args, "--temporary")
	}
	s := &Supervisor{
		cmd:      exec.Command(program, args...), //nolint:noctx // runs until Close, or until this process ends
		starting: make(chan report, 1),
		done:     make(chan struct{}),
	}
	// The supervisor gets its own process group. Ctrl-C in a terminal goes to
	// the whole group of the parent, and the parent decides the order in which
	// processes end.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	s.cmd.Stderr = &s.errors
	stdin, err := s.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start a supervisor: %w", err)
	}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start a supervisor: %w", err)
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a supervisor: %w", err)
	}
	s.stdin = stdin
	s.requests = gob.NewEncoder(stdin)

	reports := gob.NewDecoder(stdout)
	var hello report
	if err := reports.Decode(&hello); err != nil {
		_ = stdin.Close()
		_ = s.cmd.Wait()
		return nil, fmt.Errorf("start a supervisor with %s: %w: %s", program, err, s.errors.String())
	}
	s.tempDir = hello.TempDir
	go s.receive(reports)
	return s, nil
}

// TempDir returns the supervisor's temporary folder, or "" without one.
func (s *Supervisor) TempDir() string { return s.tempDir }

// receive handles the supervisor's reports until it ends.
func (s *Supervisor) receive(reports *gob.Decoder) {
	defer close(s.done)
	for {
		var r report
		if err := reports.Decode(&r); err != nil {
			break
		}
		switch {
		case r.PID != 0 || r.Failed != "":
			s.starting <- r
		case r.Exited:
			s.finish(r)
		default:
			s.write(r)
		}
	}
	_ = s.cmd.Wait()
	s.finish(report{State: "its supervisor was killed"})
}

func (s *Supervisor) write(r report) {
	s.mu.Lock()
	p := s.current
	s.mu.Unlock()
	if p == nil {
		return
	}
	if len(r.Stdout) > 0 && p.output.Stdout != nil {
		_, _ = p.output.Stdout.Write(r.Stdout)
	}
	if len(r.Stderr) > 0 && p.output.Stderr != nil {
		_, _ = p.output.Stderr.Write(r.Stderr)
	}
}

func (s *Supervisor) finish(r report) {
	s.mu.Lock()
	p := s.current
	s.current = nil
	s.mu.Unlock()
	if p != nil {
		p.state, p.ok = r.State, r.OK
		close(p.done)
	}
}

// Run starts a process. It returns an error if the previous process has not
// ended.
func (s *Supervisor) Run(c Command, out Output) (*Process, error) {
	p := &Process{supervisor: s, output: out, done: make(chan struct{})}
	s.mu.Lock()
	if s.current != nil {
		s.mu.Unlock()
		return nil, errors.New("a process is already running")
	}
	err := s.requests.Encode(request{Run: &c})
	if err == nil {
		s.current = p // before the reply, because output may follow the reply at once
	}
	s.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, ErrClosed)
	}

	var started report
	select {
	case started = <-s.starting:
	case <-s.done:
		return nil, fmt.Errorf("start %s: %w: %s", c.Path, ErrClosed, s.errors.String())
	}
	if started.Failed != "" {
		s.mu.Lock()
		s.current = nil
		s.mu.Unlock()
		return nil, fmt.Errorf("start %s: %s", c.Path, started.Failed)
	}
	p.pid = started.PID
	return p, nil
}

// Close ends the running process, if any, and removes the temporary folder. It returns
// after both. A second call does nothing.
func (s *Supervisor) Close() {
	_ = s.stdin.Close()
	<-s.done
}

// PID returns the process's id.
func (p *Process) PID() int { return p.pid }

// Done returns a channel that is closed when the process has ended and its
// output was written.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns the error of the ended process, or nil after a success. It may be
// called only after Done is closed.
func (p *Process) Err() error {
	if p.ok {
		return nil
	}
	return errors.New(p.state)
}

// Signal sends a signal to the process if it is still running.
func (p *Process) Signal(signal syscall.Signal) {
	s := p.supervisor
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == p {
		// If the supervisor has ended, its process has ended too.
		_ = s.requests.Encode(request{Signal: signal})
	}
}

// End sends the signals one after the other, and then SIGKILL. It sends the next signal
// if the process does not end within patience. It returns when the process has ended.
func (p *Process) End(patience time.Duration, signals ...syscall.Signal) {
	for _, signal := range signals {
		p.Signal(signal)
		timer := time.NewTimer(patience)
		select {
		case <-p.done:
			timer.Stop()
			return
		case <-timer.C:
		}
	}
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Wait waits for the process to end. It kills the process if ctx ends first.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.Err()
	case <-ctx.Done():
		p.End(0)
		return context.Cause(ctx) //nolint:wrapcheck // the caller's own error
	}
}

// tempPattern is the pattern for the names of temporary folders. The name shows where a
// folder comes from.
const tempPattern = "diehard-devstack-*"

// makeTempDir creates a folder that other users may pass through, because the
// server in it may run as another user.
func makeTempDir() (string, error) {
	dir, err := os.MkdirTemp("", tempPattern)
	if err != nil {
		return "", err //nolint:wrapcheck // the error names the folder
	}
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // others may only pass through
		return "", err //nolint:wrapcheck // the error names the folder
	}
	return dir, nil
}
