package relay

import (
	"context"
	"slices"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// maxReportedIDs bounds the event ids of a log record.
const maxReportedIDs = 100

// reportFailedInsert reports events that are present although their insert failed. The
// sink stores the rows of the table first. A materialized view that failed afterwards
// lacks these events, and neither the relay nor ClickHouse adds them later. cause is the
// error of this attempt's insert, or nil. Otherwise the error is that of an earlier
// attempt. After the death of a worker there is no error.
func (d *delivery) reportFailedInsert(ctx context.Context, keys *store.Events, cause error) {
	reason := d.lease.LastError
	if cause != nil {
		reason = cause.Error()
	}
	if reason == "" {
		return
	}
	d.metrics.failed.Add(float64(len(keys.ID)))
	var ids []string
	for _, id := range keys.EventID[:min(len(keys.EventID), maxReportedIDs)] {
		ids = append(ids, id.String())
	}
	d.log.WarnContext(ctx, "events stored by failed insert",
		"stored", len(keys.ID),
		"hint", "materialized views of the table may lack these events",
		"insert_err", reason,
		"first_event_date_time", time.UnixMicro(slices.Min(keys.EventDateTime)).UTC(),
		"last_event_date_time", time.UnixMicro(slices.Max(keys.EventDateTime)).UTC(),
		"event_types", keys.EventType.Values[:min(len(keys.EventType.Values), maxTypes)],
		"event_ids", ids)
}
