package pqdriver

import (
	"context"
	"sync"
	"time"

	"github.com/lib/pq"
)

// ListenerOptions configure a listener.
type ListenerOptions struct {
	// DSN and ApplicationName are as in Options.
	DSN, ApplicationName string
	// MinReconnect and MaxReconnect bound the pause between two attempts to connect,
	// which doubles.
	MinReconnect, MaxReconnect time.Duration
	// Event is called when the state of the connection changes, in one goroutine.
	Event pq.EventCallbackType
}

// Listener is a pq.Listener that ends with a context and that pings in the background.
type Listener struct {
	*pq.Listener

	pinging sync.Mutex
}

// NewListener returns a listener that is closed when ctx ends, whatever it waits for.
// The only error is as NewConnector's.
func NewListener(ctx context.Context, o ListenerOptions) (*Listener, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	l := &Listener{Listener: pq.NewDialListener(dialer{abort: ctx}, dsn, o.MinReconnect, o.MaxReconnect, o.Event)}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	return l, nil
}

// Ping asks the server for an answer and returns at once. If the connection is lost,
// the listener reconnects. While one ping waits for its answer, another does nothing.
//
// Ping of lib/pq waits for the answer, and forever if the goroutine that calls it also
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
