package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Batch is a manifest: which events one insert carries, and under which token.
type Batch struct {
	ID     uuid.UUID `db:"batch_id"`
	Events int       `db:"event_count"`
	Bytes  int64     `db:"byte_count"`
	Token  string    `db:"token"`
	// Sends counts the sends under Token that have happened or may have,
	// with the one that the claim allows. Only if it is 1 does an "ok" of the
	// sink prove that the events are there.
	Sends int `db:"sends"`

	EventIDs     string    `db:"event_ids"` // an int8multirange
	DatabaseTime time.Time `db:"database_time"`
}

// Record is an event as it is kept in the outbox. Its ID orders the events of
// a batch.
type Record struct {
	ID              int64
	EventID         uuid.UUID
	EventType       string
	EventDateTime   time.Time
	Environment     string
	EventContext    string
	MetadataVersion int64
	Traceparent     string
	PublishedAt     time.Time
}

// Lease is one worker's hold on one batch: an open transaction with the
// manifest's row locked in it. It ends with the first of Settle, Retry,
// Retoken, Replace or Release, and by itself when the worker's connection
// dies. It is not safe for concurrent use.
type Lease struct {
	Batch
	tx *sqlx.Tx
}

// ErrLeaseLost says that the batch is no longer this worker's: its connection
// was lost, or events of the batch are gone. Whatever was sent, the next
// claimer resolves it.
var ErrLeaseLost = errors.New("the lease of the batch is lost")

// ErrEventsMissing says that events which the manifest names are no longer in
// the outbox: somebody has deleted them. The rest is not sent, since fewer rows
// under the batch's token would make it worthless.
var ErrEventsMissing = errors.New("events of the batch have been deleted from the outbox")

// Claim marks the oldest batch that is due as sent once more and leases it. It
// returns nil where no batch is due, or the oldest has more than maxBytes.
func (s *Store) Claim(ctx context.Context, maxBytes int64) (*Lease, error) {
	failpoint.At(failpoint.ClaimBefore)
	var batch Batch
	err := s.db.GetContext(ctx, &batch, claimSQL, s.batchHint(), maxBytes)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil //nolint:nilnil // to find nothing is no error
	}
	if err != nil {
		return nil, fmt.Errorf("claim a batch: %w", err)
	}
	failpoint.At(failpoint.ClaimMarked)
	tx, err := s.begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("lease a batch: %w", err)
	}
	var ours int
	err = tx.GetContext(ctx, &ours, leaseSQL, batch.ID, batch.Token, batch.Sends)
	if err != nil {
		_ = tx.Rollback() // nothing was written
		if errors.Is(err, sql.ErrNoRows) {
			return nil, nil //nolint:nilnil // another worker was faster
		}
		return nil, fmt.Errorf("lease a batch: %w", err)
	}
	failpoint.At(failpoint.ClaimLeased)
	return &Lease{Batch: batch, tx: tx}, nil
}

// Read passes the batch's events to add, in the order of their ids, exactly
// as many as the manifest names; otherwise it fails with ErrEventsMissing.
func (l *Lease) Read(ctx context.Context, add func(Record) error) error {
	types, environments := make(interner), make(interner)
	return l.scan(ctx, readEventsSQL, func(rows *sqlx.Rows) (int64, error) {
		var (
			record                 Record
			happened, published    int64
			eventType, environment sql.RawBytes
		)
		if err := rows.Scan(&record.ID, &record.EventID, &eventType, &happened, &environment,
			&record.EventContext, &record.MetadataVersion, &record.Traceparent, &published); err != nil {
			return 0, fmt.Errorf("scan an event: %w", err)
		}
		record.EventType = types.intern(eventType)
		record.Environment = environments.intern(environment)
		record.EventDateTime = time.UnixMicro(happened).UTC()
		record.PublishedAt = time.UnixMicro(published).UTC()
		return record.ID, add(record)
	})
}

