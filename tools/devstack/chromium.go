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

// Chromium returns the path of a Chromium: the one that DIEHARD_CHROMIUM names,
// an installed one, or the pinned one, which is fetched if need be. The pinned
// one has no window; there is one for Linux on x64 only.
//
// The devstack program does the work: a caller with the race detector would take
// minutes to unpack the browser.
func Chromium(ctx context.Context) (string, error) {
	path, err := program()
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, "chromium") //nolint:gosec // our own program
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it stops npm
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return "", context.Cause(ctx) //nolint:wrapcheck // the caller's own
	}
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		_, reason, _ := strings.Cut(stderr.String(), "devstack: ") // after what it says of the download
		return "", errors.New(strings.TrimSpace(reason))
	}
	if err != nil {
		return "", fmt.Errorf("run the devstack program: %w", err)
	}
	return strings.TrimSpace(stdout.String()), nil
}
