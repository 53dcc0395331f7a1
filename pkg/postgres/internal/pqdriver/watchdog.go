package pqdriver

import (
	"context"
	"time"
)

// cancelGrace is how long the server may take to reply after the context of a statement
// ends.
const cancelGrace = time.Second

// watchdog closes a connection if the server does not reply after the caller's context
// ends. lib/pq asks the server to cancel the statement and waits for the reply without
// a limit: https://github.com/lib/pq/issues/620. TCP does not detect a server process
// that hangs, because the kernel of its machine still acknowledges data.
type watchdog struct {
	// alive ends when the connection is abandoned. The dialer then closes its sockets.
	alive   context.Context //nolint:containedctx // shared with the dialer
	abandon context.CancelFunc
	// stop stops watching the context. It is nil if no context is watched.
	stop func()
}

// watch abandons the connection cancelGrace after ctx ends, unless the connection is
// released first. Until the next release, only the first call has an effect. That call
// has the context of the transaction, or of a statement outside of a transaction.
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

// release stops watching the context. After release returns, the end of that context
// has no effect on the connection.
func (w *watchdog) release() {
	if w.stop != nil {
		w.stop()
		w.stop = nil
	}
}

// abandoned reports whether the connection was abandoned.
func (w *watchdog) abandoned() bool { return w.alive.Err() != nil }
