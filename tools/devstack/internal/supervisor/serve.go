package supervisor

import (
	"encoding/gob"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// drain limits the time for which Serve reads the output of an ended process. Children of
// the process may keep the pipe open.
const drain = time.Second

// server is the state of the supervisor process.
type server struct {
	reports reporter
	exited  chan error // receives the end of the running process; nil if none runs
	command Command
	cmd     *exec.Cmd
}

// Serve runs the supervisor: it reads requests from stdin and writes reports to stdout
// until stdin ends or a signal stops it. It must be called by a process that
// does nothing else.
func Serve(stdin io.Reader, stdout io.Writer, temporary bool) error {
	// The kernel sends the signal of Pdeathsig when the thread that started the
	// process ends. Therefore that thread must not end.
	runtime.LockOSThread()

	// If the parent was killed, the pipe has no reader.
	signal.Ignore(syscall.SIGPIPE)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)

	var hello report
	if temporary {
		dir, err := makeTempDir()
		if err != nil {
			return fmt.Errorf("create a temporary folder: %w", err)
		}
		defer removeAll(dir)
		hello.TempDir = dir
	}
	s := &server{reports: reporter{encoder: gob.NewEncoder(stdout)}}
	s.reports.send(hello)

	requests := make(chan request)
	gone := make(chan struct{})
	defer close(gone)
	go func() {
		defer close(requests)
		decoder := gob.NewDecoder(stdin)
		for {
			var r request
			if err := decoder.Decode(&r); err != nil {
				return
			}
			select {
			case requests <- r:
			case <-gone:
				return
			}
		}
	}()

	defer s.end()
	for {
		select {
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			if r.Run != nil {
				s.run(*r.Run)
			} else if s.exited != nil {
				_ = s.cmd.Process.Signal(r.Signal)
			}
		case err := <-s.exited:
			s.finish(err)
		case <-stop:
			return nil
		}
	}
}

func (s *server) run(c Command) {
	if err := s.start(c); err != nil {
		s.reports.send(report{Failed: err.Error()})
		return
	}
	s.reports.send(report{PID: s.cmd.Process.Pid})
}

func (s *server) start(c Command) error {
	s.command = c
	s.cmd = exec.Command(c.Path, c.Args...) //nolint:gosec,noctx // the parent's command; the method end stops it
	s.cmd.Env = c.Env
	s.cmd.WaitDelay = drain
	s.cmd.SysProcAttr = sysProcAttr(c)
	if c.User != nil {
		s.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.User.UID, Gid: c.User.GID}
	}
	if c.Dir != "" {
		// Cmd.Dir is not used, because the other user would enter the folder, and may
		// not be able to reach it.
		if err := os.Chdir(c.Dir); err != nil {
			return err //nolint:wrapcheck // the error names the folder
		}
	}
	if c.Stdin != "" {
		file, err := os.Open(c.Stdin)
		if err != nil {
			return err //nolint:wrapcheck // the error names the file
		}
		defer func() { _ = file.Close() }()
		s.cmd.Stdin = file
	}
	s.cmd.Stdout = s.reports.writer(func(b []byte) report { return report{Stdout: b} })
	s.cmd.Stderr = s.reports.writer(func(b []byte) report { return report{Stderr: b} })
	if err := s.cmd.Start(); err != nil {
		return err //nolint:wrapcheck // the error names the program
	}
	exited := make(chan error, 1)
	cmd := s.cmd
	go func() { exited <- cmd.Wait() }()
	s.exited = exited
	return nil
}

func (s *server) finish(err error) {
	s.exited = nil
	state := s.cmd.ProcessState
	r := report{Exited: true, OK: state.Success(), State: state.String()}
	if err != nil && state.Success() {
		r.State = err.Error()
	}
	s.reports.send(r)
}

// end ends the running process, if any.
func (s *server) end() {
	if s.exited == nil {
		return
	}
	_ = s.cmd.Process.Signal(s.command.StopSignal)
	timer := time.NewTimer(s.command.Grace)
	defer timer.Stop()
	var err error
	select {
	case err = <-s.exited:
	case <-timer.C:
		_ = s.cmd.Process.Kill()
		err = <-s.exited
	}
	s.finish(err)
}

// reporter sends reports from several goroutines. It ignores errors, because an error
// means that the parent has ended. The end of stdin reports this too.
type reporter struct {
	mu      sync.Mutex
	encoder *gob.Encoder
}

func (r *reporter) send(v report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.encoder.Encode(v)
}

func (r *reporter) writer(wrap func([]byte) report) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		r.send(wrap(p))
		return len(p), nil
	})
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// removeAll removes dir. Children of a killed server may still write there for
// a moment.
func removeAll(dir string) {
	const tries = 50
	for range tries {
		if err := os.RemoveAll(dir); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
