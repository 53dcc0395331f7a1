package relay

import (
	"context"
	"time"
)

// Took returns the duration of the last batch that was settled at its first attempt.
func (r *Relay) Took() time.Duration { return time.Duration(r.took.Load()) }

// SetTook sets the duration that Took returns.
func (r *Relay) SetTook(d time.Duration) { r.took.Store(int64(d)) }

// Idle returns true if no worker has a batch. By then the metrics, log lines and Sentry
// transactions of all batches are complete.
func (r *Relay) Idle() bool { return r.busy.Load() == 0 }

// Watch sets the interval, the patience and the timeout of the watchdog, without a margin.
// Call it before Run.
func (r *Relay) Watch(interval, patience, timeout time.Duration) {
	r.watchdog.interval, r.watchdog.patience, r.watchdog.timeout = interval, patience, timeout
	r.watchdog.margin = 0
}

// IdleMinute takes the turns that the loops of a relay take in a minute if the outbox is
// empty. It returns the first error.
func (r *Relay) IdleMinute(ctx context.Context) error {
	for _, loop := range []struct {
		interval time.Duration
		turn     func() error
	}{
		{r.o.PollInterval, func() error { _, err := r.o.Store.Poll(ctx); return err }},
		{r.watchdog.interval, func() error { r.watch(ctx); return nil }},
		{reportInterval, func() error { return r.report(ctx, r.state()) }},
		{countInterval, func() error { _, err := r.o.Store.CountBacklog(ctx); return err }},
		{tidyInterval, func() error { return r.tidyOnce(ctx) }},
	} {
		for range time.Minute / loop.interval {
			if err := loop.turn(); err != nil {
				return err
			}
		}
	}
	return nil
}
