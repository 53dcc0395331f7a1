// Package filelock locks a file against other processes. The kernel releases
// the lock when the process ends, even after a crash.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// ErrHeld reports that another process holds the lock.
var ErrHeld = errors.New("another process holds the lock")

const poll = 100 * time.Millisecond

// Lock takes the lock of a file. It creates the file if missing. It waits while another
// process holds the lock.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	for {
		unlock, err := TryLock(path)
		if !errors.Is(err, ErrHeld) {
			return unlock, err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx) //nolint:wrapcheck // the caller's own error
		}
	}
}

// TryLock takes the lock of a file. It creates the file if missing. It returns ErrHeld if
// another process holds the lock.
func TryLock(path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // the file stays empty
	if err != nil {
		return nil, err //nolint:wrapcheck // the error names the file
	}
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return func() { _ = file.Close() }, nil
	}
	_ = file.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) || errors.Is(err, syscall.EINTR) {
		return nil, ErrHeld
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}
