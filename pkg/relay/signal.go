package relay

import (
	"context"
	"time"
)

// signal wakes as many of its waiters as it was sent times; what nobody waits
// for is kept up to its capacity.
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
