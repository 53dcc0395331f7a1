package devstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Chromium returns the path of a Chromium browser: the browser that DIEHARD_CHROMIUM
// names, an installed browser, or the pinned browser. It downloads the pinned browser if
// the cache lacks it. The pinned browser is headless and exists only for Linux on x64.
//
// The devstack program does the work, because unpacking the browser takes
// minutes in a process built with the race detector.
func Chromium(ctx context.Context) (string, error) { return fetched(ctx, "chromium") }

// Axe returns the path of the script axe-core, which checks a page in a browser for
// accessibility. It downloads the script if the cache lacks it.
func Axe(ctx context.Context) (string, error) { return fetched(ctx, "axe") }

// fetched runs a command of the devstack program that prints a path.
func fetched(ctx context.Context, command string) (string, error) {
	path, err := program()
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, command) //nolint:gosec // our own program
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // the program stops npm
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return "", context.Cause(ctx) //nolint:wrapcheck // the caller's own error
	}
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		_, reason, _ := strings.Cut(stderr.String(), "devstack: ") // the reason follows the lines about the download
		return "", errors.New(strings.TrimSpace(reason))
	}
	if err != nil {
		return "", fmt.Errorf("run the devstack program: %w", err)
	}
	return strings.TrimSpace(stdout.String()), nil
}
