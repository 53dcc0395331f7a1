package store

import (
	"database/sql"
	"encoding/binary"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/google/uuid"
)

// Batch is a row of outbox_batches: the events that one insert carries, and its
// token.
type Batch struct {
	ID     uuid.UUID `db:"batch_id"`
	Events int       `db:"event_count"`
	Bytes  int64     `db:"byte_count"`
	Token  string    `db:"token"`
	// Attempts counts the attempts under Token, including this claim. An acknowledgement
	// of the sink proves that the events are present only if Attempts is 1.
	Attempts int `db:"attempts"`
	// Failures counts the failed attempts that the batch's data may have caused. If it is
	// above 0, the batch is failing.
	Failures int `db:"failures"`
	// Destination is the destination of the first attempt, or empty if it is unknown.
	Destination string `db:"destination"`
	// Unverified says that the batch may have been inserted under a token that was lost in
	// a change of history.
	Unverified bool `db:"unverified"`
	// FlushSeconds is the longest time limit of an insert that any relay has used.
	FlushSeconds float64 `db:"flush_seconds"`
	// LastError is the error of an earlier attempt, or empty.
	LastError string `db:"last_error"`

	EventIDs  string    `db:"event_ids"` // an int8multirange
	CreatedAt time.Time `db:"created_at"`
	// AttemptedAt is the time of this claim. PreviousAttemptAt is the time of the claim
	// before, if it is known.
	AttemptedAt       time.Time    `db:"last_attempt_at"`
	PreviousAttemptAt sql.NullTime `db:"previous_attempt_at"`
	DatabaseTime      time.Time    `db:"database_time"`
}

// Age returns the time since the batch was written. It is negative if the database's
// clock was set back.
func (b *Batch) Age() time.Duration { return b.DatabaseTime.Sub(b.CreatedAt) }

// LongestInsert returns the longest time limit of an insert that any relay has used.
func (b *Batch) LongestInsert() time.Duration { return seconds(b.FlushSeconds) }

// TokenAge returns an upper bound of the time since the first attempt under Token. It is
// exact for the second attempt, and otherwise the age of the batch. It is negative if the
// database's clock was set back.
func (b *Batch) TokenAge() time.Duration {
	if b.Attempts == 2 && b.PreviousAttemptAt.Valid {
		return b.DatabaseTime.Sub(b.PreviousAttemptAt.Time)
	}
	return b.Age()
}

// newBatchID returns a UUID v7 of the database's time t, to the microsecond. Each cut
// passes a later time than the previous cut, so the order of the ids is the order of the
// batches.
func newBatchID(t time.Time) uuid.UUID {
	id := firstBatchID(t)
	binary.BigEndian.PutUint64(id[8:], rand.Uint64()>>2|1<<63) //nolint:gosec // an id, not a secret
	return id
}

// firstBatchID returns the lowest id that newBatchID returns for t.
func firstBatchID(t time.Time) uuid.UUID {
	var id uuid.UUID
	micros := t.UnixMicro()
	fraction := micros % 1000 * 4096 / 1000
	binary.BigEndian.PutUint64(id[:8], uint64(micros/1000)<<16|0x7000|uint64(fraction))
	return id
}

// batchTime returns the time of an id that newBatchID has made.
func batchTime(id uuid.UUID) time.Time {
	head := binary.BigEndian.Uint64(id[:8])
	millis, fraction := int64(head>>16), int64(head&0xfff)
	return time.UnixMicro(millis*1000 + (fraction*1000+4095)/4096)
}

// multirange returns ascending ids as the text of an int8multirange.
func multirange(ids []int64) string {
	text := []byte{'{'}
	for i := 0; i < len(ids); {
		last := i
		for last+1 < len(ids) && ids[last+1] == ids[last]+1 {
			last++
		}
		if i > 0 {
			text = append(text, ',')
		}
		text = append(text, '[')
		text = strconv.AppendInt(text, ids[i], 10)
		text = append(text, ',')
		text = strconv.AppendInt(text, ids[last]+1, 10)
		text = append(text, ')')
		i = last + 1
	}
	return string(append(text, '}'))
}
