package relay

import (
	"context"
	"sync"
)

// fuse logs the changes of the fleet's fuse.
type fuse struct {
	mu    sync.Mutex
	blown bool
}

func (r *Relay) checkFuse(ctx context.Context) {
	err := r.o.Store.Fuse()
	r.fuse.mu.Lock()
	defer r.fuse.mu.Unlock()
	switch {
	case err != nil && !r.fuse.blown:
		r.log.ErrorContext(ctx, "fuse of dead letters blown", "err", err)
	case err == nil && r.fuse.blown:
		r.log.InfoContext(ctx, "fuse of dead letters mended")
	}
	r.fuse.blown = err != nil
}
