package pqdriver

import (
	"context"
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

// NewListener returns a listener whose connection is closed when ctx is canceled,
// even if the listener waits for the server. The only error is as NewConnector's.
func NewListener(ctx context.Context, o ListenerOptions) (*pq.Listener, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	return pq.NewDialListener(dialer{abort: ctx}, dsn, o.MinReconnect, o.MaxReconnect, o.Event), nil
}
