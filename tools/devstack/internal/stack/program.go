package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/tail"
)

// stopPatience limits a program's clean stop. The programs' own limits are
// shorter.
const stopPatience = time.Minute

// program is the API or the relay.
type program struct {
	name       string
	supervisor *supervisor.Supervisor
	process    *supervisor.Process
	log        *tail.Buffer
}

// run starts a program of Diehard and writes its output to the log with the name.
func (s *Stack) run(name, binary string, args, env []string) (*program, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err //nolint:wrapcheck // the error names the operation
	}
	keeper, err := supervisor.Start(self, false)
	if err != nil {
		return nil, err
	}
	p := &program{name: name, supervisor: keeper, log: &tail.Buffer{}}
	path, err := filepath.Abs(filepath.Join(s.options.Bin, binary))
	if err != nil {
		return nil, err //nolint:wrapcheck // the error names the operation
	}
	log := io.MultiWriter(p.log, s.options.Logs(name))
	p.process, err = keeper.Run(supervisor.Command{
		Path: path, Args: args, Env: env, StopSignal: syscall.SIGTERM, Grace: stopPatience,
	}, supervisor.Output{Stdout: log, Stderr: log})
	if err != nil {
		keeper.Close()
		return nil, err
	}
	return p, nil
}

// runToEnd runs a program and waits for its end.
func (s *Stack) runToEnd(ctx context.Context, name, binary string, args, env []string) error {
	p, err := s.run(name, binary, args, env)
	if err != nil {
		return err
	}
	defer p.supervisor.Close()
	if err := p.process.Wait(ctx); err != nil {
		return fmt.Errorf("%s %s: %w\n  %s", binary, strings.Join(args, " "), err, strings.Join(p.log.Lines(5), "\n  "))
	}
	return nil
}

// launch starts a program that keeps running.
func (s *Stack) launch(name, command string, env []string) (*program, error) {
	p, err := s.run(name, name, []string{command}, env)
	if err != nil {
		return nil, err
	}
	s.programs = append(s.programs, p)
	s.watch("the "+name, p.process.Done(), p.process.Err, p.log)
	return p, nil
}

// stop terminates the program, and kills it when hurried is closed.
func (p *program) stop(hurried <-chan struct{}) {
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		select {
		case <-hurried:
			p.process.Signal(syscall.SIGKILL)
		case <-finished:
		}
	}()
	p.process.End(stopPatience, syscall.SIGTERM)
	p.supervisor.Close()
}

// waitReady waits until the program's admin port reports that it is ready.
func (p *program) waitReady(ctx context.Context, url string) error {
	const (
		limit = time.Minute
		poll  = 50 * time.Millisecond
	)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not ready after %s", limit))
	defer cancel()
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	for {
		err := isReady(ctx, url)
		if err == nil {
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("start the %s: %w (%w)", p.name, context.Cause(ctx), err)
		}
	}
}

func isReady(ctx context.Context, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/readyz", http.NoBody)
	if err != nil {
		return err //nolint:wrapcheck // the error names the address
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err //nolint:wrapcheck // the error names the address
	}
	defer func() { _ = response.Body.Close() }()
	const enough = 4 << 10
	body, err := io.ReadAll(io.LimitReader(response.Body, enough))
	if err != nil {
		return err //nolint:wrapcheck // the error names the address
	}
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status + ": " + strings.TrimSpace(string(body)))
	}
	return nil
}
