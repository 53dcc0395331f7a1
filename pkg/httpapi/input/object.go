package input

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// Object is a JSON object in a request's body. Its methods remove and return
// members, and record the invalid ones for Check.
type Object struct {
	findings

	raw     jsontext.Value
	members map[string]jsontext.Value // nil if it is not an object
}

func newObject(pointer jsontext.Pointer, raw jsontext.Value, members map[string]jsontext.Value) *Object {
	place := func(name, detail string) problem.Value {
		if len(name) > maxPlaceBytes {
			return problem.InBody(string(pointer), fmt.Sprintf("the field that begins with %q %s", prefix(name), detail))
		}
		return problem.InBody(string(pointer.AppendToken(name)), detail)
	}
	return &Object{findings: findings{place: place}, raw: raw, members: members}
}

// membersOf returns the members of a JSON object. The values are parts of text. The error
// is a *jsontext.SyntacticError, a *shapeError, or the cause of ctx.
func membersOf(ctx context.Context, text []byte) (map[string]jsontext.Value, error) {
	decoder := jsontext.NewDecoder(bytes.NewBuffer(text))
	if decoder.PeekKind() != '{' {
		err := decoder.SkipValue()
		if errors.Is(err, io.EOF) { // the text is empty
			return nil, &jsontext.SyntacticError{Err: io.ErrUnexpectedEOF}
		}
		if err != nil {
			return nil, err //nolint:wrapcheck // the caller reads it
		}
		if err := checkEnd(text, decoder.InputOffset()); err != nil {
			return nil, err
		}
		return nil, &shapeError{"must be an object"}
	}
	if _, err := decoder.ReadToken(); err != nil {
		return nil, err //nolint:wrapcheck // the caller reads it
	}
	members := make(map[string]jsontext.Value)
	for decoder.PeekKind() != '}' {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx) //nolint:wrapcheck // the caller's own
		}
		if len(members) == MaxFields {
			return nil, &shapeError{fmt.Sprintf("must not have more than %d fields", MaxFields)}
		}
		token, err := decoder.ReadToken()
		if err != nil {
			return nil, err //nolint:wrapcheck // the caller reads it
		}
		name := token.String()
		value, err := decoder.ReadValue()
		if err != nil {
			return nil, err //nolint:wrapcheck // the caller reads it
		}
		end := decoder.InputOffset()
		members[name] = text[end-int64(len(value)) : end : end]
	}
	if _, err := decoder.ReadToken(); err != nil {
		return nil, err //nolint:wrapcheck // the caller reads it
	}
	return members, checkEnd(text, decoder.InputOffset())
}

// shapeError means that a value is not an object, or has too many members. The detail
// completes a sentence that begins with the value.
type shapeError struct{ detail string }

// Error implements error.
func (e *shapeError) Error() string { return e.detail }

// checkEnd returns an error if the text continues after its value, which ends at offset.
func checkEnd(text []byte, offset int64) error {
	rest := bytes.TrimLeft(text[offset:], " \t\r\n")
	if len(rest) == 0 {
		return nil
	}
	first, _ := utf8.DecodeRune(rest)
	return &jsontext.SyntacticError{
		ByteOffset: int64(len(text) - len(rest)), Err: fmt.Errorf("invalid character %q after top-level value", first),
	}
}

// Raw returns the object as it was sent.
func (o *Object) Raw() []byte { return o.raw }

// IsObject reports whether an element of RequiredObjects is a JSON object of at most
// MaxFields members. Otherwise it has no members, and Check returns a problem.
func (o *Object) IsObject() bool { return o.members != nil }

// take removes the member and returns its value. It returns nil if the member is
// missing.
func (o *Object) take(name string) jsontext.Value {
	value := o.members[name]
	delete(o.members, name)
	return value
}

// Required takes a member of any type, unchanged.
func (o *Object) Required(name string) jsontext.Value {
	value := o.take(name)
	if value == nil {
		o.Refuse(name, "is required")
	}
	return value
}

// RequiredString takes a string.
func (o *Object) RequiredString(name string) string {
	return o.text(name, o.Required(name))
}

// OptionalString takes a string. It returns an empty string if the member is missing.
// null is not a string.
func (o *Object) OptionalString(name string) string {
	return o.text(name, o.take(name))
}

func (o *Object) text(name string, value jsontext.Value) (text string) {
	if value == nil {
		return ""
	}
	if value.Kind() != '"' || json.Unmarshal(value, &text) != nil {
		o.Refuse(name, "must be a string")
	}
	return text
}

