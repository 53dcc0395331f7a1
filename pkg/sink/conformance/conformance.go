// Package conformance has the test cases that every sink.Sink passes on a real server.
// They are plain functions, so that a program can run them at an operator's destination.
// Package sinktest runs them as Ginkgo specs, and adds specs that cause faults.
package conformance

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
)

// Harness gives a case access to a destination that contains no events of an outbox. The
// destination keeps duplicates: no merge removes them. Cases may share a destination if
// they run one after the other.
type Harness struct {
	// Sink is the sink under test.
	Sink sink.Sink
	// Others are other sinks on the same destination: one for each of its servers, or at
	// least one.
	Others []sink.Sink
	// Stored reads every row with one of the event ids, including duplicates, in any
	// order. It does not use the sink.
	Stored func(ctx context.Context, ids []uuid.UUID) (*sink.Events, error)
	// Slow makes every insert take at least d on the server, until restore is called.
	Slow func(ctx context.Context, d time.Duration) (restore Restore, err error)
	// Refuse makes the server refuse rows of the event type because of their data, until
	// restore is called.
	Refuse func(ctx context.Context, eventType string) (restore Restore, err error)
	// Window is the number of inserts after which the sink must still remember a token.
	// An insert counts once for each of its partitions.
	Window int
	// Patience limits each wait for an effect. The default is DefaultPatience.
	Patience time.Duration
	// Slowness is the argument of Slow. The default is DefaultSlowness.
	Slowness time.Duration
}

// Defaults of Harness.
const (
	DefaultPatience = 30 * time.Second
	// DefaultSlowness is less than the 3 seconds for which a function of ClickHouse may
	// sleep by default.
	DefaultSlowness = 2 * time.Second
)

// Restore undoes a change of the destination.
type Restore func(ctx context.Context) error

// Case is a test case.
type Case struct {
	// Name states the required behaviour. It is unique.
	Name string
	// Run returns an error if the destination behaves differently. The error contains no
	// event_context.
	Run func(ctx context.Context, h Harness) error
}

// Cases returns all cases, in the order in which they should run.
func Cases() []Case {
	return slices.Concat(tokens, inFlight, presence, deadlines, inserts, destinations)
}

const polling = 20 * time.Millisecond

// eventually waits until the condition is true.
func (h Harness) eventually(ctx context.Context, what string, condition func(ctx context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, h.patience())
	defer cancel()
	ticker := time.NewTicker(polling)
	defer ticker.Stop()
	for {
		switch met, err := condition(ctx); {
		case err != nil:
			return err
		case met:
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, context.Cause(ctx))
		}
	}
}

// insert inserts the events under the token.
func (h Harness) insert(ctx context.Context, token string, events *sink.Events) error {
	return h.Sink.Insert(ctx, sample.Batch(token, events))
}

// expectStored returns an error unless the destination has exactly these rows of the
// events. Rows of other events do not count.
func (h Harness) expectStored(ctx context.Context, of, want *sink.Events) error {
	got, err := h.Stored(ctx, of.EventID)
	if err != nil {
		return err
	}
	if difference := sample.Difference(want, got); difference != "" {
		return fmt.Errorf("the destination does not have the expected rows: %s", difference)
	}
	return nil
}

// insertAndExpect inserts the events under a new token, and checks that exactly they are
// stored.
func (h Harness) insertAndExpect(ctx context.Context, events *sink.Events) error {
	if err := h.insert(ctx, sample.Token(), events); err != nil {
		return err
	}
	return h.expectStored(ctx, events, events)
}

// twice returns each event twice.
func twice(e *sink.Events) *sink.Events {
	both := &sink.Events{}
	for range 2 {
		for i := range e.Len() {
			sample.AppendFrom(both, e, i)
		}
	}
	return both
}

var none = &sink.Events{}

// expectPresent returns an error unless the sink finds exactly the keys for which present
// is true.
func expectPresent(ctx context.Context, s sink.Sink, keys *sink.Keys, present func(i int) bool) error {
	found, err := s.Present(ctx, keys)
	if err != nil {
		return err
	}
	if len(found) != keys.Len() {
		return fmt.Errorf("a presence check of %d events has %d results", keys.Len(), len(found))
	}
	for i := range found {
		switch {
		case found[i] && !present(i):
			return fmt.Errorf("a presence check of %d events finds event %d, which is absent", keys.Len(), i)
		case !found[i] && present(i):
			return fmt.Errorf("a presence check of %d events does not find event %d, which is present", keys.Len(), i)
		}
	}
	return nil
}

func all(int) bool { return true }

func no(int) bool { return false }

// whileSlow calls do while inserts are slow. It ends the slowness even if ctx has ended.
func (h Harness) whileSlow(ctx context.Context, do func() error) error {
	return h.while(ctx, do, func() (Restore, error) { return h.Slow(ctx, h.slowness()) })
}

// while changes the destination, calls do, and restores the destination.
func (h Harness) while(ctx context.Context, do func() error, change func() (Restore, error)) error {
	restore, err := change()
	if err != nil {
		return err
	}
	err = do()
	restoring, cancel := context.WithTimeout(context.WithoutCancel(ctx), h.patience())
	defer cancel()
	if restoreErr := restore(restoring); err == nil {
		return restoreErr
	}
	return err
}

func (h Harness) patience() time.Duration { return cmp.Or(h.Patience, DefaultPatience) }

func (h Harness) slowness() time.Duration { return cmp.Or(h.Slowness, DefaultSlowness) }
