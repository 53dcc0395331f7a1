package engines

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/filelock"
)

// PgBouncerEnv names the variable with the path of the developer's own PgBouncer.
const PgBouncerEnv = "DIEHARD_PGBOUNCER"

// pgBouncerScript starts the program with its own libraries.
const pgBouncerScript = `#!/bin/sh
dir=$(cd "$(dirname "$0")" && pwd) || exit
export LD_LIBRARY_PATH="$(echo "$dir"/usr/lib/*-linux-gnu)"
exec "$dir/usr/sbin/pgbouncer" "$@"
`

// PgBouncer returns the path of PgBouncer: the program that PgBouncerEnv names, an
// installed program, or the program of Debian's or Ubuntu's package, which it downloads
// into the cache without installing it. apt checks the signatures of the packages.
func PgBouncer(ctx context.Context, o Options) (string, error) {
	if name := os.Getenv(PgBouncerEnv); name != "" {
		own, err := exec.LookPath(name)
		if err != nil {
			return "", fmt.Errorf("%s: %w", PgBouncerEnv, err)
		}
		return own, nil
	}
	for _, name := range []string{"pgbouncer", "/usr/sbin/pgbouncer"} {
		if installed, err := exec.LookPath(name); err == nil {
			return installed, nil
		}
	}
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", fmt.Errorf("no PgBouncer was found, and no apt to download it: install it with your package manager, or set %s to its path", PgBouncerEnv)
		}
	}
	cache := o.CacheDir
	if cache == "" {
		var err error
		if cache, err = CacheDir(); err != nil {
			return "", err
		}
	}
	if os.Geteuid() == 0 { // PgBouncer refuses to run as root, and another user cannot read root's home
		cache = filepath.Dir(publicDir)
	}
	dir := filepath.Join(cache, "pgbouncer", thisPlatform().String())
	script := filepath.Join(dir, "pgbouncer.sh")
	if _, err := os.Stat(script); err == nil {
		return script, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil { //nolint:gosec // programs are readable for all users
		return "", fmt.Errorf("create the cache folder: %w", err)
	}
	unlock, err := filelock.Lock(ctx, dir+".lock")
	if err != nil {
		return "", fmt.Errorf("lock the cache folder: %w", err)
	}
	defer unlock()
	if _, err := os.Stat(script); err == nil {
		return script, nil // another process has downloaded it
	}
	if err := downloadPgBouncer(ctx, dir); err != nil {
		return "", fmt.Errorf("download PgBouncer with apt (or set %s to its path): %w", PgBouncerEnv, err)
	}
	return script, nil
}

// downloadPgBouncer fills dir in one step. The caller holds the lock.
func downloadPgBouncer(ctx context.Context, dir string) error {
	staging := dir + ".new"
	for _, folder := range []string{staging, dir} { // of a download that was interrupted
		if err := os.RemoveAll(folder); err != nil {
			return err //nolint:wrapcheck // the error names the folder
		}
	}
	if err := os.Mkdir(staging, 0o755); err != nil { //nolint:gosec // readable for all users
		return err //nolint:wrapcheck // the error names the folder
	}
	defer func() { _ = os.RemoveAll(staging) }()
	depends, err := output(ctx, staging, "apt-cache", "depends", "pgbouncer")
	if err != nil {
		return err
	}
	packages := []string{"pgbouncer"}
	for lines := bufio.NewScanner(bytes.NewReader(depends)); lines.Scan(); {
		// The other libraries are part of every installation.
		if name, ok := strings.CutPrefix(strings.TrimSpace(lines.Text()), "Depends: "); ok &&
			(strings.HasPrefix(name, "libevent") || strings.HasPrefix(name, "libc-ares") || strings.HasPrefix(name, "libcares")) {
			packages = append(packages, name)
		}
	}
	if _, err := output(ctx, staging, "apt-get", append([]string{"download", "--quiet"}, packages...)...); err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(staging, "*.deb"))
	if err != nil || len(archives) != len(packages) {
		return errors.Join(err, fmt.Errorf("apt-get has downloaded %d of %d packages", len(archives), len(packages)))
	}
	for _, archive := range archives {
		if _, err := output(ctx, staging, "dpkg-deb", "--extract", archive, staging); err != nil {
			return err
		}
		if err := os.Remove(archive); err != nil {
			return err //nolint:wrapcheck // the error names the file
		}
	}
	if err := os.WriteFile(filepath.Join(staging, "pgbouncer.sh"), []byte(pgBouncerScript), 0o755); err != nil { //nolint:gosec // a program
		return err //nolint:wrapcheck // the error names the file
	}
	if err := openToAll(staging); err != nil {
		return err
	}
	return os.Rename(staging, dir) //nolint:wrapcheck // the error names the folders
}

func output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // constant programs
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}