// MergedString takes a string of a merge patch (RFC 7396). It returns nil if the member is
// missing, and an empty string if it is null, which removes the value. null is refused
// unless nullable is true.
func (o *Object) MergedString(name string, nullable bool) *string {
	value := o.take(name)
	if value == nil {
		return nil
	}
	if value.Kind() == 'n' && nullable {
		return new(string)
	}
	text := o.text(name, value)
	return &text
}

// OptionalTime takes an RFC 3339 time. It returns fallback if the member is
// missing.
func (o *Object) OptionalTime(name string, fallback time.Time) (value time.Time) {
	text := o.take(name)
	if text == nil {
		return fallback
	}
	if text.Kind() != '"' || json.Unmarshal(text, &value) != nil {
		o.Refuse(name, "must be an RFC 3339 time such as 2026-01-31T12:00:00Z")
		return fallback
	}
	return value
}

// ParseUUID parses a UUID in the form of RFC 9562, in any case. uuid.Parse accepts other
// forms, too.
func ParseUUID(text string) (id uuid.UUID, ok bool) {
	id, err := uuid.Parse(text)
	return id, err == nil && id.String() == strings.ToLower(text)
}

// OptionalUUID takes a UUID other than the nil UUID. It returns fallback if the member is
// missing.
func (o *Object) OptionalUUID(name string, fallback uuid.UUID) (value uuid.UUID, given bool) {
	text := o.take(name)
	if text == nil {
		return fallback, false
	}
	return o.uuid(name, text, fallback)
}

// RequiredUUID takes a UUID other than the nil UUID.
func (o *Object) RequiredUUID(name string) uuid.UUID {
	text := o.Required(name)
	if text == nil {
		return uuid.Nil
	}
	value, _ := o.uuid(name, text, uuid.Nil)
	return value
}

func (o *Object) uuid(name string, text jsontext.Value, fallback uuid.UUID) (value uuid.UUID, valid bool) {
	var form string
	if text.Kind() == '"' && json.Unmarshal(text, &form) == nil {
		if id, ok := ParseUUID(form); ok && id != uuid.Nil {
			return id, true
		}
	}
	o.Refuse(name, "must be a UUID such as 019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c12")
	return fallback, false
}

// OptionalInteger takes a number without fraction and exponent. It returns
// fallback if the member is missing.
func (o *Object) OptionalInteger(name string, fallback int64) int64 {
	text := o.take(name)
	if text == nil {
		return fallback
	}
	value, err := strconv.ParseInt(string(text), 10, 64)
	if text.Kind() != '0' || err != nil {
		o.Refuse(name, "must be a whole number of at most 64 bits")
		return fallback
	}
	return value
}

// RequiredObjects takes an array of 1 to most objects. It returns elements that
// are not objects, too: see IsObject. It stops at the first element above most. The error
// is the cause of ctx.
func (o *Object) RequiredObjects(ctx context.Context, name string, most int) ([]*Object, error) {
	value := o.Required(name)
	if value == nil {
		return nil, nil
	}
	if value.Kind() != '[' {
		o.Refuse(name, "must be an array")
		return nil, nil
	}
	decoder := jsontext.NewDecoder(bytes.NewBuffer(value))
	if _, err := decoder.ReadToken(); err != nil {
		return nil, fmt.Errorf("read the array: %w", err) // unreachable: ParseObject has checked it
	}
	array := jsontext.Pointer("").AppendToken(name)
	var objects []*Object
	for decoder.PeekKind() != ']' && len(objects) <= most {
		element, err := decoder.ReadValue()
		if err != nil {
			return nil, fmt.Errorf("read the array: %w", err) // unreachable, too
		}
		end := decoder.InputOffset()
		element = value[end-int64(len(element)) : end : end]
		pointer := array.AppendToken(strconv.Itoa(len(objects)))
		members, err := membersOf(ctx, element)
		object := newObject(pointer, element, members)
		if shape, ok := errors.AsType[*shapeError](err); ok {
			object.invalid = []problem.Value{problem.InBody(string(pointer), shape.detail)}
		} else if err != nil {
			return nil, err
		}
		objects = append(objects, object)
	}
	if len(objects) < 1 || len(objects) > most {
		o.Refuse(name, fmt.Sprintf("must have from 1 to %d items", most))
		return nil, nil
	}
	return objects, nil
}

// Check returns the problem with the object, or nil. The problem lists refused
// members, broken rules, and unknown members: the members that no method took.
func (o *Object) Check(broken []BrokenRule) error {
	return o.check(broken, maps.Keys(o.members), "is an unknown field")
}
