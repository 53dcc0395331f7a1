package pqdriver

import (
	"context"
	"sync"
	"time"

	"github.com/lib/pq"
)

// ListenerOptions configures a listener.
type ListenerOptions struct {
	// DSN and ApplicationName are as in Options.
	DSN, ApplicationName string
	// MinReconnect and MaxReconnect are the bounds of the pause between attempts to
	// connect. The pause doubles after each attempt.
	MinReconnect, MaxReconnect time.Duration
	// Event is called by one goroutine when the state of the connection changes.
	Event pq.EventCallbackType
}

// Listener is a pq.Listener that closes when a context ends and pings in the background.
type Listener struct {
	*pq.Listener

	pinging sync.Mutex
}

// NewListener returns a listener. It closes the listener when ctx ends, even while the
// listener waits for the server. It returns an error if the DSN is invalid.
func NewListener(ctx context.Context, o ListenerOptions) (*Listener, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	l := &Listener{Listener: pq.NewDialListener(dialer{abort: ctx}, dsn, o.MinReconnect, o.MaxReconnect, o.Event)}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	return l, nil
}

// Ping pings the server without waiting for the reply. If the connection is lost, the
// listener reconnects. While a ping waits for its reply, further calls of Ping do
// nothing.
//
// Ping of lib/pq waits for the reply. That call deadlocks if the calling goroutine also
// receives the notifications: https://github.com/lib/pq/issues/1178.
func (l *Listener) Ping() {
	if !l.pinging.TryLock() {
		return
	}
	go func() {
		defer l.pinging.Unlock()
		_ = l.Listener.Ping() // an error makes the listener reconnect
	}()
}
