package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Keys returns the batch's events without contexts, environments and versions, in the
// order of Read.
func (l *Lease) Keys(ctx context.Context) ([]Record, error) {
	rows, err := l.tx.QueryxContext(ctx, l.sql(readKeysSQL), l.EventIDs)
	if err != nil {
		return nil, fmt.Errorf("read the batch's keys: %w", err)
	}
	types := make(interner)
	records := make([]Record, 0, l.Events)
	err = l.scan(rows, func(take func(int64) error) error {
		var (
			record              Record
			happened, published int64
			eventType           sql.RawBytes
		)
		if err := rows.Scan(&record.ID, &record.EventID, &eventType, &happened, &record.Traceparent, &published); err != nil {
			return fmt.Errorf("scan an event's key: %w", err)
		}
		record.EventType = types.intern(eventType)
		record.EventDateTime = time.UnixMicro(happened).UTC()
		record.PublishedAt = time.UnixMicro(published).UTC()
		records = append(records, record)
		return take(record.ID)
	})
	return records, err
}

// RenewToken releases the batch under a new token. The caller has checked that no
// insert under the old token is in flight, and that all events are absent.
func (l *Lease) RenewToken(ctx context.Context, cause error) error {
	return l.finish(ending{"renew the token", failpoint.RenewTokenBeforeCommit, failpoint.RenewTokenCommitted}, func() error {
		_, err := l.tx.ExecContext(ctx, l.sql(renewTokenSQL), l.ID, uuid.NewString(), reason(cause))
		return err //nolint:wrapcheck // finish does
	})
}
