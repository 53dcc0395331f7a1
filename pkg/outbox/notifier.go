package outbox

import (
	"context"
	"database/sql"
	"log/slog"
	"time"
)

// The channels that relays listen on.
const (
	// EventsChannel says that events have been published.
	EventsChannel = "diehard_outbox_events"
	// BatchesChannel says that batches wait to be claimed.
	BatchesChannel = "diehard_outbox_batches"
)

// notifyInterval is the least time between two notifications of one process.
// PostgreSQL serialises the commits of transactions that notify on one lock
// for the whole server, so a publisher's own transaction never notifies, and a
// busy process does so at most a hundred times a second.
const notifyInterval = 10 * time.Millisecond

// Notifier tells the relays that events have been committed, so that they need
// not wait for their next poll. A hint that is lost costs latency, never an
// event.
type Notifier struct {
	db      *sql.DB
	log     *slog.Logger
	pending chan struct{}
}

// NewNotifier returns a Notifier that uses db, outside of any transaction.
func NewNotifier(db *sql.DB, log *slog.Logger) *Notifier {
	return &Notifier{db: db, log: log, pending: make(chan struct{}, 1)}
}

// Hint says that events were committed. It never blocks and is safe for
// concurrent use; hints that come together are sent as one.
func (n *Notifier) Hint() {
	select {
	case n.pending <- struct{}{}:
	default:
	}
}

// Run sends hints until ctx is canceled, and returns nil then.
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
			n.log.WarnContext(ctx, "relays cannot be notified and find new events by polling", "err", err)
		}
		healthy = err == nil
		select {
		case <-time.After(notifyInterval):
		case <-ctx.Done():
			return nil
		}
	}
}

// notifyTimeout bounds one notification: the next hint brings another.
const notifyTimeout = 5 * time.Second

func notify(ctx context.Context, db *sql.DB) error {
	ctx, cancel := context.WithTimeout(ctx, notifyTimeout)
	defer cancel()
	_, err := db.ExecContext(ctx, "SELECT pg_notify($1, '')", EventsChannel)
	return err //nolint:wrapcheck // its callers take it for a hint that was lost
}
