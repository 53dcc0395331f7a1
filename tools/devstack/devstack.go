// Package devstack runs a private PostgreSQL and the real ClickHouse engine
// without Docker and without an installation, for `make run` and for tests.
//
// The engines are fetched on first use and kept in the user's cache. Each runs
// in a process of its own that ends with the process that started it, however
// that ends.
package devstack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/filelock"
)

// ProgramEnv names the devstack program. A process that is not itself the
// program, and has it not set, builds it once.
const ProgramEnv = "DIEHARD_DEVSTACK_BIN"

// Program is the import path of the devstack program.
const programPackage = "github.com/diehard-outbox/diehard/tools/devstack/cmd/devstack"

// loopback is the only address that the engines listen on.
const loopback = "127.0.0.1"

// program is the path of the devstack program, which supervises the engines.
var program = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(ProgramEnv); path != "" {
		path, err := filepath.Abs(path)
		if err == nil {
			_, err = os.Stat(path)
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", ProgramEnv, err)
		}
		return path, nil
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Path == programPackage {
		return os.Executable()
	}
	return build()
})

// build builds the program into the user's cache. The go command leaves an
// executable alone that is up to date.
func build() (string, error) {
	cache, err := engines.CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "bin")
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // programs, readable like others
		return "", fmt.Errorf("build the devstack program: %w", err)
	}
	unlock, err := filelock.Lock(context.Background(), filepath.Join(dir, "devstack.lock"))
	if err != nil {
		return "", fmt.Errorf("build the devstack program: %w", err)
	}
	defer unlock()
	path := filepath.Join(dir, "devstack")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", path, programPackage) //nolint:gosec,noctx // our own program; seconds
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the devstack program (or set %s): %w\n%s", ProgramEnv, err, strings.TrimSpace(string(out)))
	}
	return path, nil
}

// portTries is how often another free port is tried when somebody was faster.
const portTries = 10

// The signals that end a process, from the polite one on, by what they mean to
// PostgreSQL: https://www.postgresql.org/docs/current/server-shutdown.html
const (
	fastShutdown      = syscall.SIGINT
	immediateShutdown = syscall.SIGQUIT
)
