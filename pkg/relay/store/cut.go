package store

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// Cut is the result of a cut.
type Cut struct {
	// Batches is the number of new batches, and Events the number of their events.
	Batches, Events int
	// Wait is the time to wait before the next cut. Some events may wait, but too few to
	// fill a batch.
	Wait time.Duration
	// More means that more events may wait. The cut has reached the bound of waiting
	// batches, or the bound of batches for one cut.
	More bool
}

// Cut puts waiting events into full batches. It puts the remaining events into a partial
// batch under two conditions: linger has passed since the fleet's last cut, and no batch
// waits for its first attempt. Behind a waiting batch, a partial batch would only queue.
// Only one process cuts at a time. If another process is cutting, Cut does nothing. If it
// returns ErrHistoryChanged, the caller calls it again after a pause.
func (s *Store) Cut(ctx context.Context, linger time.Duration) (Cut, error) {
	cut, err := s.cut(ctx, linger)
	if found, ok := errors.AsType[*mismatchError](err); ok {
		if err = s.reconcile(ctx, found.cause); err == nil {
			cut, err = s.cut(ctx, linger)
		}
	}
	if err != nil {
		return Cut{}, fmt.Errorf("cut: %w", err)
	}
	return cut, nil
}

// mismatchError says that the outbox differs from what the Store knows of it. The cause
// is a sign of a change of history that reconcile cannot see, or "".
type mismatchError struct{ cause string }

func (e *mismatchError) Error() string {
	return "the outbox does not agree with its history: " + cmp.Or(e.cause, "reason unknown")
}

func (s *Store) cut(ctx context.Context, linger time.Duration) (Cut, error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return Cut{}, err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit

	cursor, err := s.lockCursor(ctx, tx)
	if err != nil || cursor == nil {
		return Cut{}, err
	}
	cut, err := s.cutIn(ctx, tx, cursor, linger)
	if isOverlap(err) {
		// A batch with an id below the hint contains some of the events. The next cut
		// reads all batches.
		s.forgetBatches()
		return Cut{More: true}, nil
	}
	if err != nil || cut.Batches == 0 {
		return cut, err
	}
	failpoint.At(failpoint.CutBeforeCommit)
	if err := tx.Commit(); err != nil {
		return Cut{}, fmt.Errorf("commit: %w", err)
	}
	s.learn(cursor.incarnation, cursor.Cuts+1)
	failpoint.At(failpoint.CutCommitted)
	return cut, nil
}

