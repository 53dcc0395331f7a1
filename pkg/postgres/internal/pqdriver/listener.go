package pqdriver

import (
	"context"
	"database/sql/driver"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/lib/pq"
)

// ListenerOptions configures a listener.
type ListenerOptions struct {
	// DSN, PasswordFile and ApplicationName are as in Options.
	DSN, PasswordFile, ApplicationName string
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
// listener waits for the server. It also closes it if an attempt to connect fails and the
// file has another password by then: lib/pq would try the old one again and again. It
// returns an error if the DSN is invalid, or if the password cannot be read.
func NewListener(ctx context.Context, o ListenerOptions) (*Listener, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	complete, err := withPassword(dsn, o.PasswordFile)
	if err != nil {
		return nil, err
	}
	ctx, end := context.WithCancel(ctx)
	l := &Listener{Listener: pq.NewDialListener(dialer{abort: ctx}, complete, o.MinReconnect, o.MaxReconnect, func(event pq.ListenerEventType, err error) {
		o.Event(event, err)
		if event != pq.ListenerEventConnectionAttemptFailed {
			return
		}
		if now, err := withPassword(dsn, o.PasswordFile); err == nil && now != complete {
			end()
		}
	})}
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

// IsPooled returns whether the DSN leads to a pooler that may share sessions among clients.
func IsPooled(ctx context.Context, o Options) (bool, error) {
	c, end, err := connectOnce(ctx, o)
	if err != nil {
		return false, err
	}
	defer end()
	own, err := c.session.isOwn(context.WithoutCancel(ctx))
	return !own, err
}

// connectOnce returns a connection and a function that closes it. At the end of ctx the
// socket is closed. The statements of the caller must not end with ctx: lib/pq would send a
// cancel request, which could bring a pooler down.
func connectOnce(ctx context.Context, o Options) (c *conn, end func(), err error) {
	connector, err := NewConnector(o)
	if err != nil {
		return nil, nil, err
	}
	connected, err := connector.Connect(ctx)
	if err != nil {
		return nil, nil, err //nolint:wrapcheck // an error of this package
	}
	c = connected.(*conn) //nolint:forcetypeassert // a connection of this package
	watched := context.AfterFunc(ctx, c.watchdog.abandon)
	return c, func() {
		watched()
		_ = c.Close()
	}, nil
}

// IdleTimeout returns the idle_session_timeout of new sessions, or 0 if they have none. A
// listener cannot set it: lib/pq offers no way to execute SET on its connection
// (https://github.com/lib/pq/blob/v1.12.3/notify.go#L527), and poolers refuse it as a
// startup parameter.
func IdleTimeout(ctx context.Context, o Options) (time.Duration, error) {
	c, end, err := connectOnce(ctx, o)
	if err != nil {
		return 0, err
	}
	defer end()
	rows, err := c.QueryContext(context.WithoutCancel(ctx), "SELECT setting::bigint FROM pg_settings WHERE name = 'idle_session_timeout'", nil)
	if err != nil {
		return 0, fmt.Errorf("read idle_session_timeout: %w", err)
	}
	defer rows.Close()
	value := make([]driver.Value, 1)
	if err := rows.Next(value); err != nil {
		return 0, fmt.Errorf("read idle_session_timeout: %w", err)
	}
	milliseconds, err := strconv.ParseInt(fmt.Sprint(value[0]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read idle_session_timeout: %w", err)
	}
	return time.Duration(milliseconds) * time.Millisecond, nil
}
