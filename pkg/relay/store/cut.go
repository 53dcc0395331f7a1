package store

import (
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
// returns ErrHistoryChanged, the caller calls it again.
func (s *Store) Cut(ctx context.Context, linger time.Duration) (Cut, error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return Cut{}, fmt.Errorf("cut: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit

	cut, err := s.cutIn(ctx, tx, linger)
	if err != nil && !errors.Is(err, ErrHistoryChanged) {
		if isOverlap(err) {
			// A batch with an id below the hint contains some of the events. The next cut
			// reads all batches.
			s.forgetBatches()
			return Cut{More: true}, nil
		}
		return Cut{}, fmt.Errorf("cut: %w", err)
	}
	before, after := failpoint.CutBeforeCommit, failpoint.CutCommitted
	if err != nil {
		before, after = failpoint.HistoryBeforeCommit, failpoint.HistoryCommitted
	}
	if cut.Batches > 0 || err != nil {
		failpoint.At(before)
		if commitErr := tx.Commit(); commitErr != nil {
			return Cut{}, fmt.Errorf("cut: commit: %w", commitErr)
		}
		failpoint.At(after)
	}
	return cut, err
}

func (s *Store) cutIn(ctx context.Context, tx *sqlx.Tx, linger time.Duration) (Cut, error) {
	cursor, err := s.lockCursor(ctx, tx)
	if err != nil || cursor == nil {
		return Cut{}, err
	}
	failpoint.At(failpoint.CutLocked)
	batchHint := s.batchHint()
	var waiting struct {
		Batches     int  `db:"batches"`
		Unattempted int  `db:"unattempted"`
		SameHistory bool `db:"same_history"`
	}
	if err := tx.GetContext(ctx, &waiting, s.sql(waitingSQL), batchHint); err != nil {
		return Cut{}, fmt.Errorf("count the batches: %w", err)
	}
	if !waiting.SameHistory {
		return Cut{}, s.markUnverified(ctx, tx)
	}
	capacity := min(batchesPerCut, maxUnattempted-waiting.Unattempted, maxBatches-waiting.Batches)
	if capacity <= 0 {
		return Cut{More: true}, nil
	}
	// If the clock was set back, the last cut is in the future. It is then treated as
	// long ago.
	sinceCut := seconds(cursor.SinceCut)
	lingered := sinceCut < 0 || sinceCut >= linger
	takePartial := lingered && waiting.Unattempted == 0

	sinceWatermark := seconds(cursor.SinceWatermark)
	moveWatermark := sinceWatermark < 0 || sinceWatermark >= s.watermarkTrail

	var cut Cut
	var left uncut
	leftAll := false // left contains all waiting events above from
	at, from, watermark, last := cursor.CutAt, cursor.LowWatermark, cursor.HighWatermark, int64(0)
	if !moveWatermark && cursor.HighWatermark-cursor.LowWatermark >= int64(s.o.MaxRows) {
		// In a backlog, this cut starts where the last cut ended. A cut from the low
		// watermark would pass all events that were cut since the low watermark moved.
		from = cursor.HighWatermark
	}
	fromWatermark := from == cursor.LowWatermark
	for cut.Batches < capacity {
		batch := left.batch(s.o.MaxRows, s.o.MaxBytes)
		for !batch.isFull && !leftAll {
			if left, err = s.findUncut(ctx, tx, batchHint, from); err != nil {
				return Cut{}, err
			}
			batch = left.batch(s.o.MaxRows, s.o.MaxBytes)
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
	if _, err := tx.ExecContext(ctx, s.sql(moveCursorSQL), cursor.Cuts, at, watermark, last, moveWatermark); err != nil {
		return Cut{}, fmt.Errorf("move the cursor: %w", err)
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
	Ignored          string    `db:"ignored"`
}

// lockCursor returns nil if another process has locked the cursor.
func (s *Store) lockCursor(ctx context.Context, tx *sqlx.Tx) (*cursorRow, error) {
	var cursor cursorRow
	hint := s.cutsHint()
	err := tx.GetContext(ctx, &cursor, s.sql(lockCursorSQL), hint)
	if errors.Is(err, sql.ErrNoRows) {
		var exists bool
		if err := tx.GetContext(ctx, &exists, s.sql(cursorExistsSQL), hint); err != nil {
			return nil, fmt.Errorf("find the cursor: %w", err)
		}
		if !exists { // a failover or a restore has lost the last cuts
			s.forgetCursor()
		}
		return nil, nil //nolint:nilnil // a cut by another process is not an error
	}
	if err != nil {
		return nil, fmt.Errorf("lock the cursor: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cuts, s.lowWatermark = cursor.Cuts, cursor.LowWatermark
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

// after returns the events after the first n.
func (u uncut) after(n int) uncut { return uncut{ids: u.ids[n:], bytes: u.bytes[n:]} }
