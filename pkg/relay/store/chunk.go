package store

import (
	"bytes"
	"cmp"
	"database/sql"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// chunkBytes is the approximate size of a chunk. The work for a chunk is then
// negligible beside the work for its events, and a chunk is small beside a batch.
const chunkBytes = 128 << 10

// chunkIDs returns how many ids a chunk spans at most.
func (l *Lease) chunkIDs() int64 {
	const most = 1024
	return max(1, min(most, chunkBytes*int64(l.Events)/max(1, l.Bytes)))
}

// chunk is a row of readEventsSQL: some events by columns. Numbers are in the binary
// format of PostgreSQL's types (bigint, uuid, timestamptz). Texts are separated by NUL,
// which a text of PostgreSQL cannot contain.
type chunk struct {
	keys         sql.RawBytes // id, event id, two times and version of each event
	kinds        sql.RawBytes // type, a slash and environment of each event
	traceparents sql.RawBytes // id and traceparent of each event that has one
	contexts     sql.RawBytes
}

// keySize is the size of an event's keys in a chunk.
const keySize = 8 + len(uuid.UUID{}) + 8 + 8 + 8

// postgresEpoch is the epoch of timestamptz, 2000-01-01, in Unix microseconds.
const postgresEpoch = 946_684_800_000_000

var errChunk = errors.New("the columns of the chunk do not belong to the same events")

// chunkDecoder decodes chunks. It keeps one copy of texts that many events share.
type chunkDecoder struct {
	kinds   interner
	records []Record
}

// decode returns the chunk's events in the order of their ids. The records are valid
// until the next call. They do not refer to the chunk.
func (d *chunkDecoder) decode(c *chunk) ([]Record, error) {
	d.records = d.records[:0]
	if len(c.keys)%keySize != 0 {
		return nil, errChunk
	}
	var (
		kinds        = texts{rest: c.kinds}
		traceparents = texts{rest: c.traceparents, ended: len(c.traceparents) == 0}
		contexts     = texts{rest: c.contexts}
		kept         = string(c.contexts) // one copy for all events
	)
	for keys := c.keys; len(keys) > 0; keys = keys[keySize:] {
		eventType, environment, found := strings.Cut(d.kinds.intern(kinds.next()), "/")
		if !found {
			return nil, errChunk
		}
		record := Record{
			ID:              bigint(keys),
			EventID:         uuid.UUID(keys[8:24]),
			EventType:       eventType,
			EventDateTime:   timestamptz(keys[24:]),
			Environment:     environment,
			MetadataVersion: bigint(keys[40:]),
			PublishedAt:     timestamptz(keys[32:]),
		}
		if traceparents.skipID(record.ID) {
			record.Traceparent = string(traceparents.next())
		}
		text := contexts.next()
		record.EventContext, kept = kept[:len(text)], kept[len(kept)-len(contexts.rest):]
		d.records = append(d.records, record)
	}
	if !kinds.areRead() || !traceparents.areRead() || !contexts.areRead() {
		return nil, errChunk
	}
	slices.SortFunc(d.records, func(a, b Record) int { return cmp.Compare(a.ID, b.ID) })
	return d.records, nil
}

// texts are the texts of a column that were not read yet.
type texts struct {
	rest  []byte
	ended bool // all texts were read
	short bool // next was called after that
}

func (t *texts) next() []byte {
	if t.ended {
		t.short = true
		return nil
	}
	text, rest, found := bytes.Cut(t.rest, []byte{0})
	t.rest, t.ended = rest, !found
	return text
}

func (t *texts) areRead() bool { return t.ended && !t.short }

// skipID reads an id, if it is the next value.
func (t *texts) skipID(id int64) bool {
	const size = 8
	if len(t.rest) < size || bigint(t.rest) != id {
		return false
	}
	t.rest = t.rest[size:]
	return true
}

func bigint(b []byte) int64 {
	return int64(binary.BigEndian.Uint64(b)) //nolint:gosec // PostgreSQL's are signed
}

func timestamptz(b []byte) time.Time { return time.UnixMicro(bigint(b) + postgresEpoch).UTC() }

// interner keeps one copy of each distinct string of a column.
type interner map[string]string

func (in interner) intern(text []byte) string {
	if known, ok := in[string(text)]; ok {
		return known
	}
	fresh := string(text)
	in[fresh] = fresh
	return fresh
}
