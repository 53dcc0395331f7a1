package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// DeadLetterKey identifies a dead letter and its event.
type DeadLetterKey struct {
	ID        int64     `db:"id"         json:"id"`
	EventType string    `db:"event_type" json:"event_type"`
	EventID   uuid.UUID `db:"event_id"   json:"event_id"`
}

// DeadLetter is an event that the sink refused, with all published fields and the error.
type DeadLetter struct {
	DeadLetterKey

	DeadLetteredAt time.Time `db:"dead_lettered_at" json:"dead_lettered_at"`
	Error          string    `db:"error"            json:"error"`
	// BatchID is the event's last batch, as in the relay's log.
	BatchID         uuid.UUID `db:"batch_id"         json:"batch_id"`
	OutboxEventID   int64     `db:"outbox_event_id"  json:"outbox_event_id"`
	EventDateTime   time.Time `db:"event_date_time"  json:"event_date_time"`
	Environment     string    `db:"environment"      json:"environment"`
	MetadataVersion int64     `db:"metadata_version" json:"metadata_version"`
	Traceparent     string    `db:"traceparent"      json:"traceparent,omitempty"`
	PublishedAt     time.Time `db:"published_at"     json:"published_at"`
	// EventContext is nil in lists, because it may have several megabytes.
	EventContext json.RawMessage `db:"event_context" json:"event_context,omitempty"`
}

// DeadLetterFilter selects the dead letters that match all of its fields. A field's zero
// value matches every letter. A slice that is empty and not nil matches no letter.
type DeadLetterFilter struct {
	EventType   string
	Environment string
	// IDs are ids of dead letters. EventIDs are the ids of their events.
	IDs      []int64
	EventIDs []uuid.UUID
	BatchID  uuid.UUID
	// Since and Until bound DeadLetteredAt. Since is inclusive, Until exclusive.
	Since, Until time.Time
	// Error is a substring of the error.
	Error string
	// Before is an exclusive upper bound of the ids.
	Before int64
}

// values are the parameters of deadLetterFilterSQL.
func (f DeadLetterFilter) values() []any {
	return []any{
		orNull(f.EventType), orNull(f.Environment), pq.Array(f.IDs), pq.Array(f.EventIDs), orNull(f.BatchID),
		orNull(f.Since), orNull(f.Until), orNull(f.Error), orNull(f.Before),
	}
}

func orNull[T comparable](value T) any {
	var zero T
	if value == zero {
		return nil
	}
	return value
}

// DeadLetters returns the newest dead letters that the filter selects, without their
// contexts. more is the number of older letters that the filter selects.
func (s *Store) DeadLetters(ctx context.Context, filter DeadLetterFilter, limit int) (letters []DeadLetter, more int, err error) {
	if err := s.db.SelectContext(ctx, &letters, s.sql(listDeadLettersSQL), append(filter.values(), limit)...); err != nil {
		return nil, 0, fmt.Errorf("list the dead letters: %w", err)
	}
	for i := range letters {
		letters[i].inUTC()
	}
	if len(letters) == limit && limit > 0 {
		filter.Before = letters[limit-1].ID
		if err := s.db.GetContext(ctx, &more, s.sql(countDeadLettersSQL), filter.values()...); err != nil {
			return nil, 0, fmt.Errorf("count the dead letters: %w", err)
		}
	}
	return letters, more, nil
}

// ErrNoDeadLetter says that no dead letter with the id exists.
var ErrNoDeadLetter = errors.New("dead letter not found")

// DeadLetter returns a dead letter with its context, or ErrNoDeadLetter.
func (s *Store) DeadLetter(ctx context.Context, id int64) (DeadLetter, error) {
	var letter DeadLetter
	err := s.db.GetContext(ctx, &letter, s.sql(readDeadLetterSQL), id)
	if errors.Is(err, sql.ErrNoRows) {
		return DeadLetter{}, ErrNoDeadLetter
	}
	if err != nil {
		return DeadLetter{}, fmt.Errorf("read the dead letter: %w", err)
	}
	letter.inUTC()
	return letter, nil
}

func (l *DeadLetter) inUTC() {
	for _, t := range []*time.Time{&l.DeadLetteredAt, &l.EventDateTime, &l.PublishedAt} {
		*t = t.UTC()
	}
}

// DeadLetterIDs returns the ids of all dead letters that the filter selects, the oldest
// first. RequeueDeadLetters and DiscardDeadLetters take ids, so that they do not change
// newer dead letters.
func (s *Store) DeadLetterIDs(ctx context.Context, filter DeadLetterFilter) ([]int64, error) {
	var ids []int64
	if err := s.db.SelectContext(ctx, &ids, s.sql(deadLetterIDsSQL), filter.values()...); err != nil {
		return nil, fmt.Errorf("find the dead letters: %w", err)
	}
	return ids, nil
}

