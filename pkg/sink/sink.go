// Package sink defines the interface between the relay and the destination of the events.
// The relay uses destinations only through this package. ClickHouse is one
// implementation. Every implementation passes the conformance suite of sinktest.
package sink

import (
	"context"
	"errors"
	"fmt"
)

// Sink is a destination of events. Its methods are safe for concurrent use.
//
// Delivery is exactly once if a sink keeps three promises. Within the sink's
// deduplication window, an insert under a token that the sink has seen before adds
// nothing. InFlight sees every insert that is still being executed. Present sees every
// row of an insert that is no longer executed. An error of Insert may leave open whether
// the rows are present, because the relay checks that.
type Sink interface {
	// Insert sends the batch in one insert under its token. It returns nil only if the
	// sink has acknowledged the complete batch as durable. After an error of any class,
	// the outcome is unknown.
	//
	// Insert may empty EventContext to release its memory. It does not change the other
	// columns, and does not use batch.Events after it has returned.
	//
	// The context's deadline also bounds the sink's execution. No row is sent after the
	// deadline, even if the process was suspended until then.
	Insert(ctx context.Context, batch Batch) error

	// InFlight returns whether any server of the sink executes an insert under the token.
	InFlight(ctx context.Context, token string) (bool, error)

	// Present returns for each event whether it is present. The read is
	// consistent: it sees the rows of every insert that has ended. Another event with
	// the same id does not count. Present returns a *BlindError if it does not find an
	// event, and the sink may hide the event from it.
	Present(ctx context.Context, keys *Keys) ([]bool, error)

	// Partitions returns a number for each event. Events with equal numbers are in the same
	// partition of the sink. The sink remembers a token in each partition separately: an
	// insert under a token that one partition has seen adds nothing there, and can add rows
	// to other partitions. If the keys do not determine the partitions, each event has its
	// own number.
	Partitions(ctx context.Context, keys *Keys) ([]int, error)

	// Undecided returns whether Present may find rows that the sink removes again, because
	// the sink does not know whether their insert was committed. Another insert under the
	// same token lets the sink decide.
	Undecided() bool

	// Check verifies that the destination exists and can keep the promises above. It
	// returns a *MisconfiguredError if the operator has to act, and another error if
	// the check itself failed.
	Check(ctx context.Context) error

	// Destination returns an identity of the place that stores the events. The identity
	// does not depend on names, addresses and credentials. It differs if Present cannot
	// see the events that were inserted at the other place. It contains no secret.
	Destination(ctx context.Context) (string, error)

	// Ping returns an error if the sink does not respond.
	Ping(ctx context.Context) error

	// Close releases the sink's connections.
	Close() error
}

// Batch is the content of one insert. All inserts under the same token have the same rows
// in the same order.
type Batch struct {
	// Token identifies the insert to the sink's deduplication.
	Token  string
	Events *Events
}

// Observer is implemented by a Sink that has figures for operators.
type Observer interface {
	// Observe returns the figures. A relay calls it about four times a minute.
	Observe(ctx context.Context) ([]Figure, error)
}

// Figure is a gauge of a sink. Name and Help are those of a Prometheus metric.
type Figure struct {
	Name, Help string
	Value      float64
}

// Class is the meaning of an error for the batch.
type Class int

const (
	// Unknown errors have an unknown cause. The relay logs the error and retries the
	// batch with a backoff for this batch.
	Unknown Class = iota
	// Unavailable errors are caused by the state of the sink, not by the batch. The relay
	// stops inserting until the sink is available again.
	Unavailable
	// Overloaded errors are the sink's backpressure. The relay sends fewer and larger
	// batches.
	Overloaded
	// Permanent errors are caused by the batch's data. Another insert of the same rows
	// cannot succeed.
	Permanent
	// TooLarge errors are caused by the batch's size. A smaller batch can succeed. They are
	// not backpressure, because larger batches would fail too.
	TooLarge
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
	case TooLarge:
		return "too_large"
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

// ClassOf returns the class of err. If no sink has classified err, it returns Unknown.
func ClassOf(err error) Class {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Class
	}
	return Unknown
}

// BadEventsError names the events of a batch that the sink can never store. Insert
// returns it before it sends any row of the batch.
type BadEventsError struct {
	Events []BadEvent
}

// BadEvent is an event by its index in the batch, and the reason.
type BadEvent struct {
	Index int
	Err   error
}

// Error implements error.
func (e *BadEventsError) Error() string {
	return fmt.Sprintf("%d events cannot be stored; the first error: %s", len(e.Events), e.Events[0].Err)
}

// MisconfiguredError says that the destination cannot keep the promises of Sink.
type MisconfiguredError struct {
	// Problem is one sentence. Remedy is the statement that solves the problem.
	Problem, Remedy string
}

// Error implements error.
func (e *MisconfiguredError) Error() string {
	return fmt.Sprintf("%s; to fix it: %s", e.Problem, e.Remedy)
}

// Explain returns the problem and the remedy.
func (e *MisconfiguredError) Explain() (problem, remedy string) { return e.Problem, e.Remedy }

// BlindError says that a presence check cannot see every row in which it looks for the
// events. It returns no result then, because an event that it does not find may be
// present.
type BlindError struct {
	// Problem is one sentence. Remedy is the statement or the change that solves it.
	Problem, Remedy string
}

// Error implements error.
func (e *BlindError) Error() string {
	return fmt.Sprintf("%s; to fix it: %s", e.Problem, e.Remedy)
}

// Explain returns the problem and the remedy.
func (e *BlindError) Explain() (problem, remedy string) { return e.Problem, e.Remedy }
