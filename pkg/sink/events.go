package sink

import (
	"slices"

	"github.com/google/uuid"
)

// Keys contains the identities of events, as columns. The columns have the same length.
// An id alone does not identify an event, because a publisher may use it twice.
type Keys struct {
	EventID       []uuid.UUID
	EventType     Dictionary
	EventDateTime []int64 // microseconds since 1970-01-01 00:00:00 UTC
}

// Len returns the number of events.
func (k *Keys) Len() int { return len(k.EventID) }

// Events contains rows, as columns of the same length.
type Events struct {
	Keys

	Environment     Dictionary
	EventContext    Texts
	MetadataVersion []uint64
}

// Grow increases the capacity of each column by a number of events. It also increases the
// capacity of EventContext by contextBytes.
func (e *Events) Grow(events, contextBytes int) {
	e.EventID = slices.Grow(e.EventID, events)
	e.EventType.Indexes = slices.Grow(e.EventType.Indexes, events)
	e.EventDateTime = slices.Grow(e.EventDateTime, events)
	e.Environment.Indexes = slices.Grow(e.Environment.Indexes, events)
	e.EventContext.Grow(events, contextBytes)
	e.MetadataVersion = slices.Grow(e.MetadataVersion, events)
}

// Reset removes all events and keeps the memory of the columns.
func (e *Events) Reset() {
	e.EventID = e.EventID[:0]
	e.EventType.Reset()
	e.EventDateTime = e.EventDateTime[:0]
	e.Environment.Reset()
	e.EventContext.Reset()
	e.MetadataVersion = e.MetadataVersion[:0]
}

// Dictionary is a column of strings with few distinct values. It keeps each value once.
type Dictionary struct {
	Values  []string // distinct
	Indexes []uint32 // the index of each event's value

	index map[string]uint32
}

// Len returns the number of events.
func (d *Dictionary) Len() int { return len(d.Indexes) }

// At returns the value of event i.
func (d *Dictionary) At(i int) string { return d.Values[d.Indexes[i]] }

// Append appends the value of one event. It does not keep value.
func (d *Dictionary) Append(value []byte) {
	// Most events have the same value as the previous event.
	if n := len(d.Indexes); n > 0 && d.Values[d.Indexes[n-1]] == string(value) {
		d.Indexes = append(d.Indexes, d.Indexes[n-1])
		return
	}
	index, ok := d.index[string(value)]
	if !ok {
		if d.index == nil {
			d.index = make(map[string]uint32)
		}
		index = uint32(len(d.Values)) //nolint:gosec // a batch has fewer events
		d.Values = append(d.Values, string(value))
		d.index[d.Values[index]] = index
	}
	d.Indexes = append(d.Indexes, index)
}

// Reset removes all events and values.
func (d *Dictionary) Reset() {
	clear(d.Values)
	clear(d.index)
	d.Values, d.Indexes = d.Values[:0], d.Indexes[:0]
}

// Texts is a column of texts in one piece of memory.
type Texts struct {
	Data []byte
	Ends []int // the end of each event's text; the text begins where the previous text ends
}

// Len returns the number of events.
func (t *Texts) Len() int { return len(t.Ends) }

// At returns the text of event i. It refers to Data.
func (t *Texts) At(i int) []byte {
	start := 0
	if i > 0 {
		start = t.Ends[i-1]
	}
	return t.Data[start:t.Ends[i]]
}

// Append appends the text of one event. It does not keep text.
func (t *Texts) Append(text []byte) {
	t.Data = append(t.Data, text...)
	t.Ends = append(t.Ends, len(t.Data))
}

// Grow increases the capacity by a number of events and their bytes.
func (t *Texts) Grow(events, bytes int) {
	if free := cap(t.Data) - len(t.Data); free < bytes {
		// The capacity is exact, because a batch may use most of the process's memory.
		t.Data = append(make([]byte, 0, len(t.Data)+bytes), t.Data...)
	}
	t.Ends = slices.Grow(t.Ends, events)
}

// Reset removes all events and keeps the memory.
func (t *Texts) Reset() { t.Data, t.Ends = t.Data[:0], t.Ends[:0] }
