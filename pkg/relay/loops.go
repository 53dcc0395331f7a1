package relay

import (
	"context"
	"time"
)

// loop is a loop of a relay that turns regularly, also if nothing waits.
type loop string

const (
	loopCut    loop = "cut"    // at least every poll interval, while the circuit breaker is closed
	loopWatch  loop = "watch"  // every 10 seconds
	loopReport loop = "report" // every second
	loopCount  loop = "count"  // every 2 seconds
	loopTidy   loop = "tidy"   // every second; a vacuum takes longer
)

var loops = []loop{loopCut, loopWatch, loopReport, loopCount, loopTidy}

// turned records a turn of a loop, so that a loop that hangs is seen from outside.
func (r *Relay) turned(l loop) { r.turns[l].Store(time.Now().UnixNano()) }

// countInterval is the time between two counts of a large backlog.
const countInterval = 2 * time.Second

// countUntil counts a large backlog until ctx ends, so that the figures of a scrape are
// close without a count. It does nothing while the backlog is small, or nobody reads it.
func (r *Relay) countUntil(ctx context.Context) error {
	counts := time.NewTicker(countInterval)
	defer counts.Stop()
	for {
		r.turned(loopCount)
		if _, err := r.o.Store.CountBacklog(ctx); err != nil && ctx.Err() == nil {
			r.log.DebugContext(ctx, "counting backlog failed", "err", err) // the cutter reports an outage
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended ctx
		case <-counts.C:
		}
	}
}