func (s *Store) cutIn(ctx context.Context, tx *sqlx.Tx, cursor *cursorRow, linger time.Duration) (Cut, error) {
	failpoint.At(failpoint.CutLocked)
	batchHint := s.batchHint()
	var waiting struct {
		Batches     int           `db:"batches"`
		Unattempted int           `db:"unattempted"`
		Failing     int           `db:"failing"`
		Incarnation uuid.NullUUID `db:"incarnation"`
		SameHistory bool          `db:"same_history"`
		Running     bool          `db:"running"`
	}
	if err := tx.GetContext(ctx, &waiting, s.sql(waitingSQL), s.known().incarnation, batchHint); err != nil {
		return Cut{}, fmt.Errorf("count the batches: %w", err)
	}
	if !waiting.SameHistory {
		return Cut{}, &mismatchError{}
	}
	if !waiting.Running {
		return Cut{}, nil // the fleet is paused
	}
	if cursor.Cuts == 0 {
		var foreign bool
		if err := tx.GetContext(ctx, &foreign, s.sql(isForeignSQL)); err != nil {
			return Cut{}, fmt.Errorf("read the first events: %w", err)
		}
		if foreign {
			return Cut{}, &mismatchError{}
		}
	}
	cursor.incarnation = waiting.Incarnation
	s.learn(cursor.incarnation, cursor.Cuts)
	capacity := min(batchesPerCut, maxUnattempted-waiting.Unattempted, maxBatches-waiting.Batches,
		maxFailing-waiting.Failing)
	if capacity <= 0 {
		return Cut{More: true}, nil
	}
	// If the clock was set back, the last cut is in the future. It is then treated as
	// long ago, and this cut records the present time.
	sinceCut := seconds(cursor.SinceCut)
	lingered := sinceCut < 0 || sinceCut >= linger
	takePartial := lingered && waiting.Unattempted == 0

	sinceWatermark := seconds(cursor.SinceWatermark)
	moveWatermark := sinceWatermark < 0 || sinceWatermark >= s.watermarkTrail

	var cut Cut
	var left uncut
	leftAll := false // left contains all waiting events above from
	at, from, watermark, last := cursor.BatchAt, cursor.LowWatermark, cursor.HighWatermark, int64(0)
	if !moveWatermark && cursor.HighWatermark-cursor.LowWatermark >= int64(s.o.MaxRows) {
		// In a backlog, this cut starts where the last cut ended. A cut from the low
		// watermark would pass all events that were cut since the low watermark moved.
		from = cursor.HighWatermark
	}
	fromWatermark := from == cursor.LowWatermark
	maxBytes := s.maxBytes(time.Now())
	for cut.Batches < capacity {
		batch := left.batch(s.o.MaxRows, maxBytes)
		for !batch.isFull && !leftAll {
			var err error
			if left, err = s.findUncut(ctx, tx, batchHint, from); err != nil {
				return Cut{}, err
			}
			batch = left.batch(s.o.MaxRows, maxBytes)
			leftAll = len(left.ids) < s.o.MaxRows
			if !batch.isFull && !fromWatermark { // add late commits
				from, fromWatermark, leftAll = cursor.LowWatermark, true, false
			}
		}
		cut.More = batch.isFull
		if batch.events == 0 || !batch.isFull && !takePartial {
			break
		}
		ids := left.ids[:batch.events]
		if _, err := tx.ExecContext(ctx, s.sql(cutSQL), newBatchID(at), multirange(ids), batch.events, batch.bytes,
			s.unverifiedSeconds()); err != nil {
			return Cut{}, fmt.Errorf("write a batch: %w", err)
		}
		failpoint.At(failpoint.CutWritten)
		cut.Batches++
		cut.Events += batch.events
		at = at.Add(time.Microsecond)
		from = ids[len(ids)-1]
		last = max(last, from)
		left = left.after(batch.events)
	}
	if cut.Batches == 0 {
		switch {
		case !lingered:
			cut.Wait = linger - sinceCut
		case !takePartial:
			cut.Wait, cut.More = linger, true
		}
		return cut, nil
	}
	if cut.More {
		watermark = from // events may wait above from
	} else {
		watermark = max(watermark, last)
	}
	if err := s.moveCursor(ctx, tx, cursor.Cuts, cursor.CutAt, watermark, last, moveWatermark, at); err != nil {
		return Cut{}, err
	}
	if cut.Batches > 1 {
		// This relay claims one of the batches next. Other relays claim the rest.
		if _, err := tx.ExecContext(ctx, "SELECT pg_notify($1, '')", BatchesChannel); err != nil {
			return Cut{}, fmt.Errorf("notify the fleet: %w", err)
		}
	}
	if !cut.More && !takePartial { // the linger starts again for the remaining events
		cut.Wait = linger
	}
	return cut, nil
}

type cursorRow struct {
	Cuts             int64     `db:"cuts"`
	LowWatermark     int64     `db:"low_watermark"`
	NextLowWatermark int64     `db:"next_low_watermark"`
	HighWatermark    int64     `db:"high_watermark"`
	SinceCut         float64   `db:"since_cut"`
	SinceWatermark   float64   `db:"since_watermark"`
	CutAt            time.Time `db:"cut_at"`
	BatchAt          time.Time `db:"batch_at"`
	Ignored          string    `db:"ignored"`

	incarnation uuid.NullUUID // of the history
}

// moveCursor ends a cut. The values are the parameters of moveCursorSQL.
func (s *Store) moveCursor(ctx context.Context, tx *sqlx.Tx, values ...any) error {
	result, err := tx.ExecContext(ctx, s.sql(moveCursorSQL), values...)
	if err != nil {
		return fmt.Errorf("move the cursor: %w", err)
	}
	moved, err := result.RowsAffected()
	if err != nil {
		return fmt.Errorf("move the cursor: %w", err)
	}
	if moved == 0 {
		return &mismatchError{"events have higher ids than the sequence has returned"}
	}
	return nil
}

