package relay

import "context"

// checkPause logs the changes of the fleet's pause.
func (r *Relay) checkPause(ctx context.Context) {
	pause := r.o.Store.Paused()
	switch changed := r.pause.to(pause != nil); {
	case changed && pause != nil:
		r.log.WarnContext(ctx, "fleet paused", "since", pause.At, "by", pause.By, "hint", "relay resume ends the pause")
	case changed:
		r.log.InfoContext(ctx, "fleet resumed")
	}
}
