package relay

import (
	"context"
	"errors"
	"sync"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// elsewhere records that batches were attempted at another destination. These batches
// wait for an operator. All other batches are delivered.
type elsewhere struct {
	mu    sync.Mutex
	cause error
}

// err returns the *store.ElsewhereError of the last check, or nil.
func (e *elsewhere) err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cause
}

// checkElsewhere looks for batches that were attempted at another destination. It logs a
// destination when it finds the first batch.
func (r *Relay) checkElsewhere(ctx context.Context) error {
	err := r.o.Store.CheckElsewhere(ctx)
	found, isElsewhere := errors.AsType[*store.ElsewhereError](err)
	if err != nil && !isElsewhere {
		return err
	}
	r.elsewhere.mu.Lock()
	defer r.elsewhere.mu.Unlock()
	switch before, _ := errors.AsType[*store.ElsewhereError](r.elsewhere.cause); {
	case found != nil && (before == nil || before.Destination != found.Destination):
		r.log.ErrorContext(ctx, "batches attempted at another destination", "err", found)
	case found == nil && before != nil:
		r.log.InfoContext(ctx, "no batches of another destination left")
	}
	r.elsewhere.cause = err
	return nil
}

// errOtherDestination releases a batch whose first attempt went to another destination.
var errOtherDestination = errors.New("the first attempt of the batch went to another destination")

// checkDestination reads the destination from the sink, because a table can be replaced
// by another table of the same name. It returns errOtherDestination if the batch was
// attempted elsewhere. No relay claims the batch then.
func (d *delivery) checkDestination(ctx context.Context) error {
	if err := d.lease.Verify(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.o.FlushTimeout)
	defer cancel()
	destination, err := d.o.Sink.Destination(ctx)
	if err != nil {
		return sinkError{err}
	}
	d.o.Store.SetDestination(destination)
	if d.lease.Destination != "" && d.lease.Destination != destination {
		return sinkError{errOtherDestination}
	}
	return nil
}
