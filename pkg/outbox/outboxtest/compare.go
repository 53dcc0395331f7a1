package outboxtest

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// event is an event in the form in which it is compared and printed. A field that is nil
// is not compared.
type event struct {
	EventType       any
	EventContext    any // a decoded JSON value
	MetadataVersion any
	Environment     any
	Traceparent     any
	EventDateTime   any
}

func eventOf(e outbox.Event) event {
	return event{
		EventType:       e.EventType,
		EventContext:    decode(e.EventContext),
		MetadataVersion: e.MetadataVersion,
		Environment:     e.Environment,
		Traceparent:     unlessZero(e.Traceparent.String()),
		EventDateTime:   timestamp(e.EventDateTime),
	}
}

func (w Want) event() (event, error) {
	e := event{
		EventType:       unlessZero(w.EventType),
		MetadataVersion: unlessZero(w.MetadataVersion),
		Environment:     unlessZero(w.Environment),
		Traceparent:     unlessZero(w.Traceparent.String()),
	}
	if !w.EventDateTime.IsZero() {
		e.EventDateTime = timestamp(w.EventDateTime)
	}
	payload := w.EventContext
	if text, ok := payload.(string); ok {
		payload = json.RawMessage(text)
	}
	if payload != nil {
		encoded, err := outbox.NewEvent(payload, outbox.WithType("any"))
		if err != nil {
			return event{}, err
		}
		if encoded.EventContext.Len() == 0 {
			return event{}, errors.New("the EventContext is empty")
		}
		e.EventContext = decode(encoded.EventContext)
	}
	return e, nil
}

func unlessZero[T comparable](value T) any {
	var zero T
	if value == zero {
		return nil
	}
	return value
}

func timestamp(t time.Time) string {
	return t.UTC().Truncate(time.Microsecond).Format(time.RFC3339Nano)
}

// null represents a context that is the JSON value null.
type null struct{}

func decode(eventContext outbox.JSON) any {
	decoder := json.NewDecoder(strings.NewReader(eventContext.String()))
	decoder.UseNumber()
	var value any
	_ = decoder.Decode(&value) // the text is valid
	if value == nil {
		return null{}
	}
	return withNumbers(value)
}

// withNumbers replaces the numbers in a decoded value by Go numbers, so that different
// notations of a number are equal. It keeps a number that does not fit into a Go type.
func withNumbers(value any) any {
	switch value := value.(type) {
	case map[string]any:
		for key, member := range value {
			value[key] = withNumbers(member)
		}
	case []any:
		for i, member := range value {
			value[i] = withNumbers(member)
		}
	case json.Number:
		return number(value)
	}
	return value
}

func number(text json.Number) any {
	if n, err := text.Int64(); err == nil {
		return n
	}
	isInteger := !strings.ContainsAny(text.String(), ".eE")
	f, err := text.Float64()
	if isInteger || err != nil {
		return text
	}
	if n := int64(f); float64(n) == f {
		return n
	}
	return f
}

// fields returns the fields of the event.
func (e *event) fields() []*any {
	return []*any{&e.EventType, &e.EventContext, &e.MetadataVersion, &e.Environment, &e.Traceparent, &e.EventDateTime}
}

// fits reports whether the event has every field of the description.
func (e *event) fits(description event) bool {
	description.fillFrom(e)
	return cmp.Equal(description, *e)
}

// fillFrom copies the fields that are nil from another event.
func (e *event) fillFrom(other *event) {
	others := other.fields()
	for i, field := range e.fields() {
		if *field == nil {
			*field = *others[i]
		}
	}
}

// fill sets the fields that are not compared, so that a failure message does not print
// them as differences. It pairs each wanted event with a found event. It prefers a
// matching event, then an event of the same type, then any event.
func fill(wanted, found []event) {
	rest := slices.Clone(found)
	paired := make([]bool, len(wanted))
	for _, isPair := range []func(w, f event) bool{
		func(w, f event) bool { return f.fits(w) },
		func(w, f event) bool { return f.EventType == w.EventType },
		func(event, event) bool { return true },
	} {
		for i := range wanted {
			pair := slices.IndexFunc(rest, func(f event) bool { return isPair(wanted[i], f) })
			if paired[i] || pair < 0 {
				continue
			}
			wanted[i].fillFrom(&rest[pair])
			paired[i] = true
			rest = slices.Delete(rest, pair, pair+1)
		}
	}
}
