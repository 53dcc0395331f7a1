package postgres

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

const (
	// minReconnect and maxReconnect are the bounds of the pause between attempts to
	// connect. The pause doubles after each attempt.
	minReconnect = 250 * time.Millisecond
	maxReconnect = 10 * time.Second
	// pingInterval keeps middleboxes from dropping the idle connection. TCP
	// keepalives detect a dead server sooner. A short idle_session_timeout shortens the
	// interval, down to minPingInterval.
	pingInterval    = time.Minute
	minPingInterval = 10 * time.Millisecond
)

// ListenOptions configures Listen.
type ListenOptions struct {
	// DSN is as in Options. Notifications do not pass a pooler in transaction mode, so
	// Listen does not listen through a pooler.
	DSN string
	// PasswordFile and ApplicationName are as in Options.
	PasswordFile, ApplicationName string
	// Channels are the channels to listen to. They share one connection.
	Channels []string
	// Log receives one record when notifications stop and one when they resume.
	Log *slog.Logger
	// Changed is called after each connect with true, and after each lost connection with
	// false. It can be nil.
	Changed func(listening bool)
}

// Listen listens to the channels and returns a Go channel for each. A Go channel
// receives a value after a notification. Notifications that have not been received yet
// merge into one value, so a slow receiver does not block Listen. All Go channels also
// receive a value after each connect, because notifications from before the connect are
// lost.
//
// Listen keeps its own connection until ctx is canceled. If it loses the connection, it
// tries to reconnect without a limit. If the DSN leads to a pooler, Listen logs it once,
// and the Go channels receive nothing. It returns an error only if the DSN is invalid.
func Listen(ctx context.Context, o ListenOptions) (map[string]<-chan struct{}, error) {
	l := &listening{o: o, log: o.Log, wake: map[string]chan struct{}{}, pingEvery: make(chan time.Duration, 1)}
	receive := map[string]<-chan struct{}{}
	for _, channel := range o.Channels {
		wake := make(chan struct{}, 1)
		l.wake[channel], receive[channel] = wake, wake
	}
	if err := pqdriver.CheckDSN(o.DSN); err != nil {
		return nil, err
	}
	go l.keep(ctx)
	return receive, nil
}

type listening struct {
	o    ListenOptions
	log  *slog.Logger
	wake map[string]chan struct{} // by channel; read-only after the start
	// pingEvery receives the interval of pings after each connect.
	pingEvery chan time.Duration
	lost      bool // keep uses it, and lib/pq's goroutine while keep waits for it
}

// keep listens until ctx ends or a pooler was found. If the password has changed, it
// begins again with a new listener.
func (l *listening) keep(ctx context.Context) {
	pause := minReconnect
	for ctx.Err() == nil {
		pooled, err := l.listen(ctx)
		if pooled {
			return
		}
		if err == nil {
			pause = minReconnect
			continue
		}
		l.becameLost(ctx, err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, maxReconnect)
	}
}

// listen listens until ctx ends, the password has changed, or a pooler was found. It
// returns an error if the password cannot be read.
func (l *listening) listen(ctx context.Context) (pooled bool, err error) {
	ctx, end := context.WithCancel(ctx)
	defer end()
	listener, err := pqdriver.NewListener(ctx, pqdriver.ListenerOptions{
		DSN:             l.o.DSN,
		PasswordFile:    l.o.PasswordFile,
		ApplicationName: l.o.ApplicationName,
		MinReconnect:    minReconnect,
		MaxReconnect:    maxReconnect,
		Event:           func(event pq.ListenerEventType, err error) { l.connectionChanged(ctx, event, err) },
	})
	if err != nil {
		return false, err
	}
	var subscribing sync.WaitGroup
	subscribing.Go(func() { pooled = l.subscribe(ctx, listener) })
	l.run(listener)
	end()
	subscribing.Wait()
	return pooled, nil
}

// becameLost logs the first error.
func (l *listening) becameLost(ctx context.Context, err error) {
	if !l.lost {
		l.log.WarnContext(ctx, "postgresql notifications unavailable, polling", "err", err)
	}
	l.lost = true
}

// connectionChanged is called by one goroutine of lib/pq.
func (l *listening) connectionChanged(ctx context.Context, event pq.ListenerEventType, err error) {
	if ctx.Err() != nil {
		return
	}
	if l.o.Changed != nil {
		l.o.Changed(event == pq.ListenerEventConnected || event == pq.ListenerEventReconnected)
	}
	switch event {
	case pq.ListenerEventConnected, pq.ListenerEventReconnected:
		if l.lost {
			l.log.InfoContext(ctx, "listening again for postgresql notifications")
		}
		l.lost = false
		go l.readIdleTimeout(ctx)
	case pq.ListenerEventDisconnected, pq.ListenerEventConnectionAttemptFailed:
		l.becameLost(ctx, err)
	}
}

// settings are the options of a short connection that reads settings.
func (l *listening) settings() pqdriver.Options {
	return pqdriver.Options{DSN: l.o.DSN, PasswordFile: l.o.PasswordFile, ApplicationName: l.o.ApplicationName + "-settings"}
}

// readIdleTimeout makes run ping more often than the server's idle_session_timeout. After
// an error the interval stays the same until the next connect.
func (l *listening) readIdleTimeout(ctx context.Context) {
	timeout, err := pqdriver.IdleTimeout(ctx, l.settings())
	if err != nil {
		return
	}
	interval := pingInterval
	if timeout > 0 {
		interval = min(pingInterval, max(timeout/4, minPingInterval))
	}
	select {
	case l.pingEvery <- interval:
	case <-ctx.Done():
	}
}

// isPooled returns whether the DSN leads to a pooler. It waits until the server responds.
func (l *listening) isPooled(ctx context.Context) bool {
	for pause := minReconnect; ; pause = min(2*pause, maxReconnect) {
		pooled, err := pqdriver.IsPooled(ctx, l.settings())
		if err == nil {
			return pooled
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return false
		}
	}
}

// subscribe listens to the channels. After a reconnect, lib/pq listens to them again. If a
// pooler was found, subscribe closes the listener.
func (l *listening) subscribe(ctx context.Context, listener *pqdriver.Listener) (pooled bool) {
	if l.isPooled(ctx) {
		l.log.WarnContext(ctx, "postgresql notifications unavailable behind a pooler, polling",
			"hint", "set postgres.listen_dsn to the address of the server")
		_ = listener.Close()
		if l.o.Changed != nil {
			l.o.Changed(false)
		}
		return true
	}
	for channel, wake := range l.wake {
		for pause := minReconnect; ; pause = min(2*pause, maxReconnect) {
			// Listen waits for a connection. It returns only errors of the server: a
			// standby, for example, refuses LISTEN.
			err := listener.Listen(channel)
			if err == nil {
				break
			}
			if errors.Is(err, net.ErrClosed) { // for another password
				return false
			}
			if ctx.Err() == nil && pause == minReconnect {
				l.log.WarnContext(ctx, "postgresql refused LISTEN, polling", "channel", channel, "err", err)
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return false
			}
		}
		notify(wake)
	}
	return false
}

// run returns when the listener ends and closes Notify.
func (l *listening) run(listener *pqdriver.Listener) {
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		select {
		case notification, open := <-listener.Notify:
			switch {
			case !open:
				return
			case notification == nil: // reconnected
				for _, wake := range l.wake {
					notify(wake)
				}
			default:
				notify(l.wake[notification.Channel])
			}
		case interval := <-l.pingEvery:
			ping.Reset(interval)
		case <-ping.C:
			listener.Ping()
		}
	}
}

func notify(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}
