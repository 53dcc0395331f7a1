// Package outbox publishes events in the caller's PostgreSQL transaction and
// keeps them until a relay has delivered them.
//
// An application needs Publisher and, where events should leave at once,
// Notifier. Store is the relay's half: it cuts the waiting events into
// batches, hands a batch to one worker at a time and removes it once it is
// delivered.
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

// Event is something that happened, as it is published.
type Event struct {
	// EventID identifies the event at the destination. Whoever publishes one
	// id twice delivers it twice.
	EventID uuid.UUID
	// EventType is snake_case, at most 128 bytes: user_created.
	EventType string
	// EventDateTime is when it happened; microseconds are kept. It lies
	// between MinEventDateTime and MaxEventDateTime.
	EventDateTime time.Time
	// Environment is at most 128 bytes; empty means the publisher's.
	Environment string
	// EventContext is any JSON value, kept byte for byte.
	EventContext json.RawMessage
	// MetadataVersion is the version of EventContext's schema, from 0.
	MetadataVersion int64
	// Traceparent is the W3C trace context of whoever caused the event, or
	// empty. It joins the delivery to that trace and is not delivered.
	Traceparent string
}

// The range of EventDateTime: what every known destination can store
// (ClickHouse's DateTime64(6) ends here, and its driver stores garbage beyond
// without an error).
var (
	MinEventDateTime = time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)
	MaxEventDateTime = time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC)
)

const (
	maxEventTypeBytes   = 128
	maxEnvironmentBytes = 128
)

// ValidationError says which field of an event cannot be published, and why.
// It is the caller's error: nothing has been written.
type ValidationError struct {
	// Index is the event's place among those given to Publish.
	Index int
	// Field is the event's column, such as event_type.
	Field  string
	Reason string
}

// Error implements error.
func (e *ValidationError) Error() string {
	return fmt.Sprintf("event %d: %s %s", e.Index, e.Field, e.Reason)
}

// Option changes what NewEvent derives from the payload.
type Option func(*Event)

// WithType sets the event type, instead of the payload's type name.
func WithType(eventType string) Option {
	return func(e *Event) { e.EventType = eventType }
}

// WithTime sets when the event happened, instead of now.
func WithTime(t time.Time) Option {
	return func(e *Event) { e.EventDateTime = t }
}

// WithMetadataVersion sets the version of the payload's schema, instead of 1.
func WithMetadataVersion(version int64) Option {
	return func(e *Event) { e.MetadataVersion = version }
}

// WithTraceparent sets the W3C trace context that the delivery joins.
func WithTraceparent(traceparent string) Option {
	return func(e *Event) { e.Traceparent = traceparent }
}

// NewEvent makes an event of the payload: its JSON is the event's context, and
// its Go type's name in snake_case the event's type (UserCreated becomes
// user_created), unless WithType gives one. A json.RawMessage is taken byte for
// byte, and has no type name. The id is a UUID v7. It fails where the payload
// has no JSON or no type name; Publish checks the rest.
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
		EventType:       snakeCase(typeName(payload)),
		EventDateTime:   time.Now(),
		EventContext:    eventContext,
		MetadataVersion: 1,
	}
	for _, opt := range opts {
		opt(&event)
	}
	if event.EventType == "" {
		return Event{}, fmt.Errorf("a %T has no type name to derive the event type from: use WithType", payload)
	}
	return event, nil
}

func encode(payload any) (json.RawMessage, error) {
	if raw, ok := payload.(json.RawMessage); ok {
		return bytes.Clone(raw), nil // the encoder would drop its spaces
	}
	var encoded bytes.Buffer
	encoder := json.NewEncoder(&encoded)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(payload); err != nil {
		return nil, err //nolint:wrapcheck // the caller says what this was for
	}
	return bytes.TrimSuffix(encoded.Bytes(), []byte("\n")), nil
}

func typeName(payload any) string {
	if _, ok := payload.(json.RawMessage); ok {
		return ""
	}
	t := reflect.TypeOf(payload)
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil || t.PkgPath() == "" { // unnamed, or built in
		return ""
	}
	name, _, _ := strings.Cut(t.Name(), "[") // a generic type's arguments
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

var (
	snakeCasePattern   = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	traceparentPattern = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)
)

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
	case len(e.EventContext) > maxContextBytes:
		refuse("event_context", "has %d bytes, more than the limit of %d", len(e.EventContext), maxContextBytes)
	case !utf8.Valid(e.EventContext):
		refuse("event_context", "is not valid UTF-8")
	case !json.Valid(e.EventContext):
		refuse("event_context", "is not valid JSON")
	}
	if e.Traceparent != "" && !traceparentPattern.MatchString(e.Traceparent) {
		refuse("traceparent", "is not a W3C traceparent")
	}
	return all
}
