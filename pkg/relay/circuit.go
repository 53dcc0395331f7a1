package relay

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// circuit keeps the workers from a sink that does not take inserts, whatever
// the batch. While it is open nobody claims or cuts, so that an outage burns no
// batch's sends and holds no transaction open. After a pause one worker probes
// the sink and then, as the trial, sends one batch: only an insert that
// succeeds forgets the failures before.
type circuit struct {
	probe   func(context.Context) error
	backoff backoff
	log     *slog.Logger

	mu       sync.Mutex
	state    circuitState
	failures int
	unknown  int       // errors in a row of which nobody knows whose they are
	until    time.Time // when open: the earliest probe
	cause    error
	checked  bool          // the probe has succeeded before
	changed  chan struct{} // closed at each change of state
}

type circuitState int

const (
	circuitClosed circuitState = iota
	circuitOpen
	circuitProbing // one worker asks the sink
	circuitTrial   // one worker sends a batch
)

// newCircuit returns a circuit that is open and due for its first probe.
func newCircuit(probe func(context.Context) error, backoff backoff, log *slog.Logger) *circuit {
	return &circuit{
		probe: probe, backoff: backoff, log: log,
		state: circuitOpen, cause: errNotChecked, changed: make(chan struct{}),
	}
}

var errNotChecked = errors.New("the sink has not been checked yet")

// admit waits until the caller may claim a batch. It fails only with ctx's
// error, and with a *sink.MisconfiguredError where the first probe finds the
// sink unfit. Whoever was admitted reports succeeded, failed or idle.
func (c *circuit) admit(ctx context.Context) error {
	for {
		c.mu.Lock()
		changed, pause := c.changed, time.Duration(0)
		switch c.state {
		case circuitClosed:
			c.mu.Unlock()
			return ctx.Err() //nolint:wrapcheck // the caller's own
		case circuitOpen:
			if pause = time.Until(c.until); pause <= 0 {
				c.set(circuitProbing)
				c.mu.Unlock()
				if admitted, err := c.try(ctx); admitted || err != nil {
					return err
				}
				continue
			}
		case circuitProbing, circuitTrial:
			pause = time.Hour // another worker's change ends it
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller's own
		case <-changed:
		case <-time.After(pause):
		}
	}
}

// try probes the sink, and makes the caller the trial where it answers.
func (c *circuit) try(ctx context.Context) (admitted bool, err error) {
	err = c.probe(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	misconfigured, unfit := errors.AsType[*sink.MisconfiguredError](err)
	switch {
	case err == nil:
		c.checked = true
		c.set(circuitTrial)
		return true, nil
	case ctx.Err() != nil:
		c.set(circuitOpen)
		return false, ctx.Err() //nolint:wrapcheck // the caller's own
	case unfit && !c.checked:
		c.set(circuitOpen)
		return false, misconfigured
	default:
		c.open(ctx, err)
		return false, nil
	}
}

// succeeded reports an insert that the sink acknowledged.
func (c *circuit) succeeded(ctx context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failures, c.unknown = 0, 0
	c.close(ctx)
}

// idle reports that the caller found nothing to send, or that what happened
// says nothing about the sink's state.
func (c *circuit) idle(ctx context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == circuitTrial {
		c.close(ctx)
	}
}

// maxUnknown is how many errors in a row that say nothing of the sink's state
// do say that it takes no inserts.
const maxUnknown = 5

// failedUnknown reports an error that may be the batch's or the sink's: if one
// batch after the other has them, it is the sink's.
func (c *circuit) failedUnknown(ctx context.Context, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unknown++
	if c.unknown >= maxUnknown {
		c.open(ctx, err)
	}
}

// failed reports an error that is the sink's state.
func (c *circuit) failed(ctx context.Context, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open(ctx, err)
}

func (c *circuit) open(ctx context.Context, err error) {
	// One line for an outage, and one more when its cause turns out to be
	// something that the operator has to mend.
	_, unfit := errors.AsType[*sink.MisconfiguredError](err)
	_, wasUnfit := errors.AsType[*sink.MisconfiguredError](c.cause)
	if c.cause == nil || errors.Is(c.cause, errNotChecked) || unfit && !wasUnfit {
		c.log.ErrorContext(ctx, "the sink takes no inserts: events wait in the outbox", "err", err)
	}
	c.failures++
	c.until = time.Now().Add(c.backoff.delay(c.failures))
	c.cause = err
	c.set(circuitOpen)
}

func (c *circuit) close(ctx context.Context) {
	if c.state == circuitClosed {
		return
	}
	if !errors.Is(c.cause, errNotChecked) {
		c.log.InfoContext(ctx, "the sink takes inserts again")
	}
	c.cause = nil
	c.set(circuitClosed)
}

// set changes the state and wakes whoever waits for that.
func (c *circuit) set(state circuitState) {
	c.state = state
	close(c.changed)
	c.changed = make(chan struct{})
}

// awaitClosed waits until the circuit is closed, or ctx ends.
func (c *circuit) awaitClosed(ctx context.Context) error {
	for {
		c.mu.Lock()
		state, changed := c.state, c.changed
		c.mu.Unlock()
		if state == circuitClosed {
			return ctx.Err() //nolint:wrapcheck // the caller's own
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller's own
		case <-changed:
		}
	}
}

// err returns why the circuit is not closed, or nil.
func (c *circuit) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}
