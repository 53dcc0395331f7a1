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

// chunkBytes is about how large a chunk of events is: large enough that the work
// for each chunk is nothing beside that for its events, and small beside a batch.
const chunkBytes = 128 << 10

// chunkIDs is how many ids a chunk spans at most.
func (l *Lease) chunkIDs() int64 {
	const most = 1024
	return max(1, min(most, chunkBytes*int64(l.Events)/max(1, l.Bytes)))
}

// chunk is some events by columns, as readEventsSQL makes it. Its numbers are those
// that PostgreSQL sends of the types (bigint, uuid, timestamptz). Its texts are
// parted by NUL, which no text of PostgreSQL's has.
type chunk struct {
	keys         sql.RawBytes // of each event its id, event id, two times and version
	kinds        sql.RawBytes // of each event its type, a slash and its environment
	traceparents sql.RawBytes // of each event that has one, its id and its traceparent
	contexts     sql.RawBytes
}

// keySize is the size of an event's keys in a chunk.
const keySize = 8 + len(uuid.UUID{}) + 8 + 8 + 8

// postgresEpoch is what PostgreSQL counts a timestamptz's microseconds from,
// 2000-01-01, in Unix's microseconds.
const postgresEpoch = 946_684_800_000_000

var errChunk = errors.New("its columns are not those of the same events")

// chunkDecoder reads chunks. It keeps one copy of what is the same in many events.
type chunkDecoder struct {
	kinds   interner
	records []Record
}

// decode returns the chunk's events, in the order of their ids. They are good until
// the next call; what they point to is no part of the chunk.
func (d *chunkDecoder) decode(c *chunk) ([]Record, error) {
	d.records = d.records[:0]
	if len(c.keys)%keySize != 0 {
		return nil, errChunk
	}
	var (
		kinds        = texts{rest: c.kinds}
		traceparents = texts{rest: c.traceparents, ended: len(c.traceparents) == 0}
		contexts     = texts{rest: c.contexts}
		kept         = string(c.contexts) // one for all of them
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

// texts are a column of texts, which are taken off its front.
type texts struct {
	rest  []byte
	ended bool // none is left
	short bool // more were asked for than there are
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

// skipID takes an id off the front, if it is that.
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

// interner keeps one copy of each of the few strings that a column holds.
type interner map[string]string

func (in interner) intern(text []byte) string {
	if known, ok := in[string(text)]; ok {
		return known
	}
	fresh := string(text)
	in[fresh] = fresh
	return fresh
}
