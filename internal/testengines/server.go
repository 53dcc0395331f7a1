package testengines

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// ProgramEnv names the variable with the path of the devstack program. The program runs
// the engines. `make test` sets the variable. If it is not set, the suite builds the
// program.
const ProgramEnv = "DIEHARD_DEVSTACK_BIN"

// program returns the path of the devstack program. The program has its own module. The
// product's module therefore depends neither on the engines nor on their download.
var program = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(ProgramEnv); path != "" {
		return path, nil
	}
	root, err := Repository()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, "bin", "devstack")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", path, "./cmd/devstack") //nolint:gosec // our own program; takes seconds
	build.Dir = filepath.Join(root, "tools", "devstack")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if output, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the devstack program (or set %s): %w\n%s", ProgramEnv, err, output)
	}
	return path, nil
})

// Repository returns the folder of the repository that contains the working
// directory.
func Repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "tools", "devstack", "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("tools/devstack not found in a parent folder: set " + ProgramEnv)
		}
		dir = parent
	}
}

// process is a server that the devstack program runs. The program watches a
// pipe and ends when the test process ends, even after a crash.
type process struct {
	args, env []string

	cmd       *exec.Cmd
	hold      io.Closer // the write end of the pipe
	log       tail
	addresses map[string]string
}

// start runs the program and waits until the server accepts connections.
func (p *process) start(ctx context.Context) error {
	path, err := program()
	if err != nil {
		return err
	}
	p.cmd = exec.Command(path, append(slices.Clone(p.args), "--attached")...) //nolint:gosec,noctx // our own program; ends with the test process
	p.cmd.Env = append(os.Environ(), p.env...)
	p.cmd.Stderr = &p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C reaches only the test process, which then stops the program
	hold, err := p.cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.hold = hold
	stop := context.AfterFunc(ctx, func() { _ = hold.Close() })
	defer stop()
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		_ = p.cmd.Wait()
		return fmt.Errorf("devstack %s ended: %s", p.args[0], p.log.String())
	}
	return json.Unmarshal(line, &p.addresses)
}

// end sends the signal and waits for the program's end.
func (p *process) end(signal os.Signal) error {
	if p.cmd == nil || p.cmd.ProcessState != nil {
		return nil
	}
	_ = p.cmd.Process.Signal(signal) // the program may have ended
	err := p.cmd.Wait()
	_ = p.hold.Close()
	if err != nil {
		return fmt.Errorf("devstack %s: %w: %s", p.args[0], err, p.log.String())
	}
	return nil
}

// tail keeps the end of the written text.
type tail struct {
	mu   sync.Mutex
	text []byte
}

// Write implements io.Writer.
func (t *tail) Write(text []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	const most = 4 << 10
	t.text = append(t.text, text...)
	if len(t.text) > most {
		t.text = bytes.Clone(t.text[len(t.text)-most:])
	}
	return len(text), nil
}

// String returns the kept text.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.text))
}
