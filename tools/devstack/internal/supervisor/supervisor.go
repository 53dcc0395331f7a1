// Package supervisor runs processes that must not outlive their parent, however
// that parent ends.
//
// Between the parent and its process stands a small process of its own, the
// supervisor, which is told what to run over a pipe. When the pipe closes,
// because the parent is done or because it was killed, the supervisor ends what
// it runs, removes its temporary folder and goes. On Linux the kernel kills the
// process if the supervisor itself is killed.
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

// ErrClosed says that the supervisor has ended, or was told to.
var ErrClosed = errors.New("the supervisor has ended")

// Command is a process to run.
type Command struct {
	Path string
	Args []string // without the program's own name
	Env  []string // in full; nil is the parent's
	Dir  string   // the working directory; it need not be reachable by the user

	// Stdin is the path of a file that the process reads; "" is an empty input.
	Stdin string

	// User runs the process, if it is not the parent's own.
	User *User

	// StopSignal asks the process to end when the parent has gone. One that
	// does not end within Grace is killed.
	StopSignal syscall.Signal
	Grace      time.Duration
}

// User is who runs a process.
type User struct {
	UID, GID uint32
}

// Output takes what a process writes. The writers are called from one
// goroutine, before the process's Done is closed; nil drops.
type Output struct {
	Stdout, Stderr io.Writer
}

// request is what the parent sends: one of its fields.
type request struct {
	Run    *Command
	Signal syscall.Signal
}

// report is what the supervisor answers.
type report struct {
	TempDir string // the first report's

	PID    int    // of the process just started
	Failed string // why it could not be started

	Stdout, Stderr []byte

	Exited bool
	State  string // how it ended: "exit status 1", "signal: killed"
	OK     bool   // it ended with status 0
}

// Supervisor is the parent's end. It runs one process at a time. Its methods
// are safe for concurrent use.
type Supervisor struct {
	tempDir string
	cmd     *exec.Cmd
	stdin   io.Closer
	errors  tail.Buffer // what the supervisor itself complained about

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

// Start starts a supervisor: program is the devstack program. With temporary it
// makes a folder that goes when it ends.
func Start(program string, temporary bool) (*Supervisor, error) {
	args := []string{"supervise"}
	if temporary {
		args = append(args, "--temporary")
	}
	s := &Supervisor{
		cmd:      exec.Command(program, args...), //nolint:noctx // it lives until Close, or until this process ends
		starting: make(chan report, 1),
		done:     make(chan struct{}),
	}
	// A group of its own: Ctrl-C in a terminal goes to the whole group of the
	// parent, who decides in which order to end things.
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

// TempDir is the supervisor's temporary folder, if it was started with one.
func (s *Supervisor) TempDir() string { return s.tempDir }

// receive hands on what the supervisor reports, until it ends.
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

// Run starts a process. It is an error to start a second one before the first
// has ended.
func (s *Supervisor) Run(c Command, out Output) (*Process, error) {
	p := &Process{supervisor: s, output: out, done: make(chan struct{})}
	s.mu.Lock()
	if s.current != nil {
		s.mu.Unlock()
		return nil, errors.New("a process is running already")
	}
	err := s.requests.Encode(request{Run: &c})
	if err == nil {
		s.current = p // before the answer: output may follow it at once
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

// Close ends the process that runs, if one does, removes the temporary folder,
// and returns when all of that is done. Closing again does nothing.
func (s *Supervisor) Close() {
	_ = s.stdin.Close()
	<-s.done
}

// PID is the process's id.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended and its output was handed over.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the process ended; nil is success. It may be called once Done is
// closed.
func (p *Process) Err() error {
	if p.ok {
		return nil
	}
	return errors.New(p.state)
}

// Signal sends the process a signal, if it still runs.
func (p *Process) Signal(signal syscall.Signal) {
	s := p.supervisor
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == p {
		// A supervisor that is gone took its process along.
		_ = s.requests.Encode(request{Signal: signal})
	}
}

// End sends the signals one after the other, each when the process has not
// ended within patience of the one before, and SIGKILL at last. It returns when
// the process has ended.
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

// Wait waits for the process to end by itself, and kills it when ctx ends
// before.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.Err()
	case <-ctx.Done():
		p.End(0)
		return context.Cause(ctx) //nolint:wrapcheck // the caller's own
	}
}

// tempPattern names temporary folders so that a person sees whose they are.
const tempPattern = "diehard-devstack-*"

// makeTempDir makes a folder that other users may pass through: the server in
// it may run as one of them.
func makeTempDir() (string, error) {
	dir, err := os.MkdirTemp("", tempPattern)
	if err != nil {
		return "", err //nolint:wrapcheck // names the folder already
	}
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // passing through is all that others may
		return "", err //nolint:wrapcheck // names the folder already
	}
	return dir, nil
}
