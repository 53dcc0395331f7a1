package relay

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// circuit is the circuit breaker of the sink. While it is open, the relay neither claims
// nor cuts batches. An outage therefore uses no attempts and holds no transaction open.
// After a pause one worker probes the sink and then delivers one batch as the trial. Only
// a successful insert resets the failures.
type circuit struct {
	probe   func(context.Context) error
	backoff backoff
	log     *slog.Logger

	mu       sync.Mutex
	state    circuitState
	failures int
	unknown  int       // consecutive errors that the batch or the sink may cause
	until    time.Time // if open: the earliest probe
	cause    error
	since    time.Time     // the beginning of the outage
	checked  bool          // a probe has succeeded
	changed  chan struct{} // closed when the state changes
}

type circuitState int

const (
	circuitClosed circuitState = iota
	circuitOpen
	circuitProbing // one worker probes the sink
	circuitTrial   // one worker delivers a batch
)

// newCircuit returns a circuit that is open and due for its first probe.
func newCircuit(probe func(context.Context) error, backoff backoff, log *slog.Logger) *circuit {
	return &circuit{
		probe: probe, backoff: backoff, log: log,
		state: circuitOpen, cause: errNotChecked, since: time.Now(), changed: make(chan struct{}),
	}
}

// String returns the name of the state, as operators see it.
func (s circuitState) String() string {
	return [...]string{circuitClosed: "closed", circuitOpen: "open", circuitProbing: "probing", circuitTrial: "trial"}[s]
}

var errNotChecked = errors.New("the sink has not been checked yet")

// admit waits until the caller may claim a batch. It returns ctx's error, or a
// *sink.MisconfiguredError if the first probe returns this error. An admitted caller
// reports the outcome by calling succeeded, failed, failedUnknown or idle.
func (c *circuit) admit(ctx context.Context) error {
	for {
		c.mu.Lock()
		changed, pause := c.changed, time.Duration(0)
		switch c.state {
		case circuitClosed:
			c.mu.Unlock()
			return ctx.Err() //nolint:wrapcheck // the caller's own error
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
			pause = time.Hour // ends earlier when the other worker changes the state
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller's own error
		case <-changed:
		case <-time.After(pause):
		}
	}
}

// try probes the sink. If the probe succeeds, the caller's batch is the trial.
func (c *circuit) try(ctx context.Context) (admitted bool, err error) {
	err = c.probe(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	misconfigured, isMisconfigured := errors.AsType[*sink.MisconfiguredError](err)
	switch {
	case err == nil:
		c.checked = true
		c.set(circuitTrial)
		return true, nil
	case ctx.Err() != nil:
		c.set(circuitOpen)
		return false, ctx.Err() //nolint:wrapcheck // the caller's own error
	case isMisconfigured && !c.checked:
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

// idle reports that the caller found no batch, or that its attempt does not show
// the sink's state.
func (c *circuit) idle(ctx context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == circuitTrial {
		c.close(ctx)
	}
}

// maxUnknown is the number of consecutive unknown errors that opens the circuit breaker.
const maxUnknown = 5

// failedUnknown reports an error that the batch or the sink may cause. If consecutive
// batches fail with such errors, the sink is the cause.
func (c *circuit) failedUnknown(ctx context.Context, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unknown++
	if c.unknown >= maxUnknown {
		c.open(ctx, err)
	}
}

// failed reports an error that is caused by the state of the sink.
func (c *circuit) failed(ctx context.Context, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open(ctx, err)
}

func (c *circuit) open(ctx context.Context, err error) {
	// An outage is logged once, and once more if the operator has to act.
	_, misconfigured := errors.AsType[*sink.MisconfiguredError](err)
	_, wasMisconfigured := errors.AsType[*sink.MisconfiguredError](c.cause)
	if c.cause == nil || errors.Is(c.cause, errNotChecked) || misconfigured && !wasMisconfigured {
		c.log.ErrorContext(ctx, "circuit breaker open", "err", err)
	}
	if c.cause == nil {
		c.since = time.Now()
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
		c.log.InfoContext(ctx, "circuit breaker closed")
	}
	c.cause, c.since = nil, time.Time{}
	c.set(circuitClosed)
}

// look returns the name of the state, the beginning of the outage, and, if the circuit
// breaker is open, the time of the next probe.
func (c *circuit) look() (state string, since, probe time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == circuitOpen {
		probe = c.until
	}
	return c.state.String(), c.since, probe
}

// set changes the state and wakes all waiters.
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
			return ctx.Err() //nolint:wrapcheck // the caller's own error
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller's own error
		case <-changed:
		}
	}
}

// admitsFailing returns whether the caller may claim a failing batch.
func (c *circuit) admitsFailing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state != circuitTrial || c.unknown >= maxUnknown
}

// err returns nil if the circuit is closed, and otherwise the reason.
func (c *circuit) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}
