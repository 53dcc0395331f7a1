// Package sample makes and compares events for the tests of sinks.
package sample

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Token returns a new token.
func Token() string { return uuid.NewString() }

// Events returns n ordinary events. They belong to two months.
func Events(n int) *sink.Events {
	e := &sink.Events{}
	start := time.Date(2026, 3, 31, 23, 59, 58, 123_456_000, time.UTC)
	for i := range n {
		Append(e, fmt.Sprintf("type_%d", i%3), start.Add(time.Duration(i)*time.Second), "Test", fmt.Sprintf(`{"n":%d}`, i), 1)
	}
	return e
}

// WithContexts returns n ordinary events. Their contexts have the given size and do not
// compress.
func WithContexts(n, size int) *sink.Events {
	e := Events(n)
	e.EventContext.Reset()
	for i := range n {
		noise := make([]byte, size+i)
		_, _ = rand.Read(noise) // never fails
		e.EventContext.Append(noise)
	}
	return e
}

// Limits returns events at the limits of what a sink must store.
func Limits() *sink.Events {
	var all [256]byte
	for i := range all {
		all[i] = byte(i)
	}
	e := &sink.Events{}
	now := time.Date(2026, 3, 31, 23, 59, 59, 999_999_000, time.UTC)
	Append(e, "context_empty", now, "Test", "", 0)
	Append(e, "context_json", now, "Test", `{"a":"\"\\\n\u0000","b":[1.5e300,null],"c":"ünïcödé 🏔️ 漢字"}`, 1) //nolint:gosmopolitan // characters of three bytes
	Append(e, "context_spaces", now, "Test", " {\t\"a\" :\r\n1 }\n", 1)
	Append(e, "context_bytes", now, "Test", string(all[:]), 1)
	Append(e, "context_quotes", now, "Test", `'; DROP TABLE x; -- "\'`+"`\\N\\t", 1)
	Append(e, "context_not_utf8", now, "Test", "\xff\xfe\xc0\xaf", 1)
	Append(e, "version_max", now, "Test", "{}", math.MaxUint64)
	Append(e, "environment_empty", now, "", "{}", 1)
	Append(e, "environment_odd", now, "Ünï 'x' \\ \n", "{}", 1)
	Append(e, `type_'odd'\`, now, "Test", "{}", 1)
	Append(e, strings.Repeat("long", 100), now, "Test", "{}", 1)
	for _, t := range []time.Time{
		time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(1969, 12, 31, 23, 59, 59, 999_999_000, time.UTC),
		time.Unix(0, 0).UTC(),
		now.Add(time.Microsecond),                                 // the next month
		time.Date(2262, 4, 11, 23, 47, 16, 854_776_000, time.UTC), // just after the largest int64 of nanoseconds
		time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC),
	} {
		Append(e, "times", t, "Test", "{}", 1)
	}
	return e
}

// Months returns n events in this many months.
func Months(n, months int) *sink.Events {
	e := Events(n)
	for i := range e.EventDateTime {
		e.EventDateTime[i] = time.Date(2000, time.Month(1+i%months), 1+i%28, 0, 0, 0, 0, time.UTC).UnixMicro()
	}
	return e
}

// Append appends an event with a new id.
func Append(e *sink.Events, eventType string, at time.Time, environment, eventContext string, version uint64) {
	e.EventID = append(e.EventID, uuid.New())
	e.EventType.Append([]byte(eventType))
	e.EventDateTime = append(e.EventDateTime, at.UnixMicro())
	e.Environment.Append([]byte(environment))
	e.EventContext.Append([]byte(eventContext))
	e.MetadataVersion = append(e.MetadataVersion, version)
}

// AppendFrom appends event i of from.
func AppendFrom(e, from *sink.Events, i int) {
	e.EventID = append(e.EventID, from.EventID[i])
	e.EventType.Append([]byte(from.EventType.At(i)))
	e.EventDateTime = append(e.EventDateTime, from.EventDateTime[i])
	e.Environment.Append([]byte(from.Environment.At(i)))
	e.EventContext.Append(from.EventContext.At(i))
	e.MetadataVersion = append(e.MetadataVersion, from.MetadataVersion[i])
}

// Batch returns a batch with a copy of the events, because a sink may empty the events of
// a batch.
func Batch(token string, e *sink.Events) sink.Batch {
	c := &sink.Events{}
	for i := range e.Len() {
		AppendFrom(c, e, i)
	}
	return sink.Batch{Token: token, Events: c}
}

// Sorted returns the events in the order of their ids.
func Sorted(e *sink.Events) *sink.Events {
	order := make([]int, e.Len())
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return cmp.Or(bytes.Compare(e.EventID[a][:], e.EventID[b][:]), cmp.Compare(a, b))
	})
	s := &sink.Events{}
	for _, i := range order {
		AppendFrom(s, e, i)
	}
	return s
}

// Filter returns the events with one of the ids.
func Filter(e *sink.Events, ids []uuid.UUID) *sink.Events {
	wanted := make(map[uuid.UUID]struct{}, len(ids))
	for _, id := range ids {
		wanted[id] = struct{}{}
	}
	f := &sink.Events{}
	for i, id := range e.EventID {
		if _, ok := wanted[id]; ok {
			AppendFrom(f, e, i)
		}
	}
	return f
}

// Merge returns the keys of first and second.
func Merge(first, second *sink.Keys) *sink.Keys {
	m := &sink.Keys{}
	for _, keys := range []*sink.Keys{first, second} {
		m.EventID = append(m.EventID, keys.EventID...)
		for i := range keys.Len() {
			m.EventType.Append([]byte(keys.EventType.At(i)))
		}
		m.EventDateTime = append(m.EventDateTime, keys.EventDateTime...)
	}
	return m
}

// Difference describes the first difference between two lists of events in any order. It
// returns an empty string if they are equal. It does not contain contexts, which may have
// megabytes.
func Difference(want, got *sink.Events) string {
	if want.Len() != got.Len() {
		return fmt.Sprintf("%d rows instead of %d", got.Len(), want.Len())
	}
	want, got = Sorted(want), Sorted(got)
	for i := range want.EventID {
		of := want.EventType.At(i)
		switch {
		case got.EventID[i] != want.EventID[i]:
			return fmt.Sprintf("event_id is %s instead of %s", got.EventID[i], want.EventID[i])
		case got.EventType.At(i) != of:
			return fmt.Sprintf("event_type is %q instead of %q", got.EventType.At(i), of)
		case got.EventDateTime[i] != want.EventDateTime[i]:
			return fmt.Sprintf("%s: event_date_time is %d instead of %d", of, got.EventDateTime[i], want.EventDateTime[i])
		case got.Environment.At(i) != want.Environment.At(i):
			return fmt.Sprintf("%s: environment is %q instead of %q", of, got.Environment.At(i), want.Environment.At(i))
		case got.MetadataVersion[i] != want.MetadataVersion[i]:
			return fmt.Sprintf("%s: metadata_version is %d instead of %d", of, got.MetadataVersion[i], want.MetadataVersion[i])
		case !bytes.Equal(got.EventContext.At(i), want.EventContext.At(i)):
			return fmt.Sprintf("%s: event_context differs, %d bytes instead of %d", of, len(got.EventContext.At(i)), len(want.EventContext.At(i)))
		}
	}
	return ""
}
