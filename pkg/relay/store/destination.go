package store

import (
	"context"
	"fmt"

	"github.com/lib/pq"
)

// SetDestination sets the identity of the sink's destination. Claim records it with the
// batch before the first attempt. Later it claims only batches without a destination, and
// batches of this destination.
func (s *Store) SetDestination(destination string) { s.destination.Store(&destination) }

// destinationName returns the destination, or an empty string if it was not set.
func (s *Store) destinationName() string {
	if d := s.destination.Load(); d != nil {
		return *d
	}
	return ""
}

// ElsewhereError says that batches were attempted at another destination. Their events may
// be present there, so they are not delivered to the current destination.
type ElsewhereError struct {
	Destination string `db:"destination"`
	Batches     int64  `db:"batches"`
	Events      int64  `db:"events"`

	// Remedy is the statement that makes the batches independent of Destination. The
	// next attempt then checks their presence at the current destination.
	Remedy string `db:"-"`
}

// Error implements error.
func (e *ElsewhereError) Error() string {
	return fmt.Sprintf("%d batches with %d events were attempted at another destination, %s, and may be present there. "+
		"Either set the relay's destination back until these batches are delivered. "+
		"Or, if that destination is lost or its rows were moved to the current one: %s", e.Batches, e.Events, e.Destination, e.Remedy)
}

// Explain returns the problem and the remedy.
func (e *ElsewhereError) Explain() (problem, remedy string) {
	return fmt.Sprintf("%d batches with %d events were attempted at another destination, %s, and may be present there", e.Batches, e.Events, e.Destination),
		"set the relay's destination back until these batches are delivered. Or, if that destination is lost or its rows were moved to the current one: " + e.Remedy
}

// CheckElsewhere returns an *ElsewhereError for the first other destination at which
// batches were attempted, or nil.
func (s *Store) CheckElsewhere(ctx context.Context) error {
	var elsewhere []ElsewhereError
	if err := s.selectAll(ctx, &elsewhere, elsewhereSQL, s.destinationName(), s.batchHint()); err != nil {
		return fmt.Errorf("find batches of other destinations: %w", err)
	}
	if len(elsewhere) == 0 {
		return nil
	}
	first := elsewhere[0]
	first.Remedy = s.sql("UPDATE {schema}outbox_batches SET destination = NULL WHERE destination = " + pq.QuoteLiteral(first.Destination))
	return &first
}
