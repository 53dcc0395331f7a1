package outbox

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Event is the record that something has happened.
type Event struct {
	// EventID identifies the event at the sink. Two events with the same id are delivered
	// as two rows.
	EventID uuid.UUID
	// EventType is snake_case, at most 128 bytes: user_created.
	EventType string
	// EventDateTime is the time of the event, stored to the microsecond. It must be
	// between MinEventDateTime and MaxEventDateTime.
	EventDateTime time.Time
	// Environment has at most 128 bytes. If it is empty, the event gets the publisher's
	// environment. If that is empty too, the event gets the column's default.
	Environment string
	// EventContext is any JSON value, kept byte for byte.
	EventContext JSON
	// MetadataVersion is the version of EventContext's schema, from 0.
	MetadataVersion int64
	// Traceparent is the trace context of the request that caused the event. It may be
	// empty. The delivery joins this trace. The relay does not send the traceparent to
	// the sink.
	Traceparent Traceparent
}

// The range of EventDateTime is the range that every known sink can store. It is the
// range of ClickHouse's DateTime64(6). For a time outside of it, ClickHouse's driver
// stores a different time without an error.
var (
	MinEventDateTime = time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)
	MaxEventDateTime = time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC)
)

const (
	maxEventTypeBytes   = 128
	maxEnvironmentBytes = 128
)

// ValidationError names the invalid field of an event and the reason. No event was
// written.
type ValidationError struct {
	// Index is the event's position in the arguments of Publish, from 0.
	Index int
	// Field is the event's column, such as event_type.
	Field  string
	Reason string
}

// Error implements error.
func (e *ValidationError) Error() string {
	return fmt.Sprintf("event %d: %s %s", e.Index, e.Field, e.Reason)
}

// Typed is a payload that names its event type. The event type then stays the same when
// the Go type is renamed.
type Typed interface {
	EventType() string
}

// Versioned is a payload that returns the version of its schema.
type Versioned interface {
	EventVersion() int64
}

// Option changes what NewEvent derives from the payload.
type Option func(*Event)

// WithType sets the event type. The default comes from the payload's EventType method, or
// from the name of the payload's Go type.
func WithType(eventType string) Option {
	return func(e *Event) { e.EventType = eventType }
}

// WithTime sets the time of the event. The default is the current time.
func WithTime(t time.Time) Option {
	return func(e *Event) { e.EventDateTime = t }
}

// WithMetadataVersion sets the version of the payload's schema. The default comes from
// the payload's EventVersion method, or is 1 without this method.
func WithMetadataVersion(version int64) Option {
	return func(e *Event) { e.MetadataVersion = version }
}

// WithEnvironment sets the environment. The default is the publisher's environment.
func WithEnvironment(environment string) Option {
	return func(e *Event) { e.Environment = environment }
}

// WithTraceparent sets the trace context that the delivery joins.
func WithTraceparent(traceparent Traceparent) Option {
	return func(e *Event) { e.Traceparent = traceparent }
}

// NewEvent returns an event whose context is the payload's JSON. NewEvent keeps a
// json.RawMessage or a [JSON] byte for byte.
//
// The option [WithType] sets the event type. Without the option, the type comes from the
// payload's method EventType (see [Typed]). Without the method, it is the name of the
// payload's Go type in snake_case: UserCreated becomes user_created. The id is a UUID v7.
// NewEvent returns an error if it cannot encode the payload or cannot derive a type.
// Publish checks all other rules.
func NewEvent(payload any, opts ...Option) (Event, error) {
	eventContext, err := encode(payload)
	if err != nil {
		return Event{}, fmt.Errorf("encode the event's context: %w", err)
	}
	id, err := uuid.NewV7()
	if err != nil {
		return Event{}, fmt.Errorf("make an event id: %w", err)
	}
	event := Event{
		EventID:         id,
		EventDateTime:   time.Now(),
		EventContext:    eventContext,
		MetadataVersion: 1,
	}
	if typed, ok := implementation[Typed](payload); ok {
		event.EventType = typed.EventType()
	} else {
		event.EventType = snakeCase(typeName(payload))
	}
	if versioned, ok := implementation[Versioned](payload); ok {
		event.MetadataVersion = versioned.EventVersion()
	}
	for _, opt := range opts {
		opt(&event)
	}
	if event.EventType == "" {
		return Event{}, fmt.Errorf("cannot derive an event type from a %T: use WithType, or give it a method EventType", payload)
	}
	return event, nil
}

