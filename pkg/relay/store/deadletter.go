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
	if err := s.selectAll(ctx, &letters, listDeadLettersSQL, append(filter.values(), limit)...); err != nil {
		return nil, 0, fmt.Errorf("list the dead letters: %w", err)
	}
	for i := range letters {
		letters[i].inUTC()
	}
	if len(letters) == limit && limit > 0 {
		filter.Before = letters[limit-1].ID
		if err := s.get(ctx, &more, countDeadLettersSQL, filter.values()...); err != nil {
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
	err := s.get(ctx, &letter, readDeadLetterSQL, id)
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
	if err := s.selectAll(ctx, &ids, deadLetterIDsSQL, filter.values()...); err != nil {
		return nil, fmt.Errorf("find the dead letters: %w", err)
	}
	return ids, nil
}

// deadLettersAtOnce bounds a transaction, because events may have several megabytes.
const deadLettersAtOnce = 100

// maxRequeued bounds the batches that wait, up to which dead letters are requeued.
const maxRequeued = maxParted / 2

// RequeueDeadLetters moves the events of the dead letters back into the outbox, as they
// were published. An event that the sink refuses again becomes a dead letter with a new
// id.
//
// An insert of the batch from which an event was dead-lettered may begin late, and add the
// event. So the events return in batches with the token and the destination of that batch.
// The relay resolves such a batch: it checks presence, inserts the absent events under the
// old token, and checks again. If the sink remembers the token, it drops the late insert.
// If it drops the requeued events for the same reason, the relay renews the token.
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
		return requeued, nil
	})
}

func (s *Store) requeueDeadLetters(ctx context.Context, ids []int64) ([]DeadLetterKey, error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	var letters []requeuedLetter
	if err := tx.SelectContext(ctx, &letters, s.sql(requeueDeadLettersSQL), pq.Array(ids)); err != nil {
		return nil, fmt.Errorf("write the events back: %w", err)
	}
	if len(letters) == 0 {
		return nil, nil
	}
	if err := s.batchRequeued(ctx, tx, letters); err != nil {
		return nil, err
	}
	failpoint.At(failpoint.RequeueBeforeCommit)
	if err := tx.Commit(); err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	failpoint.At(failpoint.RequeueCommitted)
	requeued := make([]DeadLetterKey, len(letters))
	for i, letter := range letters {
		requeued[i] = letter.DeadLetterKey
	}
	return requeued, nil
}

// requeuedLetter is a dead letter whose event was written back.
type requeuedLetter struct {
	DeadLetterKey

	Token          string        `db:"token"`
	Destination    string        `db:"destination"`
	OutboxEventID  int64         `db:"outbox_event_id"`
	DeadLetteredAt time.Time     `db:"dead_lettered_at"`
	NewID          sql.NullInt64 `db:"new_id"` // the event's new id in the outbox
	Bytes          sql.NullInt32 `db:"bytes"`  // the event's bytes in a batch
}

// batchRequeued writes the batches of the events that were written back.
//
// It takes two locks. With the lock of the history, no change of history is recorded
// between the statements. With the cursor's lock, the ids of the batches are above those
// of all cuts. So the hints of the relays include these batches, and no cut finds the
// events without their batches. If the cursor is missing, only the clock orders the
// batches, until a relay has written the cursor again.
func (s *Store) batchRequeued(ctx context.Context, tx *sqlx.Tx, letters []requeuedLetter) error {
	if _, err := tx.ExecContext(ctx, s.sql(lockHistorySQL)); err != nil {
		return fmt.Errorf("lock outbox_history: %w", err)
	}
	cursor := cursorRow{BatchAt: time.Now()} // for an outbox without a cursor
	if err := tx.GetContext(ctx, &cursor, s.sql(lockCursorToRequeueSQL)); err != nil && !errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("lock the cursor: %w", err)
	}
	batches, err := s.requeuedBatches(letters, cursor.BatchAt)
	if err != nil {
		return err
	}
	var waiting int
	if err := tx.GetContext(ctx, &waiting, s.sql(countBatchesSQL)); err != nil {
		return fmt.Errorf("count the batches: %w", err)
	}
	if waiting+len(batches.ids) > maxRequeued {
		return fmt.Errorf("%d batches wait already: retry the remaining dead letters when the relay has delivered these batches", waiting)
	}
	if _, err := tx.ExecContext(ctx, s.sql(requeueBatchesSQL), pq.Array(batches.ids), pq.Array(batches.eventIDs),
		pq.Array(batches.events), pq.Array(batches.bytes), pq.Array(batches.tokens), pq.Array(batches.destinations),
		pq.Array(batches.attemptedAt), pq.Array(batches.firstOld), s.unverifiedSeconds()); err != nil {
		return fmt.Errorf("write the batches: %w", err)
	}
	if _, err := tx.ExecContext(ctx, s.sql(requeuedSQL), cursor.Cuts, batches.last); err != nil {
		return fmt.Errorf("move the cursor: %w", err)
	}
	// A relay that could not lock the cursor in the meantime looks for events again.
	return notifyFleet(ctx, tx)
}

