package relay

import (
	"context"
	"sync"
)

// pauseLog logs the changes of the fleet's pause.
type pauseLog struct {
	mu     sync.Mutex
	paused bool
}

func (r *Relay) checkPause(ctx context.Context) {
	pause := r.o.Store.Paused()
	r.pause.mu.Lock()
	defer r.pause.mu.Unlock()
	switch {
	case pause != nil && !r.pause.paused:
		r.log.WarnContext(ctx, "fleet paused", "since", pause.At, "by", pause.By, "hint", "relay resume ends the pause")
	case pause == nil && r.pause.paused:
		r.log.InfoContext(ctx, "fleet resumed")
	}
	r.pause.paused = pause != nil
}
