package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Keys returns the batch's events without their contexts, environments and
// versions, in Read's order.
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

// RenewToken gives the batch back under a new token. The caller has made sure
// that no send under the old one is running and that none of the events are
// at the sink.
func (l *Lease) RenewToken(ctx context.Context, cause error) error {
	return l.finish(ending{"give the batch a new token", failpoint.RenewTokenBeforeCommit, failpoint.RenewTokenCommitted}, func() error {
		_, err := l.tx.ExecContext(ctx, l.sql(renewTokenSQL), l.ID, uuid.NewString(), reason(cause))
		return err //nolint:wrapcheck // finish does
	})
}