// lockCursor returns nil if another process has locked the cursor. It returns a
// *mismatchError if the cursor is missing, or has fewer cuts than the Store knows.
func (s *Store) lockCursor(ctx context.Context, tx *sqlx.Tx) (*cursorRow, error) {
	var cursor cursorRow
	hint := s.known().cuts
	err := tx.GetContext(ctx, &cursor, s.sql(lockCursorSQL), hint)
	if errors.Is(err, sql.ErrNoRows) {
		var exists bool
		if err := tx.GetContext(ctx, &exists, s.sql(cursorExistsSQL), hint); err != nil {
			return nil, fmt.Errorf("find the cursor: %w", err)
		}
		if !exists {
			return nil, &mismatchError{}
		}
		return nil, nil //nolint:nilnil // a cut by another process is not an error
	}
	if err != nil {
		return nil, fmt.Errorf("lock the cursor: %w", err)
	}
	return &cursor, nil
}

func isOverlap(err error) bool {
	pqErr, ok := errors.AsType[*pq.Error](err)
	return ok && pqErr.Code.Name() == "exclusion_violation"
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second))
}

// uncut contains events that are not in a batch, in the order of their ids.
type uncut struct {
	ids   []int64
	bytes []int32 // the bytes of each event in a batch
}

// findUncut returns the first events above the id from, at most MaxRows.
func (s *Store) findUncut(ctx context.Context, tx *sqlx.Tx, batchHint uuid.UUID, from int64) (uncut, error) {
	var packed []byte
	if err := tx.GetContext(ctx, &packed, s.sql(uncutSQL), batchHint, from, s.o.MaxRows); err != nil {
		return uncut{}, fmt.Errorf("find the events that are not in a batch: %w", err)
	}
	events, err := readUncut(packed)
	if err != nil {
		return uncut{}, fmt.Errorf("find the events that are not in a batch: %w", err)
	}
	return events, nil
}

// readUncut reads the value of uncutSQL: the id and the bytes of each event, as
// PostgreSQL sends a bigint and an int.
func readUncut(packed []byte) (uncut, error) {
	const size = 8 + 4
	if len(packed)%size != 0 {
		return uncut{}, fmt.Errorf("%d bytes is not a multiple of the size of an event", len(packed))
	}
	n := len(packed) / size
	events := uncut{ids: make([]int64, n), bytes: make([]int32, n)}
	last := int64(0)
	for i := range n {
		event := packed[i*size : (i+1)*size]
		events.ids[i] = bigint(event)
		events.bytes[i] = int32(binary.BigEndian.Uint32(event[8:])) //nolint:gosec // PostgreSQL's integers are signed
		if events.ids[i] <= last {
			return uncut{}, fmt.Errorf("event %d came after %d", events.ids[i], last)
		}
		last = events.ids[i]
	}
	return events, nil
}

// nextBatch is the number of uncut events that form the next batch, and their bytes.
type nextBatch struct {
	events int
	bytes  int64
	isFull bool
}

// batch forms the next batch: at most maxRows events and maxBytes bytes, but at least one
// event.
func (u uncut) batch(maxRows int, maxBytes int64) nextBatch {
	var batch nextBatch
	for _, bytes := range u.bytes {
		if batch.events == maxRows || batch.events > 0 && batch.bytes+int64(bytes) > maxBytes {
			batch.isFull = true
			return batch
		}
		batch.events++
		batch.bytes += int64(bytes)
	}
	batch.isFull = batch.events == maxRows
	return batch
}

// sizeLimit bounds the bytes of new batches because the sink has refused a larger batch.
type sizeLimit struct {
	bytes int64
	at    time.Time
}

// LimitBytes limits new batches of this process to these bytes, but to at least one event.
// A lower limit that exists remains. The limit doubles every hour, because the sink may
// take larger batches again. It returns true if it has lowered the limit.
func (s *Store) LimitBytes(bytes int64) bool {
	now := time.Now()
	if bytes >= s.maxBytes(now) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = sizeLimit{bytes, now}
	return true
}

func (s *Store) maxBytes(now time.Time) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.limit.bytes <= 0 {
		return s.o.MaxBytes
	}
	bytes := s.limit.bytes
	for at := s.limit.at.Add(time.Hour); bytes < s.o.MaxBytes && !now.Before(at); at = at.Add(time.Hour) {
		bytes *= 2
	}
	return min(s.o.MaxBytes, bytes)
}

// after returns the events after the first n.
func (u uncut) after(n int) uncut { return uncut{ids: u.ids[n:], bytes: u.bytes[n:]} }
