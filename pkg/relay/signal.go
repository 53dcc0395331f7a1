package relay

import (
	"context"
	"time"
)

// signal wakes one waiter for each send. Its capacity bounds the signals that are kept
// while no goroutine waits.
type signal chan struct{}

func (s signal) send(times int) {
	for range times {
		select {
		case s <- struct{}{}:
		default:
			return
		}
	}
}

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
