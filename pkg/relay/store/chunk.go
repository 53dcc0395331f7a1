package store

import (
	"bytes"
	"cmp"
	"database/sql"
	"encoding/binary"
	"errors"
	"slices"

	"github.com/google/uuid"
)

// chunkBytes is the approximate size of a chunk. The work for a chunk is then negligible
// compared with the work for its events, and a chunk is small compared with a batch.
const chunkBytes = 128 << 10

// chunkIDs returns the largest number of ids that a chunk spans.
func (l *Lease) chunkIDs() int64 {
	const most = 1024
	return max(1, min(most, chunkBytes*int64(l.Events)/max(1, l.Bytes)))
}

// chunk is a row of readEventsSQL or readKeysSQL: some events, as columns. Numbers are in
// the binary format of PostgreSQL's types (bigint, uuid, timestamptz). A separator stands
// between two texts.
type chunk struct {
	keys         sql.RawBytes // id, event id, two times and version of each event
	types        sql.RawBytes
	traceparents sql.RawBytes // id and traceparent of each event with a traceparent

	keysOnly     bool // the columns below are missing
	environments sql.RawBytes
	contexts     sql.RawBytes
}

const (
	// keySize is the size of an event's keys in a chunk.
	keySize = 8 + len(uuid.UUID{}) + 8 + 8 + 8
	// typeSeparator is not a character of event types.
	typeSeparator = '/'
	// textSeparator is not a character of PostgreSQL's texts.
	textSeparator = 0
	// postgresEpoch is the epoch of timestamptz, 2000-01-01, in Unix microseconds.
	postgresEpoch = 946_684_800_000_000
)

var errChunk = errors.New("the columns of the chunk do not belong to the same events")

// columns returns the destinations of the row's columns.
func (c *chunk) columns() []any {
	columns := []any{&c.keys, &c.types, &c.traceparents}
	if !c.keysOnly {
		columns = append(columns, &c.environments, &c.contexts)
	}
	return columns
}

// appendTo appends the chunk's events to e in the order of their ids. After an error the
// columns of e differ in length.
func (c *chunk) appendTo(e *Events) error {
	if len(c.keys) == 0 || len(c.keys)%keySize != 0 {
		return errChunk
	}
	if c.isOrdered() {
		return c.decode(e)
	}
	var unordered Events
	if err := c.decode(&unordered); err != nil {
		return err
	}
	indexes := make([]int, len(unordered.ID))
	for i := range indexes {
		indexes[i] = i
	}
	slices.SortFunc(indexes, func(a, b int) int { return cmp.Compare(unordered.ID[a], unordered.ID[b]) })
	e.appendFrom(&unordered, indexes)
	return nil
}

func (c *chunk) isOrdered() bool {
	last := bigint(c.keys)
	for keys := c.keys[keySize:]; len(keys) > 0; keys = keys[keySize:] {
		id := bigint(keys)
		if id < last {
			return false
		}
		last = id
	}
	return true
}

// decode appends the chunk's events to e in the order of the chunk.
func (c *chunk) decode(e *Events) error {
	n := len(c.keys) / keySize
	e.grow(n)
	for keys := c.keys; len(keys) > 0; keys = keys[keySize:] {
		e.ID = append(e.ID, bigint(keys))
		e.EventID = append(e.EventID, uuid.UUID(keys[8:24]))
		e.EventDateTime = append(e.EventDateTime, timestamptz(keys[24:]))
		e.PublishedAt = append(e.PublishedAt, timestamptz(keys[32:]))
		e.MetadataVersion = append(e.MetadataVersion, binary.BigEndian.Uint64(keys[40:])) // never negative
	}
	if err := splitTexts(c.types, typeSeparator, n, e.EventType.Append); err != nil {
		return err
	}
	if err := c.decodeTraceparents(e, n); err != nil || c.keysOnly {
		return err
	}
	if err := splitTexts(c.environments, textSeparator, n, e.Environment.Append); err != nil {
		return err
	}
	return splitTexts(c.contexts, textSeparator, n, e.EventContext.Append)
}

// decodeTraceparents appends the traceparents of the last n events of e.
func (c *chunk) decodeTraceparents(e *Events, n int) error {
	const idSize = 8
	rest, more := []byte(c.traceparents), len(c.traceparents) > 0
	for _, id := range e.ID[len(e.ID)-n:] {
		var text []byte
		if len(rest) >= idSize && bigint(rest) == id {
			text, rest, more = bytes.Cut(rest[idSize:], []byte{textSeparator})
		}
		e.Traceparent.Append(text)
	}
	if more {
		return errChunk
	}
	return nil
}

// splitTexts passes the n texts of a column to add.
func splitTexts(column []byte, separator byte, n int, add func(text []byte)) error {
	for range n - 1 {
		end := bytes.IndexByte(column, separator)
		if end < 0 {
			return errChunk
		}
		add(column[:end])
		column = column[end+1:]
	}
	if bytes.IndexByte(column, separator) >= 0 {
		return errChunk
	}
	add(column)
	return nil
}

func bigint(b []byte) int64 {
	return int64(binary.BigEndian.Uint64(b)) //nolint:gosec // PostgreSQL's integers are signed
}

// timestamptz returns Unix microseconds.
func timestamptz(b []byte) int64 { return bigint(b) + postgresEpoch }
