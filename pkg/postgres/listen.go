package postgres

import (
	"context"
	"log/slog"
	"time"

	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

const (
	// minReconnect and maxReconnect bound the pause between two attempts to
	// connect, which doubles.
	minReconnect = 250 * time.Millisecond
	maxReconnect = 10 * time.Second
	// pingInterval keeps middleboxes from forgetting the connection. That the
	// server is gone is noticed by TCP, sooner.
	pingInterval = time.Minute
)

// ListenOptions configure Listen.
type ListenOptions struct {
	// DSN is as in Options. Behind a pooler that swallows LISTEN nothing arrives.
	DSN string
	// ApplicationName is as in Options.
	ApplicationName string
	// Channels are listened to, all on one connection.
	Channels []string
	// Log gets one line when notifications stop coming and one when they are
	// back.
	Log *slog.Logger
}

// Listen returns, for each of the channels, a Go channel that tells that it was
// notified. Notifications that nobody has taken yet count as one, so a slow
// receiver holds nothing up. All of them also tell so after each connect, for
// what was sent while there was no connection is lost.
//
// It keeps a connection of its own until ctx is canceled, and makes a new one,
// for as long as it takes, whenever that one is lost. The only error is a DSN
// that cannot be used.
func Listen(ctx context.Context, o ListenOptions) (map[string]<-chan struct{}, error) {
	l := &listening{log: o.Log, wake: map[string]chan struct{}{}}
	receive := map[string]<-chan struct{}{}
	for _, channel := range o.Channels {
		wake := make(chan struct{}, 1)
		l.wake[channel], receive[channel] = wake, wake
	}
	var err error
	l.pq, err = pqdriver.NewListener(ctx, pqdriver.ListenerOptions{
		DSN:             o.DSN,
		ApplicationName: o.ApplicationName,
		MinReconnect:    minReconnect,
		MaxReconnect:    maxReconnect,
		Event:           func(event pq.ListenerEventType, err error) { l.connectionChanged(ctx, event, err) },
	})
	if err != nil {
		return nil, err
	}
	go l.subscribe(ctx)
	go l.run()
	return receive, nil
}

type listening struct {
	log  *slog.Logger
	pq   *pqdriver.Listener
	wake map[string]chan struct{} // by channel; not written to after the start
	// lost is for lib/pq's goroutine alone.
	lost bool
}

// connectionChanged is called by lib/pq, in one goroutine.
func (l *listening) connectionChanged(ctx context.Context, event pq.ListenerEventType, err error) {
	if ctx.Err() != nil {
		return
	}
	switch event {
	case pq.ListenerEventConnected, pq.ListenerEventReconnected:
		if l.lost {
			l.log.InfoContext(ctx, "listening for postgresql's notifications again")
		}
		l.lost = false
	case pq.ListenerEventDisconnected, pq.ListenerEventConnectionAttemptFailed:
		if !l.lost {
			l.log.WarnContext(ctx, "no notifications from postgresql: polling until they are back", "err", err)
		}
		l.lost = true
	}
}

// subscribe listens to the channels, which lib/pq does by itself after each
// reconnect from then on.
func (l *listening) subscribe(ctx context.Context) {
	for channel, wake := range l.wake {
		for pause := minReconnect; ; pause = min(2*pause, maxReconnect) {
			// Waits for a connection. An error is the server's answer, such as a
			// standby's, which refuses.
			err := l.pq.Listen(channel)
			if err == nil {
				break
			}
			if ctx.Err() == nil && pause == minReconnect {
				l.log.WarnContext(ctx, "postgresql refuses to notify: polling until it does", "channel", channel, "err", err)
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
		}
		notify(wake)
	}
}

// run ends with the listener, which closes Notify.
func (l *listening) run() {
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		select {
		case notification, open := <-l.pq.Notify:
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
		case <-ping.C:
			l.pq.Ping()
		}
	}
}

func notify(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}
