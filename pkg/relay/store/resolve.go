package store

import (
	"context"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Keys returns the batch's events without the columns Environment and EventContext. It
// returns the same errors as Read.
func (l *Lease) Keys(ctx context.Context) (*Events, error) {
	events := &Events{}
	events.grow(l.Events)
	if err := l.read(ctx, l.store.sql(readKeysSQL), &chunk{keysOnly: true}, l.EventIDs, l.Events, events); err != nil {
		return nil, err
	}
	return events, nil
}

// RenewToken releases the batch under a new token. The caller has checked that no
// insert under the old token is in flight, and that all events are absent.
func (l *Lease) RenewToken(ctx context.Context, cause error) error {
	return l.finish(ending{"renew the token", failpoint.RenewTokenBeforeCommit, failpoint.RenewTokenCommitted}, func() error {
		_, err := l.tx.ExecContext(ctx, l.store.sql(renewTokenSQL), l.ID, uuid.NewString(), reason(cause))
		return err //nolint:wrapcheck // finish adds the operation
	})
}
