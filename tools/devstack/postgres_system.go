package devstack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
)

const (
	oldestVersion        = 15
	builtinLocaleVersion = 17 // https://www.postgresql.org/docs/17/release-17.html
)

// systemLocale is a UTF-8 locale that exists on every installation.
var systemLocale = map[bool]string{true: "en_US.UTF-8", false: "C.UTF-8"}[runtime.GOOS == "darwin"]

var versionNumber = regexp.MustCompile(`^postgres \(PostgreSQL\) (\d+)`)

// postgresVersion returns the major version of the programs in a folder.
func postgresVersion(ctx context.Context, bin string) (int, error) {
	if _, err := os.Stat(filepath.Join(bin, "initdb")); err != nil { //nolint:gosec // the developer's own choice
		return 0, err //nolint:wrapcheck // the error names the program
	}
	path := filepath.Join(bin, "postgres")
	out, err := exec.CommandContext(ctx, path, "--version").Output() //nolint:gosec // the developer's own choice
	if err != nil {
		return 0, fmt.Errorf("read the version of %s: %w", path, err)
	}
	number := versionNumber.FindSubmatch(out)
	if number == nil {
		return 0, fmt.Errorf("%s is not a PostgreSQL server: %q", path, strings.TrimSpace(string(out)))
	}
	return strconv.Atoi(string(number[1])) //nolint:wrapcheck // digits only
}

// serverUser returns the user that the server of a data folder runs as. If the user is
// nil, the server runs as the caller. PostgreSQL refuses to run as root.
func serverUser(dataDir string) (*supervisor.User, error) {
	if os.Geteuid() != 0 {
		return nil, nil //nolint:nilnil // documented
	}
	if info, err := os.Stat(filepath.Join(dataDir, "PG_VERSION")); err == nil {
		if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 {
			return &supervisor.User{UID: owner.Uid, GID: owner.Gid}, nil
		}
	}
	// The user must be in the system's list of users, because PostgreSQL looks
	// it up.
	nobody, err := user.Lookup("nobody")
	if err != nil {
		return nil, fmt.Errorf("find a user other than root for the server: %w", err)
	}
	uid, uidErr := strconv.ParseUint(nobody.Uid, 10, 32)
	gid, gidErr := strconv.ParseUint(nobody.Gid, 10, 32)
	if err := errors.Join(uidErr, gidErr); err != nil {
		return nil, fmt.Errorf("find a user other than root for the server: %w", err)
	}
	return &supervisor.User{UID: uint32(uid), GID: uint32(gid)}, nil
}

// dataArg returns the data folder as the server's argument. The data folder is
// also the server's working directory. Another user may not be able to pass
// through the folders above it, for example through root's home. On Linux, a path in
// /proc names the working directory and does not need the folders above it.
func (p *Postgres) dataArg(dir string) string {
	if p.user != nil && runtime.GOOS == "linux" {
		return "/proc/self/cwd"
	}
	return dir
}

// processName returns the name of a running process's program, or "".
func processName(ctx context.Context, pid int) string {
	if runtime.GOOS == "linux" { // a small image may lack ps
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(name))
	}
	out, err := exec.CommandContext(ctx, "ps", "-o", "comm=", "-p", strconv.Itoa(pid)).Output() //nolint:gosec // a number
	if err != nil {
		return ""
	}
	return filepath.Base(strings.TrimSpace(string(out)))
}