// requeuedBatches contains batches as the columns of requeueBatchesSQL.
type requeuedBatches struct {
	ids                  []uuid.UUID
	eventIDs             []string
	events               []int
	bytes                []int64
	tokens, destinations []string
	attemptedAt          []string
	firstOld             []int64
	last                 time.Time // the time of the last id
}

// requeuedBatches forms batches of the letters with the same token and destination. The
// first batch has the time at.
func (s *Store) requeuedBatches(letters []requeuedLetter, at time.Time) (requeuedBatches, error) {
	type origin struct{ token, destination string }
	var origins []origin // in the order of their first letters
	groups := map[origin][]requeuedLetter{}
	for _, letter := range letters {
		if !letter.NewID.Valid {
			return requeuedBatches{}, fmt.Errorf("the new id of dead letter %d is unknown", letter.ID)
		}
		from := origin{letter.Token, letter.Destination}
		if len(groups[from]) == 0 {
			origins = append(origins, from)
		}
		groups[from] = append(groups[from], letter)
	}
	batches := requeuedBatches{last: at}
	for _, from := range origins {
		rest := groups[from]
		var left uncut
		for _, letter := range rest {
			left.ids = append(left.ids, letter.NewID.Int64)
			left.bytes = append(left.bytes, letter.Bytes.Int32)
		}
		for len(rest) > 0 {
			batch := left.batch(s.o.MaxRows, s.o.MaxBytes)
			batches.last = at.Add(time.Duration(len(batches.ids)) * time.Microsecond)
			batches.ids = append(batches.ids, newBatchID(batches.last))
			batches.eventIDs = append(batches.eventIDs, multirange(left.ids[:batch.events]))
			batches.events = append(batches.events, batch.events)
			batches.bytes = append(batches.bytes, batch.bytes)
			batches.tokens = append(batches.tokens, from.token)
			batches.destinations = append(batches.destinations, from.destination)
			firstDead, firstOld := rest[0].DeadLetteredAt, rest[0].OutboxEventID
			for _, letter := range rest[:batch.events] {
				firstDead, firstOld = earlier(firstDead, letter.DeadLetteredAt), min(firstOld, letter.OutboxEventID)
			}
			batches.attemptedAt = append(batches.attemptedAt, firstDead.UTC().Format(time.RFC3339Nano))
			batches.firstOld = append(batches.firstOld, firstOld)
			left, rest = left.after(batch.events), rest[batch.events:]
		}
	}
	return batches, nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// DiscardDeadLetters deletes the dead letters with their events. It returns letters and
// errors in the same way as RequeueDeadLetters.
func (s *Store) DiscardDeadLetters(ctx context.Context, ids []int64) iter.Seq2[[]DeadLetterKey, error] {
	return s.chunks(ids, func(ids []int64) (discarded []DeadLetterKey, err error) {
		if err := s.selectAll(ctx, &discarded, discardDeadLettersSQL, pq.Array(ids)); err != nil {
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
	if _, err := l.tx.ExecContext(ctx, l.store.sql(insertDeadLettersSQL), pq.Array(ids), pq.Array(errs),
		l.ID, l.Token, l.Destination); err != nil {
		return fmt.Errorf("write the dead letters: %w", err)
	}
	return l.deleteEvents(ctx, multirange(ids), len(ids))
}
