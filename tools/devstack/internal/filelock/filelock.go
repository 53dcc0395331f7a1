// Package filelock keeps processes out of each other's way. The kernel gives a
// lock back when its process ends, however it ends.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// ErrHeld says that another process holds the lock.
var ErrHeld = errors.New("another process holds the lock")

const poll = 100 * time.Millisecond

// Lock takes the lock of a file, which it makes, and waits while another
// process holds it.
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
			return nil, context.Cause(ctx) //nolint:wrapcheck // the caller's own
		}
	}
}

// TryLock takes the lock of a file, which it makes, or fails with ErrHeld.
func TryLock(path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // it stays empty
	if err != nil {
		return nil, err //nolint:wrapcheck // names the file already
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
