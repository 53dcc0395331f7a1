package conformance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
)

var deadlines = []Case{
	{"a deadline ends an insert, and its execution soon after", endsLateInserts},
	{"a deadline that has passed prevents an insert", func(ctx context.Context, h Harness) error {
		past, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
		defer cancel()
		return expectPrevented(ctx, past, h)
	}},
	{"a deadline that has passed while the process was suspended prevents an insert", func(ctx context.Context, h Harness) error {
		return expectPrevented(ctx, overslept{ctx}, h)
	}},
}

func endsLateInserts(ctx context.Context, h Harness) error {
	return h.whileSlow(ctx, func() error {
		late := sample.Token()
		short, cancel := context.WithTimeout(ctx, h.slowness()/2)
		defer cancel()
		err := h.insert(short, late, sample.Events(10))
		if sink.ClassOf(err) != sink.Unavailable {
			return fmt.Errorf("an insert after its deadline has no unavailable error, but: %w", errOrNil(err))
		}
		return h.awaitEnd(ctx, late)
	})
}

func expectPrevented(ctx, late context.Context, h Harness) error {
	events := sample.Events(10)
	err := h.insert(late, sample.Token(), events)
	if !errors.Is(err, context.DeadlineExceeded) || sink.ClassOf(err) != sink.Unavailable {
		return fmt.Errorf("an insert after its deadline has no unavailable error of the deadline, but: %w", errOrNil(err))
	}
	return h.expectStored(ctx, events, none)
}

// overslept is a context after its deadline whose timer has not fired yet.
type overslept struct{ context.Context } //nolint:containedctx // the type is a context

// Deadline implements context.Context.
func (overslept) Deadline() (time.Time, bool) { return time.Now().Add(-time.Second), true }
