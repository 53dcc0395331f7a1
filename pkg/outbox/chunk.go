package outbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
)

// chunkBytes is about how large a chunk of events is: large enough that the work
// for each chunk is nothing beside that for its events, and small beside a batch.
const chunkBytes = 128 << 10

// chunkIDs is how many ids a chunk spans at most.
func (l *Lease) chunkIDs() int64 {
	const most = 1024
	return max(1, min(most, chunkBytes*int64(l.Events)/max(1, l.Bytes)))
}

// chunkDecoder reads chunks of events, as readEventsSQL makes them. It keeps one
// copy of what is the same in many events.
type chunkDecoder struct {
	types, environments interner

	records  []Record
	contexts [][]byte
}

// postgresEpoch is what PostgreSQL counts a timestamptz's microseconds from,
// 2000-01-01, in Unix's microseconds.
const postgresEpoch = 946_684_800_000_000

// decode returns the chunk's events. They are good until the next call; what they
// point to is no part of the chunk.
//
// A chunk is a sequence of rows as PostgreSQL sends a composite value: the number
// of fields, and of each its type, its length, -1 for NULL, and its value
// (record_send in
// https://github.com/postgres/postgres/blob/REL_18_0/src/backend/utils/adt/rowtypes.c#L688).
func (d *chunkDecoder) decode(chunk []byte) ([]Record, error) {
	d.records, d.contexts = d.records[:0], d.contexts[:0]
	size := 0
	for rest := (&reader{bytes: chunk}); len(rest.bytes) > 0; {
		record, context := d.row(rest)
		if rest.err != nil {
			return nil, rest.err
		}
		d.records, d.contexts = append(d.records, record), append(d.contexts, context)
		size += len(context)
	}
	// One string for all of them, of exactly their length.
	var joined strings.Builder
	joined.Grow(size)
	for _, context := range d.contexts {
		joined.Write(context)
	}
	contexts := joined.String()
	for i := range d.records {
		n := len(d.contexts[i])
		d.records[i].EventContext, contexts = contexts[:n], contexts[n:]
	}
	return d.records, nil
}

// row reads one row; its context is a part of the chunk.
func (d *chunkDecoder) row(r *reader) (record Record, context []byte) {
	const fields = 9 // of readEventsSQL
	if n := r.int32(); n != fields && r.err == nil {
		r.err = fmt.Errorf("a row has %d fields", n)
	}
	record.ID = r.bigint()
	copy(record.EventID[:], r.field(len(record.EventID)))
	record.EventType = d.types.intern(r.field(anyLength))
	record.EventDateTime = r.timestamptz()
	record.Environment = d.environments.intern(r.field(anyLength))
	context = r.field(anyLength)
	record.MetadataVersion = r.bigint()
	record.Traceparent = string(r.field(anyLength))
	record.PublishedAt = r.timestamptz()
	return record, context
}

// reader takes values off the front of what is left. After an error each value is
// zero.
type reader struct {
	bytes []byte
	err   error
}

const anyLength = -1

var errChunk = errors.New("it ends in the middle of a value, or a value has another length than its type")

// field reads a field's value, nil for NULL.
func (r *reader) field(length int) []byte {
	r.int32() // its type
	n := int(r.int32())
	if n == -1 && length == anyLength {
		return nil
	}
	if r.err != nil || n < 0 || n > len(r.bytes) || length != anyLength && n != length {
		return r.fail(max(0, length))
	}
	value := r.bytes[:n]
	r.bytes = r.bytes[n:]
	return value
}

func (r *reader) fail(length int) []byte {
	if r.err == nil {
		r.err = errChunk
	}
	return make([]byte, length)
}

func (r *reader) int32() int32 {
	const size = 4
	if r.err != nil || len(r.bytes) < size {
		r.fail(0)
		return 0
	}
	value := int32(binary.BigEndian.Uint32(r.bytes)) //nolint:gosec // PostgreSQL's are signed
	r.bytes = r.bytes[size:]
	return value
}

func (r *reader) bigint() int64 {
	return int64(binary.BigEndian.Uint64(r.field(8))) //nolint:gosec // PostgreSQL's are signed
}

func (r *reader) timestamptz() time.Time { return time.UnixMicro(r.bigint() + postgresEpoch).UTC() }

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
