package engines

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/filelock"
)

// publish copies a folder, unless it was copied before, and makes it readable for every
// user.
func publish(ctx context.Context, from, to string) (string, error) {
	if checkManifest(to, false) == nil {
		return to, nil
	}
	parent := filepath.Dir(to)
	if err := os.MkdirAll(parent, 0o755); err != nil { //nolint:gosec // readable for every user
		return "", err //nolint:wrapcheck // the error names the folder
	}
	unlock, err := filelock.Lock(ctx, to+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if checkManifest(to, false) == nil {
		return to, nil // another process has copied it
	}
	staging := to + ".new"
	for _, dir := range []string{to, staging} {
		if err := os.RemoveAll(dir); err != nil {
			return "", err //nolint:wrapcheck // the error names the folder
		}
	}
	defer func() { _ = os.RemoveAll(staging) }()
	if err := os.CopyFS(staging, os.DirFS(from)); err != nil {
		return "", err //nolint:wrapcheck // the error names the file
	}
	if err := openToAll(staging); err != nil {
		return "", err
	}
	if err := writeManifest(staging); err != nil {
		return "", err
	}
	if err := os.Rename(staging, to); err != nil {
		return "", err //nolint:wrapcheck // the error names the folders
	}
	return to, nil
}

// openToAll makes the files readable for every user, independent of the owner's umask.
func openToAll(dir string) error {
	for _, up := range []string{filepath.Dir(filepath.Dir(dir)), filepath.Dir(dir)} {
		if err := os.Chmod(up, 0o755); err != nil { //nolint:gosec // readable for every user
			return err //nolint:wrapcheck // the error names the folder
		}
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { //nolint:wrapcheck // an error of the function
		if err != nil || d.Type()&fs.ModeSymlink != 0 {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err //nolint:wrapcheck // the error names the file
		}
		mode := info.Mode().Perm() | 0o444
		if mode&0o100 != 0 {
			mode |= 0o111
		}
		return os.Chmod(path, mode)
	})
}
