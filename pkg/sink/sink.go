// Package sink defines what the relay asks of the store that events are
// delivered to. The relay knows only this package; ClickHouse is one
// implementation, and sinktest holds the contract as a suite that every
// implementation passes.
package sink

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
)

// Sink is a destination of events. Its methods are safe for concurrent use.
//
// Delivery is exactly once as long as a sink keeps three promises: an insert
// under a token that was seen before adds nothing (within the sink's
// deduplication window); Running sees every insert that is still being
// executed; Present sees every row that an insert has left behind once that
// insert no longer runs. It need not tell the truth about whether an insert
// succeeded: the relay asks.
type Sink interface {
	// Insert sends the batch in one insert under its token. It takes ownership
	// of batch.Events and may release their memory as it goes; a caller that
	// sends again reads the events again. It returns nil only when the sink
	// has acknowledged the whole batch as durable. Any error leaves the
	// outcome open, whatever its class.
	//
	// The context's deadline holds for the sink's own execution too, not only
	// for the client's wait. No row is sent after it, also by a process that was
	// stopped until then.
	Insert(ctx context.Context, batch Batch) error

	// Running reports whether an insert under the token is being executed
	// anywhere in the sink.
	InFlight(ctx context.Context, token string) (bool, error)

	// Present tells of each of the given events, in their order, whether the
	// sink holds it, read consistently: a row that any earlier, finished insert
	// has left is seen. Another event with the same id does not count.
	Present(ctx context.Context, keys []Key) ([]bool, error)

	// Check verifies that the destination exists and can keep the promises
	// above. It returns a *MisconfiguredError where the operator has to act
	// and any other error where the sink could not be asked.
	Check(ctx context.Context) error

	// Ping reports whether the sink answers.
	Ping(ctx context.Context) error

	// Close releases the sink's connections.
	Close() error
}

// Key is what makes an event: not its id alone, since who publishes may use one
// twice.
type Key struct {
	EventID   uuid.UUID
	EventType string
	Time      time.Time
}

// Batch is what one insert carries: its rows, always the same and in the same
// order for one token.
type Batch struct {
	// Token identifies the insert to the sink's deduplication.
	Token  string
	Events *Events
}

// Events are rows kept by column. All columns have the same length.
type Events struct {
	EventID         []uuid.UUID
	EventType       []string
	EventDateTime   []time.Time
	Environment     []string
	EventContext    []string
	MetadataVersion []uint64
}

// Len returns the number of events.
func (e *Events) Len() int { return len(e.EventID) }

// Grow makes room for n more events in each column.
func (e *Events) Grow(n int) {
	e.EventID = slices.Grow(e.EventID, n)
	e.EventType = slices.Grow(e.EventType, n)
	e.EventDateTime = slices.Grow(e.EventDateTime, n)
	e.Environment = slices.Grow(e.Environment, n)
	e.EventContext = slices.Grow(e.EventContext, n)
	e.MetadataVersion = slices.Grow(e.MetadataVersion, n)
}

// Class says what an insert's error means for the batch.
type Class int

const (
	// Unknown errors say nothing that the relay may rely on: the batch is
	// retried with its own backoff and the error is shown.
	Unknown Class = iota
	// Unavailable errors are a state of the sink and not of the batch: the
	// relay stops sending until the sink is back.
	Unavailable
	// Overloaded errors are the sink's back-pressure: the relay sends fewer
	// and larger batches.
	Overloaded
	// Permanent errors name the batch's data as their cause: sending the same
	// rows again cannot succeed.
	Permanent
)

// String returns the class as it appears in metrics and logs.
func (c Class) String() string {
	switch c {
	case Unavailable:
		return "unavailable"
	case Overloaded:
		return "overloaded"
	case Permanent:
		return "permanent"
	default:
		return "unknown"
	}
}

// Error is an error with the class that the sink gave it.
type Error struct {
	Class Class
	Err   error
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Class, e.Err) }

// Unwrap returns the sink's own error.
func (e *Error) Unwrap() error { return e.Err }

// ClassOf returns the class of err: Unknown where no sink has classified it.
func ClassOf(err error) Class {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Class
	}
	return Unknown
}

// BadEventsError names the events of a batch that the sink can never hold. It
// is found before anything of the batch is sent.
type BadEventsError struct {
	Events []BadEvent
}

// BadEvent is one of them: its place in the batch, and the reason.
type BadEvent struct {
	Index int
	Err   error
}

// Error implements error.
func (e *BadEventsError) Error() string {
	return fmt.Sprintf("%d events cannot be stored; the first: %s", len(e.Events), e.Events[0].Err)
}

// MisconfiguredError says that the destination cannot keep the delivery
// promise as it is set up.
type MisconfiguredError struct {
	// Problem is one sentence; Remedy is the statement that mends it.
	Problem, Remedy string
}

// Error implements error.
func (e *MisconfiguredError) Error() string {
	return fmt.Sprintf("%s; to mend it: %s", e.Problem, e.Remedy)
}
