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
	"github.com/lib/pq"

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
	SentAt       time.Time `db:"last_sent_at"`
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
	Traceparent     string // empty where there is none
	PublishedAt     time.Time
}

// Lease is one worker's hold on one batch: an open transaction with the
// manifest's row locked in it. It ends with the first of Settle, Retry,
// Retoken, Shrink, Split or Release, and by itself when the worker's connection
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

// Claim marks a batch that is due as sent once more and leases it: the oldest,
// but every other time the oldest of those that have failed before, so that
// neither these nor the others wait for all of the others. It returns nil where
// no batch is due, or the one whose turn it is has more than maxBytes.
func (s *Store) Claim(ctx context.Context, maxBytes int64) (*Lease, error) {
	failpoint.At(failpoint.ClaimBefore)
	var batch Batch
	err := s.db.GetContext(ctx, &batch, claimSQL, s.batchHint(), maxBytes, s.claims.Add(1)%2 == 0)
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
	for _, statement := range []string{leaseSQL, awaitLeaseSQL} {
		err = tx.GetContext(ctx, &ours, statement, batch.ID, batch.Token, batch.Sends, batch.SentAt)
		if !errors.Is(err, sql.ErrNoRows) {
			break
		}
	}
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
	// Prepared, since lib/pq asks for binary values only then. In a transaction no
	// pooler parts a statement from its name.
	statement, err := l.tx.PreparexContext(ctx, readEventsSQL)
	if err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	defer statement.Close()
	rows, err := statement.QueryxContext(ctx, l.EventIDs, l.chunkIDs())
	if err != nil {
		return fmt.Errorf("read the batch: %w", err)
	}
	decoder := chunkDecoder{kinds: make(interner)}
	return l.scan(rows, func(take func(int64) error) error {
		var c chunk
		if err := rows.Scan(&c.keys, &c.kinds, &c.traceparents, &c.contexts); err != nil {
			return fmt.Errorf("scan events: %w", err)
		}
		records, err := decoder.decode(&c)
		if err != nil {
			return fmt.Errorf("decode events: %w", err)
		}
		for _, record := range records {
			if err := take(record.ID); err != nil {
				return err
			}
			if err := add(record); err != nil {
				return err
			}
		}
		return nil
	})
}

// Keys returns the batch's events without their contexts, environments and
// versions, in Read's order.
func (l *Lease) Keys(ctx context.Context) ([]Record, error) {
	rows, err := l.tx.QueryxContext(ctx, readKeysSQL, l.EventIDs)
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

// scan goes through the rows of a query over the batch's members and verifies
// that they are exactly these: fewer under the batch's token would burn it. row
// passes take the id of each event.
func (l *Lease) scan(rows *sqlx.Rows, row func(take func(id int64) error) error) error {
	defer rows.Close()
	events, last := 0, int64(0)
	take := func(id int64) error {
		if id <= last {
			return fmt.Errorf("%w: event %d came after %d", ErrLeaseLost, id, last)
		}
		last = id
		events++
		return nil
	}
	for rows.Next() {
		if err := row(take); err != nil {
			return err
		}
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

// Part says what becomes of each of a batch's events. Its ids ascend in each
// slice and are, together, the batch's.
type Part struct {
	// Delivered events are at the sink and are removed.
	Delivered []int64
	// Dead events become dead letters.
	Dead []Dead
	// Rest stays the batch.
	Rest []int64
}

// Shrink takes events out of the batch. The caller has made sure that no send of
// the batch is running, and which of its events are at the sink. The rest keeps
// the token, which the sink may know with other events of the batch: a send of
// the whole that begins late adds nothing where the token is known, and the
// rest is asked for before it is sent.
func (l *Lease) Shrink(ctx context.Context, part Part) error {
	return l.finish(ending{"shrink the batch", failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted}, func() error {
		if events := len(part.Delivered) + len(part.Dead) + len(part.Rest); events != l.Events {
			return fmt.Errorf("%w: %d of its %d events have a place", ErrLeaseLost, events, l.Events)
		}
		if err := l.deleteEvents(ctx, multirange(part.Delivered), len(part.Delivered)); err != nil {
			return err
		}
		if err := l.bury(ctx, part.Dead); err != nil {
			return err
		}
		failpoint.At(failpoint.ShrinkDeleted)
		if len(part.Rest) == 0 {
			return l.deleteManifest(ctx)
		}
		var events int
		if err := l.tx.GetContext(ctx, &events, shrinkBatchSQL, multirange(part.Rest), l.ID); err != nil {
			return fmt.Errorf("shrink the manifest: %w", err)
		}
		return l.expectEvents(events, len(part.Rest))
	})
}

func (l *Lease) bury(ctx context.Context, dead []Dead) error {
	if len(dead) == 0 {
		return nil
	}
	ids, errs := make([]int64, len(dead)), make([]string, len(dead))
	for i, d := range dead {
		ids[i], errs[i] = d.ID, reason(d.Cause)
	}
	if _, err := l.tx.ExecContext(ctx, buryEventsSQL, pq.Array(ids), pq.Array(errs), l.ID); err != nil {
		return fmt.Errorf("write the dead letters: %w", err)
	}
	return l.deleteEvents(ctx, multirange(ids), len(ids))
}

// Split puts two batches, each under a token of its own, in the place of one
// that the sink refuses for its data: the first n of the ids, which ascend and
// are the batch's, and the others. The caller has made sure that no send of the
// batch is running and that none of its events are at the sink.
func (l *Lease) Split(ctx context.Context, ids []int64, n int, cause error) error {
	return l.finish(ending{"split the batch", failpoint.SplitBeforeCommit, failpoint.SplitCommitted}, func() error {
		if err := l.expectEvents(len(ids), l.Events); err != nil {
			return err
		}
		if err := l.deleteManifest(ctx); err != nil {
			return err
		}
		failpoint.At(failpoint.SplitDeleted)
		// In the order of their events, whatever they are split into later: the
		// parts of one half are done before the other half begins, so that they
		// are never many.
		first := batchTime(l.ID).Add(time.Microsecond)
		second := first.Add(time.Duration(2*n) * time.Microsecond)
		if err := l.insertManifest(ctx, newBatchID(first), ids[:n], cause); err != nil {
			return err
		}
		return l.insertManifest(ctx, newBatchID(second), ids[n:], cause)
	})
}

func (l *Lease) insertManifest(ctx context.Context, id uuid.UUID, ids []int64, cause error) error {
	var events int
	if err := l.tx.GetContext(ctx, &events, insertBatchSQL, multirange(ids), id, reason(cause)); err != nil {
		return fmt.Errorf("write a manifest: %w", err)
	}
	return l.expectEvents(events, len(ids))
}

func (l *Lease) expectEvents(events, expected int) error {
	if events != expected {
		return fmt.Errorf("%w: %d of %d events are there", ErrLeaseLost, events, expected)
	}
	return nil
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
	deleted, err := result.RowsAffected()
	if err != nil {
		return fmt.Errorf("delete the events: %w", err)
	}
	return l.expectEvents(int(deleted), events)
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
