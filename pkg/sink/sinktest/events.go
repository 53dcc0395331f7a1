package sinktest

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
	"github.com/onsi/gomega"
	"github.com/onsi/gomega/gcustom"
	"github.com/onsi/gomega/types"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

func token() string { return uuid.NewString() }

// some returns n ordinary events.
func some(n int) *sink.Events {
	e := &sink.Events{}
	start := time.Date(2026, 3, 31, 23, 59, 58, 123_456_000, time.UTC) // the events belong to two months
	for i := range n {
		add(e, fmt.Sprintf("type_%d", i%3), start.Add(time.Duration(i)*time.Second), "Test", fmt.Sprintf(`{"n":%d}`, i), 1)
	}
	return e
}

// oddities returns events at the limits of what a sink must store.
func oddities() *sink.Events {
	var all [256]byte
	for i := range all {
		all[i] = byte(i)
	}
	e := &sink.Events{}
	now := time.Date(2026, 3, 31, 23, 59, 59, 999_999_000, time.UTC)
	add(e, "context_empty", now, "Test", "", 0)
	add(e, "context_json", now, "Test", `{"a":"\"\\\n\u0000","b":[1.5e300,null],"c":"ünïcödé 🏔️ 漢字"}`, 1) //nolint:gosmopolitan // characters of three bytes
	add(e, "context_spaces", now, "Test", " {\t\"a\" :\r\n1 }\n", 1)
	add(e, "context_bytes", now, "Test", string(all[:]), 1)
	add(e, "context_quotes", now, "Test", `'; DROP TABLE x; -- "\'`+"`\\N\\t", 1)
	add(e, "context_not_utf8", now, "Test", "\xff\xfe\xc0\xaf", 1)
	add(e, "version_max", now, "Test", "{}", math.MaxUint64)
	add(e, "environment_empty", now, "", "{}", 1)
	add(e, "environment_odd", now, "Ünï 'x' \\ \n", "{}", 1)
	add(e, `type_'odd'\`, now, "Test", "{}", 1)
	add(e, strings.Repeat("long", 100), now, "Test", "{}", 1)
	for _, t := range []time.Time{
		time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(1969, 12, 31, 23, 59, 59, 999_999_000, time.UTC),
		time.Unix(0, 0).UTC(),
		now.Add(time.Microsecond),                                 // the next month
		time.Date(2262, 4, 11, 23, 47, 16, 854_776_000, time.UTC), // just after the largest int64 of nanoseconds
		time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC),
	} {
		add(e, "times", t, "Test", "{}", 1)
	}
	return e
}

func add(e *sink.Events, eventType string, at time.Time, environment, eventContext string, version uint64) {
	e.EventID = append(e.EventID, uuid.New())
	e.EventType.Append([]byte(eventType))
	e.EventDateTime = append(e.EventDateTime, at.UnixMicro())
	e.Environment.Append([]byte(environment))
	e.EventContext.Append([]byte(eventContext))
	e.MetadataVersion = append(e.MetadataVersion, version)
}

// noise returns n bytes that do not compress.
func noise(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return string(b)
}

// copied returns a copy of the events. A sink may empty the copy.
func copied(e *sink.Events) *sink.Events {
	c := &sink.Events{}
	for i := range e.Len() {
		appendFrom(c, e, i)
	}
	return c
}

// appendFrom appends event i of from.
func appendFrom(e, from *sink.Events, i int) {
	e.EventID = append(e.EventID, from.EventID[i])
	e.EventType.Append([]byte(from.EventType.At(i)))
	e.EventDateTime = append(e.EventDateTime, from.EventDateTime[i])
	e.Environment.Append([]byte(from.Environment.At(i)))
	e.EventContext.Append(from.EventContext.At(i))
	e.MetadataVersion = append(e.MetadataVersion, from.MetadataVersion[i])
}

// sorted returns the events in the order of their ids.
func sorted(e *sink.Events) *sink.Events {
	order := make([]int, e.Len())
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return cmp.Or(bytes.Compare(e.EventID[a][:], e.EventID[b][:]), cmp.Compare(a, b))
	})
	s := &sink.Events{}
	for _, i := range order {
		appendFrom(s, e, i)
	}
	return s
}

// withContexts returns n ordinary events. Their contexts have the given size and do not
// compress.
func withContexts(n, size int) *sink.Events {
	e := some(n)
	e.EventContext.Reset()
	for i := range n {
		e.EventContext.Append([]byte(noise(size + i)))
	}
	return e
}

// merged returns the keys of first and second.
func merged(first, second *sink.Keys) *sink.Keys {
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

func set(e *sink.Events) map[uuid.UUID]struct{} {
	s := make(map[uuid.UUID]struct{}, e.Len())
	for _, id := range e.EventID {
		s[id] = struct{}{}
	}
	return s
}

// equalEvents compares events without printing megabytes.
func equalEvents(want *sink.Events) types.GomegaMatcher {
	var difference string
	return gomega.And(
		gomega.WithTransform(func(e *sink.Events) int { return e.Len() }, gomega.Equal(want.Len())),
		gcustom.MakeMatcher(func(got *sink.Events) (bool, error) {
			for i := range want.EventID {
				switch {
				case got.EventID[i] != want.EventID[i]:
					difference = fmt.Sprintf("event %d is %s, not %s", i, got.EventID[i], want.EventID[i])
				case got.EventType.At(i) != want.EventType.At(i):
					difference = fmt.Sprintf("event_type is %q, not %q", got.EventType.At(i), want.EventType.At(i))
				case got.EventDateTime[i] != want.EventDateTime[i]:
					difference = fmt.Sprintf("%s: event_date_time is %d, not %d", want.EventType.At(i), got.EventDateTime[i], want.EventDateTime[i])
				case got.Environment.At(i) != want.Environment.At(i):
					difference = fmt.Sprintf("%s: environment is %q, not %q", want.EventType.At(i), got.Environment.At(i), want.Environment.At(i))
				case got.MetadataVersion[i] != want.MetadataVersion[i]:
					difference = fmt.Sprintf("%s: metadata_version is %d, not %d", want.EventType.At(i), got.MetadataVersion[i], want.MetadataVersion[i])
				case !bytes.Equal(got.EventContext.At(i), want.EventContext.At(i)):
					difference = fmt.Sprintf("%s: event_context differs, %d bytes instead of %d",
						want.EventType.At(i), len(got.EventContext.At(i)), len(want.EventContext.At(i)))
				default:
					continue
				}
				return false, nil
			}
			return true, nil
		}).WithTemplate("Expected the events as they were sent:\n{{.Data}}", &difference),
	)
}
