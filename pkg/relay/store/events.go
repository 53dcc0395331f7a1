package store

import (
	"slices"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Events contains events of a batch as columns, in the order of their ids. It has the
// columns of the sink, and further columns that only the relay needs.
type Events struct {
	sink.Events

	ID          []int64
	PublishedAt []int64    // microseconds since 1970-01-01 00:00:00 UTC, by the database's clock
	Traceparent sink.Texts // empty for an event without a traceparent
}

// Reset removes all events and keeps the memory of the columns.
func (e *Events) Reset() {
	e.Events.Reset()
	e.ID, e.PublishedAt = e.ID[:0], e.PublishedAt[:0]
	e.Traceparent.Reset()
}

// Select returns the events at these indexes, in their order.
func (e *Events) Select(indexes []int) *Events {
	selected := &Events{}
	selected.appendFrom(e, indexes)
	return selected
}

// IDs returns the ids of the events at these indexes.
func (e *Events) IDs(indexes []int) []int64 {
	ids := make([]int64, len(indexes))
	for i, index := range indexes {
		ids[i] = e.ID[index]
	}
	return ids
}

// grow increases the capacity of the columns that Keys returns.
func (e *Events) grow(events int) {
	e.ID = slices.Grow(e.ID, events)
	e.EventID = slices.Grow(e.EventID, events)
	e.EventType.Indexes = slices.Grow(e.EventType.Indexes, events)
	e.EventDateTime = slices.Grow(e.EventDateTime, events)
	e.PublishedAt = slices.Grow(e.PublishedAt, events)
	e.MetadataVersion = slices.Grow(e.MetadataVersion, events)
	e.Traceparent.Grow(events, 0)
}

// appendFrom appends the events of from at these indexes.
func (e *Events) appendFrom(from *Events, indexes []int) {
	for _, i := range indexes {
		e.ID = append(e.ID, from.ID[i])
		e.EventID = append(e.EventID, from.EventID[i])
		e.EventType.Append([]byte(from.EventType.At(i)))
		e.EventDateTime = append(e.EventDateTime, from.EventDateTime[i])
		e.PublishedAt = append(e.PublishedAt, from.PublishedAt[i])
		e.MetadataVersion = append(e.MetadataVersion, from.MetadataVersion[i])
		e.Traceparent.Append(from.Traceparent.At(i))
		if from.EventContext.Len() > 0 { // Keys does not return it
			e.Environment.Append([]byte(from.Environment.At(i)))
			e.EventContext.Append(from.EventContext.At(i))
		}
	}
}
