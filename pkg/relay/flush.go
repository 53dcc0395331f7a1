package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// insert inserts events of the batch under its token. The sink may empty their
// EventContext.
func (d *delivery) insert(ctx context.Context, events *store.Events) error {
	// The deadline starts before the worker verifies the lease. A process that is
	// suspended here must not insert late. In the meantime another worker may have
	// delivered the batch, and the sink may have forgotten its token.
	start := time.Now()
	if err := d.lease.Verify(ctx); err != nil {
		return err
	}
	insertCtx, cancel := context.WithDeadlineCause(ctx, start.Add(d.o.FlushTimeout), insertTimeoutError(d.o.FlushTimeout))
	defer cancel()
	failpoint.At(failpoint.FlushRead)
	err := d.inFlushSpan(insertCtx, events, func(ctx context.Context) error {
		return d.o.Sink.Insert(ctx, sink.Batch{Token: d.lease.Token, Events: &events.Events})
	})
	if _, unsent := errors.AsType[*sink.BadEventsError](err); !unsent {
		d.metrics.flush.Observe(time.Since(start).Seconds())
		d.metrics.attempted.Add(float64(len(events.ID)))
	}
	if err != nil {
		return sinkError{err}
	}
	failpoint.At(failpoint.FlushAcknowledged)
	d.metrics.rows.Observe(float64(len(events.ID)))
	d.circuit.succeeded(ctx)
	d.lowerBackpressure()
	return nil
}

// insertTimeoutError is the error of an insert that takes longer than Options.FlushTimeout.
type insertTimeoutError time.Duration

// Error implements error.
func (e insertTimeoutError) Error() string {
	return fmt.Sprintf("no response within %s (relay.flush_timeout)", time.Duration(e))
}

// Is makes the error a context.DeadlineExceeded.
func (insertTimeoutError) Is(target error) bool { return target == context.DeadlineExceeded }