// deadLettersAtOnce bounds a transaction, because events may have several megabytes.
const deadLettersAtOnce = 100

// RequeueDeadLetters moves the events of the dead letters back into the outbox, as they
// were published. An event that the sink refuses again becomes a dead letter with a new
// id.
//
// It returns the letters that were requeued, transaction by transaction, after each
// commit. It skips letters that no longer exist. It stops at the first error. The failed
// transaction has changed nothing, unless the connection was lost during the commit. The
// call can be repeated after any error, because the same transaction writes an event back
// and deletes its letter.
func (s *Store) RequeueDeadLetters(ctx context.Context, ids []int64) iter.Seq2[[]DeadLetterKey, error] {
	return s.chunks(ids, func(ids []int64) ([]DeadLetterKey, error) {
		requeued, err := s.requeueDeadLetters(ctx, ids)
		if err != nil {
			return nil, fmt.Errorf("requeue dead letters: %w", err)
		}
		if len(requeued) > 0 {
			_, _ = s.db.ExecContext(ctx, "SELECT pg_notify($1, '')", outbox.Channel) // a hint; without it the next poll finds the events
		}
		return requeued, nil
	})
}

func (s *Store) requeueDeadLetters(ctx context.Context, ids []int64) ([]DeadLetterKey, error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	var rows []struct {
		DeadLetterKey

		FirstOld int64 `db:"first_old"`
		LastNew  int64 `db:"last_new"`
	}
	if err := tx.SelectContext(ctx, &rows, s.sql(requeueDeadLettersSQL), pq.Array(ids)); err != nil {
		return nil, fmt.Errorf("write the events back: %w", err)
	}
	if len(rows) == 0 {
		return nil, nil
	}
	if err := s.markRequeuedUnverified(ctx, tx, rows[0].FirstOld, rows[0].LastNew); err != nil {
		return nil, fmt.Errorf("mark the events as unverified: %w", err)
	}
	failpoint.At(failpoint.RequeueBeforeCommit)
	if err := tx.Commit(); err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	failpoint.At(failpoint.RequeueCommitted)
	requeued := make([]DeadLetterKey, len(rows))
	for i, row := range rows {
		requeued[i] = row.DeadLetterKey
	}
	return requeued, nil
}

// markRequeuedUnverified marks events up to lastNew as unverified, if PostgreSQL's
// history has changed since the event firstOld. In the lost history the letter may have
// been requeued and its event delivered.
func (s *Store) markRequeuedUnverified(ctx context.Context, tx *sqlx.Tx, firstOld, lastNew int64) error {
	if _, err := tx.ExecContext(ctx, s.sql(lockHistorySQL)); err != nil {
		return err //nolint:wrapcheck // the caller adds the operation
	}
	_, err := tx.ExecContext(ctx, s.sql(unverifiedRequeuedSQL), firstOld, lastNew)
	return err //nolint:wrapcheck // the caller adds the operation
}

// DiscardDeadLetters deletes the dead letters with their events. It returns letters and
// errors in the same way as RequeueDeadLetters.
func (s *Store) DiscardDeadLetters(ctx context.Context, ids []int64) iter.Seq2[[]DeadLetterKey, error] {
	return s.chunks(ids, func(ids []int64) (discarded []DeadLetterKey, err error) {
		if err := s.db.SelectContext(ctx, &discarded, s.sql(discardDeadLettersSQL), pq.Array(ids)); err != nil {
			return nil, fmt.Errorf("discard dead letters: %w", err)
		}
		return discarded, nil
	})
}

func (s *Store) chunks(ids []int64, change func([]int64) ([]DeadLetterKey, error)) iter.Seq2[[]DeadLetterKey, error] {
	return func(yield func([]DeadLetterKey, error) bool) {
		for chunk := range slices.Chunk(ids, deadLettersAtOnce) {
			changed, err := change(chunk)
			if !yield(changed, err) || err != nil {
				return
			}
		}
	}
}

func (l *Lease) deadLetter(ctx context.Context, refused []Refused) error {
	if len(refused) == 0 {
		return nil
	}
	ids, errs := make([]int64, len(refused)), make([]string, len(refused))
	for i, r := range refused {
		ids[i], errs[i] = r.ID, reason(r.Cause)
	}
	if _, err := l.tx.ExecContext(ctx, l.store.sql(insertDeadLettersSQL), pq.Array(ids), pq.Array(errs), l.ID); err != nil {
		return fmt.Errorf("write the dead letters: %w", err)
	}
	return l.deleteEvents(ctx, multirange(ids), len(ids))
}
