// Package backlog measures the bytes of the events that wait in the outbox, so that an
// outage of the sink does not fill PostgreSQL and stop the application that hosts the
// outbox.
package backlog

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// bytesSQL calls a function of the owner, because the API may not read events.
const bytesSQL = `SELECT {schema}diehard_backlog_bytes()`

// Options configure a Watch. DB and Log are required.
type Options struct {
	DB *sqlx.DB
	// Schema is the schema of the outbox's tables. If it is empty, PostgreSQL finds them by
	// the session's search_path.
	Schema string
	// Limit is the number of bytes at which the outbox is full. It must be above 0.
	Limit int64
	Log   *slog.Logger
	// Registerer registers the metrics. It may be nil.
	Registerer prometheus.Registerer
}

// Watch knows whether the outbox is full.
type Watch struct {
	o    Options
	full atomic.Bool
}

const (
	// interval is the time between two looks at the outbox, and timeout bounds a look.
	interval = 5 * time.Second
	timeout  = 5 * time.Second
)

// New returns a Watch. The outbox counts as not full before the first look.
func New(o Options) *Watch {
	w := &Watch{o: o}
	if o.Registerer != nil {
		o.Registerer.MustRegister(
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "diehard_outbox_backlog_limit_bytes",
				Help: "Bytes of waiting events at which the API publishes no more events: outbox.max_backlog_bytes.",
			}, func() float64 { return float64(o.Limit) }),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "diehard_outbox_full",
				Help: "1 if the API publishes no events because the outbox has reached outbox.max_backlog_bytes.",
			}, func() float64 {
				if w.Full() {
					return 1
				}
				return 0
			}))
	}
	return w
}

// Full returns whether the outbox was full at the last look. If PostgreSQL is unavailable,
// the last look counts.
func (w *Watch) Full() bool { return w.full.Load() }

// Run looks at the outbox until ctx ends, and then returns nil.
func (w *Watch) Run(ctx context.Context) error {
	looks := time.NewTicker(interval)
	defer looks.Stop()
	for {
		if err := w.Look(ctx); err != nil && ctx.Err() == nil && !postgres.IsUnavailable(err) {
			w.o.Log.WarnContext(ctx, "measuring backlog failed", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-looks.C:
		}
	}
}

// Look measures the outbox. A full outbox is full until its bytes are below nine tenths of
// the limit.
func (w *Watch) Look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var bytes int64
	if err := w.o.DB.GetContext(ctx, &bytes, postgres.InSchema(w.o.Schema)(bytesSQL)); err != nil {
		return fmt.Errorf("measure the backlog: %w", err)
	}
	switch {
	case bytes >= w.o.Limit && !w.full.Swap(true):
		w.o.Log.ErrorContext(ctx, "outbox full, publishing refused", "err",
			fmt.Errorf("%d bytes of events wait, and outbox.max_backlog_bytes is %d: find out why relays do not deliver (relay status)", bytes, w.o.Limit))
	case bytes < w.o.Limit/10*9 && w.full.Swap(false):
		w.o.Log.InfoContext(ctx, "outbox no longer full", "bytes", bytes)
	}
	return nil
}