// Keys returns the batch's events without their contexts, in Read's order.
func (l *Lease) Keys(ctx context.Context) ([]Record, error) {
	types := make(interner)
	records := make([]Record, 0, l.Events)
	err := l.scan(ctx, readKeysSQL, func(rows *sqlx.Rows) (int64, error) {
		var (
			record              Record
			happened, published int64
			eventType           sql.RawBytes
		)
		if err := rows.Scan(&record.ID, &record.EventID, &eventType, &happened, &published); err != nil {
			return 0, fmt.Errorf("scan an event's key: %w", err)
		}
		record.EventType = types.intern(eventType)
		record.EventDateTime = time.UnixMicro(happened).UTC()
		record.PublishedAt = time.UnixMicro(published).UTC()
		records = append(records, record)
		return record.ID, nil
	})
	return records, err
}

// scan runs one of the queries over the batch's members and verifies that it
// returns exactly them: fewer rows under the batch's token would burn it.
func (l *Lease) scan(ctx context.Context, query string, scan func(*sqlx.Rows) (int64, error)) error {
	rows, err := l.tx.QueryxContext(ctx, query, l.EventIDs)
	if err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	defer rows.Close()
	events, last := 0, int64(0)
	for rows.Next() {
		id, err := scan(rows)
		if err != nil {
			return err
		}
		if id <= last {
			return fmt.Errorf("%w: event %d came after %d", ErrLeaseLost, id, last)
		}
		last = id
		events++
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	if events != l.Events {
		return fmt.Errorf("%w: %d of its %d are there", ErrEventsMissing, events, l.Events)
	}
	return nil
}

// Verify fails unless the lease still holds. It also restarts the time that
// the server lets the lease be idle for.
func (l *Lease) Verify(ctx context.Context) error {
	if _, err := l.tx.ExecContext(ctx, "SELECT 1"); err != nil {
		return fmt.Errorf("%w: %w", ErrLeaseLost, err)
	}
	return nil
}

// Settle removes the batch and its events, which the sink holds. It is the
// only way in which delivered events leave the outbox as a whole batch.
func (l *Lease) Settle(ctx context.Context) error {
	return l.finish(ending{"settle the batch", failpoint.SettleBeforeCommit, failpoint.SettleCommitted}, func() error {
		if err := l.deleteEvents(ctx, l.EventIDs, l.Events); err != nil {
			return err
		}
		failpoint.At(failpoint.SettleDeleted)
		return l.deleteManifest(ctx)
	})
}

// Retry gives the batch back, to be claimed again after the delay, and keeps
// the cause for the operator.
func (l *Lease) Retry(ctx context.Context, cause error, delay time.Duration) error {
	return l.finish(ending{"give the batch back", failpoint.RetryBeforeCommit, failpoint.RetryCommitted}, func() error {
		_, err := l.tx.ExecContext(ctx, retryBatchSQL, l.ID, reason(cause), delay.Seconds())
		return err //nolint:wrapcheck // finish does
	})
}

// Retoken gives the batch back under a new token. The caller has made sure
// that no send under the old one is running and that none of the events are
// at the sink.
func (l *Lease) Retoken(ctx context.Context, cause error) error {
	return l.finish(ending{"give the batch a new token", failpoint.RetokenBeforeCommit, failpoint.RetokenCommitted}, func() error {
		_, err := l.tx.ExecContext(ctx, retokenBatchSQL, l.ID, uuid.NewString(), reason(cause))
		return err //nolint:wrapcheck // finish does
	})
}

// Dead is an event that the sink can never take.
type Dead struct {
	ID    int64
	Cause error
}

// Partition says what becomes of each of a batch's events. Its ids ascend in
// each part and are, together, the batch's.
type Partition struct {
	// Delivered events are at the sink and are removed.
	Delivered []int64
	// Dead events become dead letters.
	Dead []Dead
	// Rest are the new batches, each under a token of its own.
	Rest [][]int64
}

// Replace puts other manifests in the batch's place. The caller has made sure
// that no send of the batch is running, and which of its events are at the
// sink.
func (l *Lease) Replace(ctx context.Context, parts Partition) error {
	return l.finish(ending{"replace the batch", failpoint.ReplaceBeforeCommit, failpoint.ReplaceCommitted}, func() error {
		if err := l.deleteManifest(ctx); err != nil {
			return err
		}
		failpoint.At(failpoint.ReplaceDeleted)
		events := len(parts.Delivered) + len(parts.Dead)
		gone := parts.Delivered
		for _, dead := range parts.Dead {
			if _, err := l.tx.ExecContext(ctx, buryEventSQL, dead.ID, l.ID, reason(dead.Cause)); err != nil {
				return fmt.Errorf("write a dead letter: %w", err)
			}
			if err := l.deleteEvents(ctx, multirange([]int64{dead.ID}), 1); err != nil {
				return err
			}
		}
		if err := l.deleteEvents(ctx, multirange(gone), len(gone)); err != nil {
			return err
		}
		for i, ids := range parts.Rest {
			var count int
			id := newBatchID(l.DatabaseTime.Add(time.Duration(i) * time.Microsecond))
			if err := l.tx.GetContext(ctx, &count, insertBatchSQL, multirange(ids), id); err != nil {
				return fmt.Errorf("write a manifest: %w", err)
			}
			if count != len(ids) {
				return fmt.Errorf("%w: %d of %d events are there", ErrLeaseLost, count, len(ids))
			}
			events += count
		}
		if events != l.Events {
			return fmt.Errorf("%w: %d of its %d events have a place", ErrLeaseLost, events, l.Events)
		}
		return nil
	})
}

// Release ends a lease that nothing else has ended, and changes nothing. The
// batch is due again within a second.
func (l *Lease) Release() { _ = l.tx.Rollback() }

// ending is one of the ways in which a lease ends.
type ending struct {
	name              string
	before, committed failpoint.Point
}

// finish runs the last statements of the lease and commits them, all or none.
func (l *Lease) finish(how ending, statements func() error) error {
	defer l.Release()
	if err := statements(); err != nil {
		return fmt.Errorf("%s: %w", how.name, err)
	}
	failpoint.At(how.before)
	if err := l.tx.Commit(); err != nil {
		return fmt.Errorf("%s: commit: %w", how.name, err)
	}
	failpoint.At(how.committed)
	return nil
}

func (l *Lease) deleteEvents(ctx context.Context, ids string, events int) error {
	result, err := l.tx.ExecContext(ctx, deleteEventsSQL, ids)
	if err != nil {
		return fmt.Errorf("delete the events: %w", err)
	}
	if deleted, err := result.RowsAffected(); err != nil || deleted != int64(events) {
		return fmt.Errorf("%w: %d of %d events were there to delete", ErrLeaseLost, deleted, events)
	}
	return nil
}

func (l *Lease) deleteManifest(ctx context.Context) error {
	if _, err := l.tx.ExecContext(ctx, deleteBatchSQL, l.ID); err != nil {
		return fmt.Errorf("delete the manifest: %w", err)
	}
	return nil
}

// reason is the error as the operator finds it in last_error: text that
// PostgreSQL takes, of a length that it keeps in line.
func reason(err error) string {
	const maxBytes = 1000
	text := strings.ReplaceAll(err.Error(), "\x00", "")
	if len(text) > maxBytes {
		text = text[:maxBytes]
	}
	return strings.ToValidUTF8(text, "")
}

// interner keeps one copy of each of the few strings that a column holds.
type interner map[string]string

func (in interner) intern(text []byte) string {
	if known, ok := in[string(text)]; ok {
		return known
	}
	fresh := string(text)
	in[fresh] = fresh
	return fresh
}
