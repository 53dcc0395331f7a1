package outbox

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
)

// uncut are events that are in no manifest, in the order of their ids.
type uncut struct {
	ids   []int64
	bytes []int32 // what each counts in a batch
}

// findUncut returns the first events above the id from, at most MaxRows.
func (s *Store) findUncut(ctx context.Context, tx *sqlx.Tx, batchHint uuid.UUID, from int64) (uncut, error) {
	var packed []byte
	if err := tx.GetContext(ctx, &packed, uncutSQL, batchHint, from, s.o.MaxRows); err != nil {
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
