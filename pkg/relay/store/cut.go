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

// Cut is what an attempt to cut did.
type Cut struct {
	// Batches and Events were put into new manifests.
	Batches, Events int
	// Wait is how long to wait before the next attempt: there may be events, but
	// no full batch of them.
	Wait time.Duration
	// More says that events were or may be left: as many batches wait as may, or
	// one cut takes no more.
	More bool
}

// Cut puts waiting events into batches: those that fill a batch, and the rest if
// linger has passed since the fleet's last cut and no batch waits to be sent,
// behind which the rest would only wait. One process cuts at a time; for the
// others Cut does nothing. It returns ErrHistoryChanged where it found that, and
// is then to be called again.
func (s *Store) Cut(ctx context.Context, linger time.Duration) (Cut, error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return Cut{}, fmt.Errorf("cut: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing

	cut, err := s.cutIn(ctx, tx, linger)
	if err != nil && !errors.Is(err, ErrHistoryChanged) {
		if isOverlap(err) {
			// A manifest below the hint holds some of the events, and the
			// database refused them a second one. Poll at all of them next.
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
		Manifests   int  `db:"manifests"`
		Unsent      int  `db:"unsent"`
		SameHistory bool `db:"same_history"`
	}
	if err := tx.GetContext(ctx, &waiting, s.sql(waitingSQL), batchHint); err != nil {
		return Cut{}, fmt.Errorf("count the manifests: %w", err)
	}
	if !waiting.SameHistory {
		return Cut{}, s.markUnverified(ctx, tx)
	}
	room := min(batchesPerCut, maxUnsent-waiting.Unsent, maxBatches-waiting.Manifests)
	if room <= 0 {
		return Cut{More: true}, nil
	}
	// A last cut in the future (the clock was set back) counts as long ago.
	sinceCut := seconds(cursor.SinceCut)
	lingered := sinceCut < 0 || sinceCut >= linger
	takeRest := lingered && waiting.Unsent == 0

	sinceWatermark := seconds(cursor.SinceWatermark)
	moveWatermark := sinceWatermark < 0 || sinceWatermark >= s.watermarkTrail

	var cut Cut
	var left uncut
	leftAll := false // whether left is all that waits above from
	at, from, watermark, last := cursor.CutAt, cursor.LowWatermark, cursor.HighWatermark, int64(0)
	if !moveWatermark && cursor.HighWatermark-cursor.LowWatermark >= int64(s.o.MaxRows) {
		// In a backlog, full batches are where the last cut has ended, and the way to
		// them from the lowWatermark leads past everything that was cut since it was there.
		from = cursor.HighWatermark
	}
	fromWatermark := from == cursor.LowWatermark
	for cut.Batches < room {
		batch := left.batch(s.o.MaxRows, s.o.MaxBytes)
		for !batch.isFull && !leftAll {
			if left, err = s.findUncut(ctx, tx, batchHint, from); err != nil {
				return Cut{}, err
			}
			batch = left.batch(s.o.MaxRows, s.o.MaxBytes)
			leftAll = len(left.ids) < s.o.MaxRows
			if !batch.isFull && !fromWatermark { // with what has committed late, below
				from, fromWatermark, leftAll = cursor.LowWatermark, true, false
			}
		}
		cut.More = batch.isFull
		if batch.events == 0 || !batch.isFull && !takeRest {
			break
		}
		ids := left.ids[:batch.events]
		if _, err := tx.ExecContext(ctx, s.sql(cutSQL), newBatchID(at), multirange(ids), batch.events, batch.bytes,
			s.unverifiedSeconds()); err != nil {
			return Cut{}, fmt.Errorf("write a manifest: %w", err)
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
		case !takeRest:
			cut.Wait, cut.More = linger, true
		}
		return cut, nil
	}
	if cut.More {
		watermark = from // above it, events may be left
	} else {
		watermark = max(watermark, last)
	}
	if _, err := tx.ExecContext(ctx, s.sql(moveCursorSQL), cursor.Cuts, at, watermark, last, moveWatermark); err != nil {
		return Cut{}, fmt.Errorf("move the cursor: %w", err)
	}
	if cut.Batches > 1 {
		// More than the cutter's own next claim: the fleet helps.
		if _, err := tx.ExecContext(ctx, "SELECT pg_notify($1, '')", BatchesChannel); err != nil {
			return Cut{}, fmt.Errorf("notify the fleet: %w", err)
		}
	}
	if !cut.More && !takeRest { // it begins anew, for what these have left
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

// lockCursor returns nil where another process holds the cursor.
func (s *Store) lockCursor(ctx context.Context, tx *sqlx.Tx) (*cursorRow, error) {
	var cursor cursorRow
	hint := s.cutsHint()
	err := tx.GetContext(ctx, &cursor, s.sql(lockCursorSQL), hint)
	if errors.Is(err, sql.ErrNoRows) {
		var there bool
		if err := tx.GetContext(ctx, &there, s.sql(cursorThereSQL), hint); err != nil {
			return nil, fmt.Errorf("look for the cursor: %w", err)
		}
		if !there { // a failover or a restore has taken it back
			s.forgetCursor()
		}
		return nil, nil //nolint:nilnil // not to have the lock is no error
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

// uncut are events that are in no manifest, in the order of their ids.
type uncut struct {
	ids   []int64
	bytes []int32 // what each counts in a batch
}

// findUncut returns the first events above the id from, at most MaxRows.
func (s *Store) findUncut(ctx context.Context, tx *sqlx.Tx, batchHint uuid.UUID, from int64) (uncut, error) {
	var packed []byte
	if err := tx.GetContext(ctx, &packed, s.sql(uncutSQL), batchHint, from, s.o.MaxRows); err != nil {
		return uncut{}, fmt.Errorf("find the events that are in no batch: %w", err)
	}
	events, err := readUncut(packed)
	if err != nil {
		return uncut{}, fmt.Errorf("find the events that are in no batch: %w", err)
	}
	return events, nil
}

// readUncut reads the value of uncutSQL: of each event the id and the bytes, as
// PostgreSQL sends a bigint and an int.
func readUncut(packed []byte) (uncut, error) {
	const size = 8 + 4
	if len(packed)%size != 0 {
		return uncut{}, fmt.Errorf("%d bytes are no whole number of events", len(packed))
	}
	n := len(packed) / size
	events := uncut{ids: make([]int64, n), bytes: make([]int32, n)}
	last := int64(0)
	for i := range n {
		event := packed[i*size : (i+1)*size]
		events.ids[i] = bigint(event)
		events.bytes[i] = int32(binary.BigEndian.Uint32(event[8:])) //nolint:gosec // PostgreSQL's are signed
		if events.ids[i] <= last {
			return uncut{}, fmt.Errorf("event %d came after %d", events.ids[i], last)
		}
		last = events.ids[i]
	}
	return events, nil
}

// nextBatch is how many of the first uncut events make a batch, and of how many
// bytes.
type nextBatch struct {
	events int
	bytes  int64
	isFull bool
}

// batch takes at most maxRows events and maxBytes bytes, but at least one event.
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
