package engines

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

var errNoNPM = errors.New("npm is missing: install Node.js from https://nodejs.org or with your package manager (Debian: apt install npm)")

// install downloads into a staging folder beside in.dir and moves it into place
// in one step. The caller holds the lock.
func (g group) install(ctx context.Context, in installed, progress io.Writer) error {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return errNoNPM
	}
	// Remove the leftovers of killed installations. The lock excludes running
	// installations.
	leftovers, err := filepath.Glob(in.dir + ".new-*")
	if err != nil {
		return err //nolint:wrapcheck // fails only for an invalid pattern
	}
	for _, dir := range append(leftovers, in.dir) {
		if err := os.RemoveAll(dir); err != nil {
			return err //nolint:wrapcheck // the error names the folder
		}
	}
	staging, err := os.MkdirTemp(filepath.Dir(in.dir), filepath.Base(in.dir)+".new-")
	if err != nil {
		return err //nolint:wrapcheck // the error names the folder
	}
	defer func() { _ = os.RemoveAll(staging) }()
	if err := os.Chmod(staging, 0o755); err != nil { //nolint:gosec // programs are readable for all users
		return err //nolint:wrapcheck // the error names the folder
	}

	if err := writePackageFiles(staging, in.packages); err != nil {
		return err
	}
	watched := watchDownload(progress, g.name, staging, expectedBytes(in.packages))
	err = g.download(ctx, npm, staging, in.packages)
	watched.finish(err == nil)
	if err != nil {
		return err
	}
	if err := writeManifest(staging); err != nil {
		return fmt.Errorf("record the installed files: %w", err)
	}
	return os.Rename(staging, in.dir) //nolint:wrapcheck // the error names both paths
}

// download fills the staging folder.
func (g group) download(ctx context.Context, npm, staging string, packages map[string]lockPkg) error {
	if err := runNPM(ctx, npm, staging); err != nil {
		return err
	}
	for name := range packages {
		if err := g.complete(filepath.Join(staging, filepath.FromSlash(modules+name))); err != nil {
			return fmt.Errorf("complete %s: %w", name, err)
		}
	}
	return nil
}

// writePackageFiles writes the pinned files for the packages of this platform. It makes
// every package required. npm would silently skip an optional package whose download or
// check fails.
func writePackageFiles(dir string, packages map[string]lockPkg) error {
	dependencies := map[string]string{}
	locked := map[string]any{}
	for name, pkg := range packages {
		dependencies[name] = pkg.Version
		locked[modules+name] = pkg
	}
	root := map[string]any{"name": "diehard-devstack-engines", "private": true, "dependencies": dependencies}
	locked[""] = root
	for name, content := range map[string]any{
		"package.json":      root,
		"package-lock.json": map[string]any{"lockfileVersion": 3, "requires": true, "packages": locked},
	} {
		encoded, err := json.MarshalIndent(content, "", "  ")
		if err != nil {
			return err //nolint:wrapcheck // cannot fail with these types
		}
		if err := os.WriteFile(filepath.Join(dir, name), encoded, 0o644); err != nil { //nolint:gosec // not a secret
			return err //nolint:wrapcheck // the error names the file
		}
	}
	return nil
}

func runNPM(ctx context.Context, npm, dir string) error {
	var out bytes.Buffer
	p := thisPlatform()
	cmd := exec.CommandContext(ctx, npm, "ci", //nolint:gosec // the npm in PATH
		"--ignore-scripts", // group.complete does the work of the packages' scripts
		"--omit-lockfile-registry-resolved",
		"--os="+p.os, "--cpu="+p.cpu, // Node.js may be built for another CPU: x64 under Rosetta
		"--no-audit", "--no-fund", "--no-update-notifier", "--no-progress", "--loglevel=error")
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	// npm gets its own process group, so that Ctrl-C reaches only this process. This
	// process then stops npm.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := cmd.Run()
	if ctx.Err() != nil {
		return context.Cause(ctx) //nolint:wrapcheck // the caller's own error
	}
	if err != nil {
		return fmt.Errorf("npm ci: %w\n%s", err, strings.TrimSpace(out.String()))
	}
	return nil
}

// restoreSymlinks creates the symbolic links that PostgreSQL's install script
// would create. An npm package cannot contain them.
func restoreSymlinks(dir string) error {
	list, err := os.ReadFile(filepath.Join(dir, "native", "pg-symlinks.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	var links []struct {
		Source string `json:"source"` // the link's target
		Target string `json:"target"` // the link's path
	}
	if err := json.Unmarshal(list, &links); err != nil {
		return err //nolint:wrapcheck // the caller names the package
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err //nolint:wrapcheck // the error names the folder
	}
	defer func() { _ = root.Close() }()
	for _, link := range links {
		to, err := filepath.Rel(filepath.Dir(link.Target), link.Source)
		if err != nil {
			return err //nolint:wrapcheck // the error names both paths
		}
		if err := root.Symlink(to, link.Target); err != nil && !errors.Is(err, os.ErrExist) {
			return err //nolint:wrapcheck // the error names both paths
		}
	}
	return nil
}
