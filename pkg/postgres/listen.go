package postgres

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/lib/pq"
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

// Listen returns the names of the channels that were notified. Notifications
// that nobody has taken yet count as one for each channel, so a slow receiver
// holds nothing up. Every channel is also named once after each connect, for
// what was sent while there was no connection is lost.
//
// It keeps a connection of its own, and makes a new one, for as long as it
// takes, whenever that one is lost. When ctx is canceled the returned channel
// is closed. The only error is a DSN that cannot be used.
func Listen(ctx context.Context, o ListenOptions) (<-chan string, error) {
	dsn, err := withDefaults(o.DSN, o.ApplicationName)
	if err != nil {
		return nil, err
	}
	l := &listening{o: o, out: make(chan string), subscribed: make(chan struct{})}
	l.pq = pq.NewDialListener(dialer{abort: ctx}, dsn, minReconnect, maxReconnect, l.event)
	go l.subscribe(ctx)
	go l.run(ctx)
	return l.out, nil
}

type listening struct {
	o   ListenOptions
	pq  *pq.Listener
	out chan string
	// subscribed is closed when all channels are listened to, from when on
	// lib/pq does so again after each reconnect.
	subscribed chan struct{}
	// lost is used by lib/pq's goroutine alone.
	lost bool
}

// event is called by lib/pq at each change of the connection.
func (l *listening) event(event pq.ListenerEventType, err error) {
	switch event {
	case pq.ListenerEventConnected, pq.ListenerEventReconnected:
		if l.lost {
			l.o.Log.Info("listening for notifications again")
		}
		l.lost = false
	case pq.ListenerEventDisconnected, pq.ListenerEventConnectionAttemptFailed:
		if !l.lost && !errors.Is(err, context.Canceled) {
			l.o.Log.Warn("no notifications from postgresql: polling until they are back", "err", err)
		}
		l.lost = true
	}
}

func (l *listening) subscribe(ctx context.Context) {
	defer close(l.subscribed)
	for _, channel := range l.o.Channels {
		for pause := minReconnect; ; pause = min(2*pause, maxReconnect) {
			err := l.pq.Listen(channel)
			if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, pq.ErrChannelAlreadyOpen) {
				break
			}
			// The server refused, as a standby does.
			if pause == minReconnect {
				l.o.Log.WarnContext(ctx, "postgresql refuses to notify: polling instead", "channel", channel, "err", err)
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
		}
	}
}

func (l *listening) run(ctx context.Context) {
	defer func() {
		_ = l.pq.Close()
		close(l.out)
		// lib/pq's goroutine may be about to send one more.
		go func() {
			for range l.pq.Notify {
			}
		}()
	}()

	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	pinged := make(chan struct{}, 1)
	pinged <- struct{}{}

	var pending []string
	add := func(channels ...string) {
		for _, channel := range channels {
			if !slices.Contains(pending, channel) {
				pending = append(pending, channel)
			}
		}
	}
	subscribed := l.subscribed
	for {
		var (
			out  chan<- string
			next string
		)
		if len(pending) > 0 {
			out, next = l.out, pending[0]
		}
		select {
		case <-ctx.Done():
			return
		case <-subscribed:
			subscribed = nil
			add(l.o.Channels...)
		case notification := <-l.pq.Notify:
			if notification == nil { // reconnected
				add(l.o.Channels...)
			} else {
				add(notification.Channel)
			}
		case out <- next:
			pending = pending[1:]
		case <-ping.C:
			// Not from here: lib/pq hands on the answer only while its
			// notifications are taken.
			select {
			case <-pinged:
				go func() {
					_ = l.pq.Ping() // a failure reconnects
					pinged <- struct{}{}
				}()
			default:
			}
		}
	}
}
