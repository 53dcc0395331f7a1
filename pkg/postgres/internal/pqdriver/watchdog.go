package pqdriver

import (
	"context"
	"time"
)

// cancelGrace is how long the server has to answer after the context of a statement
// has ended.
const cancelGrace = time.Second

// watchdog closes a connection whose server stays silent after the context of the
// connection's user has ended. lib/pq asks the server to cancel the statement, and
// waits for the answer without a limit: https://github.com/lib/pq/issues/620.
type watchdog struct {
	// alive ends when the connection is abandoned, which closes its sockets.
	alive   context.Context //nolint:containedctx // the dialer's
	abandon context.CancelFunc
	// stop ends the watch. It is nil if no context is watched.
	stop func()
}

// watch abandons the connection some time after ctx has ended, unless the connection
// is released before. Of the contexts that are used between two releases the first
// counts: that of the transaction, or of the only statement.
func (w *watchdog) watch(ctx context.Context) {
	if w.stop != nil {
		return
	}
	released, done := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		select {
		case <-released:
		case <-time.After(cancelGrace):
			w.abandon()
		}
	})
	w.stop = func() {
		close(released)
		if !stop() {
			<-done
		}
	}
}

// release ends the watch. Afterwards the connection is no longer abandoned because of
// a context that was watched.
func (w *watchdog) release() {
	if w.stop != nil {
		w.stop()
		w.stop = nil
	}
}

// abandoned reports whether the connection was abandoned.
func (w *watchdog) abandoned() bool { return w.alive.Err() != nil }
