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

var errNoNPM = errors.New("npm is missing: get Node.js from https://nodejs.org or your package manager (Debian: apt install npm)")

// install downloads into a staging folder beside in.dir and puts it in place in
// one step. The caller holds the lock.
func (g group) install(ctx context.Context, in installed, progress io.Writer) error {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return errNoNPM
	}
	// What an installation that was killed has left. Nobody else is at it.
	leftovers, err := filepath.Glob(in.dir + ".new-*")
	if err != nil {
		return err //nolint:wrapcheck // a bad pattern, which it is not
	}
	for _, dir := range append(leftovers, in.dir) {
		if err := os.RemoveAll(dir); err != nil {
			return err //nolint:wrapcheck // names the folder already
		}
	}
	staging, err := os.MkdirTemp(filepath.Dir(in.dir), filepath.Base(in.dir)+".new-")
	if err != nil {
		return err //nolint:wrapcheck // names the folder already
	}
	defer func() { _ = os.RemoveAll(staging) }()
	if err := os.Chmod(staging, 0o755); err != nil { //nolint:gosec // programs, readable like others
		return err //nolint:wrapcheck // names the folder already
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
		return fmt.Errorf("record what was installed: %w", err)
	}
	return os.Rename(staging, in.dir) //nolint:wrapcheck // names both already
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

// writePackageFiles writes the part of the pinned files that is for this
// platform, with every package required: what npm takes for optional it leaves
// out in silence when it cannot be downloaded or fails its check.
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
			return err //nolint:wrapcheck // cannot happen with these types
		}
		if err := os.WriteFile(filepath.Join(dir, name), encoded, 0o644); err != nil { //nolint:gosec // no secret
			return err //nolint:wrapcheck // names the file already
		}
	}
	return nil
}

func runNPM(ctx context.Context, npm, dir string) error {
	var out bytes.Buffer
	p := thisPlatform()
	cmd := exec.CommandContext(ctx, npm, "ci", //nolint:gosec // the npm of the PATH
		"--ignore-scripts", // and group.complete does what theirs would
		"--omit-lockfile-registry-resolved",
		"--os="+p.os, "--cpu="+p.cpu, // Node.js may be built for another: x64 under Rosetta
		"--no-audit", "--no-fund", "--no-update-notifier", "--no-progress", "--loglevel=error")
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	// A group of its own: Ctrl-C goes to us, and we tell npm.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := cmd.Run()
	if ctx.Err() != nil {
		return context.Cause(ctx) //nolint:wrapcheck // the caller's own
	}
	if err != nil {
		return fmt.Errorf("npm ci: %w\n%s", err, strings.TrimSpace(out.String()))
	}
	return nil
}

// restoreSymlinks makes the links that an npm package cannot hold and that
// PostgreSQL's install script would make.
func restoreSymlinks(dir string) error {
	list, err := os.ReadFile(filepath.Join(dir, "native", "pg-symlinks.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err //nolint:wrapcheck // names the file already
	}
	var links []struct {
		Source string `json:"source"` // what the link points to
		Target string `json:"target"` // where the link is
	}
	if err := json.Unmarshal(list, &links); err != nil {
		return err //nolint:wrapcheck // the caller names the package
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err //nolint:wrapcheck // names the folder already
	}
	defer func() { _ = root.Close() }()
	for _, link := range links {
		to, err := filepath.Rel(filepath.Dir(link.Target), link.Source)
		if err != nil {
			return err //nolint:wrapcheck // names both already
		}
		if err := root.Symlink(to, link.Target); err != nil && !errors.Is(err, os.ErrExist) {
			return err //nolint:wrapcheck // names both already
		}
	}
	return nil
}
