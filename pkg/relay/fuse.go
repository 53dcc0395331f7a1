package relay

import "context"

// checkFuse logs the changes of the fleet's fuse.
func (r *Relay) checkFuse(ctx context.Context) {
	err := r.o.Store.Fuse()
	switch changed := r.fuse.to(err != nil); {
	case changed && err != nil:
		r.log.ErrorContext(ctx, "fuse of dead letters blown", "err", err)
	case changed:
		r.log.InfoContext(ctx, "fuse of dead letters mended")
	}
}
