package outbox

import (
	"context"
	"log/slog"
	"time"
)

// Channel is the PostgreSQL channel on which relays listen for notifications of committed
// events.
const Channel = "diehard_outbox_events"

// notifyInterval is the least time between two notifications of one process. If a
// transaction notifies, its commit takes a lock that is global for the server. Publish
// therefore does not notify.
const notifyInterval = 10 * time.Millisecond

// Notifier notifies the relays that events were committed. Without a notification, a
// relay finds the events at its next poll, after at most five seconds by default. A lost
// notification costs time, never an event.
type Notifier struct {
	db      Execer
	log     *slog.Logger
	pending chan struct{}
}

// NewNotifier returns a Notifier that uses db outside of any transaction. db is a *sql.DB
// or the result of [PgxPool]. The Notifier logs failed notifications; log may be nil.
func NewNotifier(db Execer, log *slog.Logger) *Notifier {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Notifier{db: db, log: log, pending: make(chan struct{}, 1)}
}

// Hint requests a notification. Call it after the commit. It never blocks and is safe for
// concurrent use. Hints within 10 ms cause one notification.
func (n *Notifier) Hint() {
	select {
	case n.pending <- struct{}{}:
	default:
	}
}

// Run sends notifications until ctx is canceled, and then returns nil.
func (n *Notifier) Run(ctx context.Context) error {
	healthy := true
	for {
		select {
		case <-n.pending:
		case <-ctx.Done():
			return nil
		}
		err := notify(ctx, n.db)
		if err != nil && healthy && ctx.Err() == nil {
			n.log.WarnContext(ctx, "notifying relays failed", "err", err)
		}
		healthy = err == nil
		select {
		case <-time.After(notifyInterval):
		case <-ctx.Done():
			return nil
		}
	}
}

// notifyTimeout bounds one notification.
const notifyTimeout = 5 * time.Second

func notify(ctx context.Context, db Execer) error {
	ctx, cancel := context.WithTimeout(ctx, notifyTimeout)
	defer cancel()
	_, err := db.ExecContext(ctx, "SELECT pg_notify($1, '')", Channel)
	return err
}
