// Package devstack runs a private PostgreSQL and the real ClickHouse engine for
// development and tests. It needs neither Docker nor an installation.
//
// The first use downloads the engines into the user's cache. Each engine runs in a
// process of its own. That process ends when the caller's process ends, even after a
// crash.
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

// ProgramEnv names the variable with the path of the devstack program. If it is
// not set, the package builds the program once.
const ProgramEnv = "DIEHARD_DEVSTACK_BIN"

// programPackage is the import path of the devstack program.
const programPackage = "github.com/diehard-outbox/diehard/tools/devstack/cmd/devstack"

// loopback is the only address that the engines listen on.
const loopback = "127.0.0.1"

// program returns the path of the devstack program, which supervises the
// engines.
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

// build builds the program into the user's cache. The go command does not
// rebuild an executable that is up to date.
func build() (string, error) {
	cache, err := engines.CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "bin")
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // programs are readable for all users
		return "", fmt.Errorf("build the devstack program: %w", err)
	}
	unlock, err := filelock.Lock(context.Background(), filepath.Join(dir, "devstack.lock"))
	if err != nil {
		return "", fmt.Errorf("build the devstack program: %w", err)
	}
	defer unlock()
	path := filepath.Join(dir, "devstack")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", path, programPackage) //nolint:gosec,noctx // our own program; takes seconds
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the devstack program (or set %s): %w\n%s", ProgramEnv, err, strings.TrimSpace(string(out)))
	}
	return path, nil
}

// portTries limits the number of free ports that are tried. Another process may take a
// free port before the server listens.
const portTries = 10

// The signals that end a process, from the gentlest to the hardest. The names
// are PostgreSQL's:
// https://www.postgresql.org/docs/current/server-shutdown.html
const (
	fastShutdown      = syscall.SIGINT
	immediateShutdown = syscall.SIGQUIT
)