// implementation returns the payload as an I. It also finds methods with pointer
// receivers if the payload is a value, so that both forms give the same event type. It
// replaces a nil pointer by a pointer to a zero value.
func implementation[I any](payload any) (found I, ok bool) {
	value := reflect.ValueOf(payload)
	if !value.IsValid() {
		return found, false
	}
	if value.Kind() == reflect.Pointer {
		if value.IsNil() {
			value = reflect.New(value.Type().Elem())
		}
		found, ok = reflect.TypeAssert[I](value)
		return found, ok
	}
	if found, ok = payload.(I); ok {
		return found, true
	}
	if !reflect.PointerTo(value.Type()).Implements(reflect.TypeFor[I]()) {
		return found, false
	}
	pointer := reflect.New(value.Type())
	pointer.Elem().Set(value)
	found, ok = reflect.TypeAssert[I](pointer)
	return found, ok
}

func encode(payload any) (JSON, error) {
	switch payload := payload.(type) {
	case JSON:
		return payload, nil
	case json.RawMessage: // the encoder would remove its spaces
		return ParseJSON(payload)
	}
	var encoded bytes.Buffer
	encoder := json.NewEncoder(&encoded)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(payload); err != nil {
		return JSON{}, err //nolint:wrapcheck // the caller adds the operation
	}
	if !utf8.Valid(encoded.Bytes()) { // the payload contains a json.RawMessage or a MarshalJSON method
		return JSON{}, errNotUTF8
	}
	return JSON{text: strings.TrimSuffix(encoded.String(), "\n")}, nil
}

func typeName(payload any) string {
	switch payload.(type) {
	case json.RawMessage, JSON:
		return ""
	}
	t := reflect.TypeOf(payload)
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil || t.PkgPath() == "" { // unnamed, or built in
		return ""
	}
	name, _, _ := strings.Cut(t.Name(), "[") // removes the arguments of a generic type
	return name
}

// snakeCase turns UserCreated into user_created and HTTPServerStarted into
// http_server_started.
func snakeCase(name string) string {
	var snake strings.Builder
	runes := []rune(name)
	for i, r := range runes {
		if i > 0 && unicode.IsUpper(r) {
			afterWord := !unicode.IsUpper(runes[i-1])
			beforeWord := i+1 < len(runes) && unicode.IsLower(runes[i+1])
			if (afterWord || beforeWord) && runes[i-1] != '_' {
				snake.WriteByte('_')
			}
		}
		snake.WriteRune(unicode.ToLower(r))
	}
	return snake.String()
}

var snakeCasePattern = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

// broken returns every rule that the event breaks.
func (e *Event) broken(index, maxContextBytes int) (all []*ValidationError) {
	refuse := func(field, format string, args ...any) {
		all = append(all, &ValidationError{Index: index, Field: field, Reason: fmt.Sprintf(format, args...)})
	}
	if e.EventID == uuid.Nil {
		refuse("event_id", "is missing")
	}
	switch {
	case len(e.EventType) > maxEventTypeBytes:
		refuse("event_type", "is longer than %d bytes", maxEventTypeBytes)
	case !snakeCasePattern.MatchString(e.EventType):
		refuse("event_type", "is not snake_case")
	}
	if e.EventDateTime.Before(MinEventDateTime) || e.EventDateTime.After(MaxEventDateTime) {
		refuse("event_date_time", "is not between %s and %s",
			MinEventDateTime.Format(time.RFC3339), MaxEventDateTime.Format(time.RFC3339Nano))
	}
	switch {
	case len(e.Environment) > maxEnvironmentBytes:
		refuse("environment", "is longer than %d bytes", maxEnvironmentBytes)
	case !utf8.ValidString(e.Environment) || strings.ContainsRune(e.Environment, 0):
		refuse("environment", "is not text")
	}
	if e.MetadataVersion < 0 {
		refuse("metadata_version", "is negative")
	}
	switch {
	case e.EventContext.Len() == 0:
		refuse("event_context", "is missing")
	case e.EventContext.Len() > maxContextBytes:
		refuse("event_context", "has %d bytes, more than the limit of %d", e.EventContext.Len(), maxContextBytes)
	}
	return all
}
