package input

import (
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

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
		return problem.InBody(string(pointer.AppendToken(name)), detail)
	}
	return &Object{findings: findings{place: place}, raw: raw, members: members}
}

func notAnObject(pointer jsontext.Pointer) problem.Value {
	return problem.InBody(string(pointer), "must be an object")
}

// Raw returns the object as it was sent.
func (o *Object) Raw() []byte { return o.raw }

// IsObject reports whether an element of RequiredObjects is a JSON object. If the
// element is not an object, it has no members, and Check returns a problem.
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
// are not objects, too: see IsObject.
func (o *Object) RequiredObjects(name string, most int) []*Object {
	value := o.Required(name)
	if value == nil {
		return nil
	}
	var elements []jsontext.Value
	if value.Kind() != '[' || json.Unmarshal(value, &elements) != nil {
		o.Refuse(name, "must be an array")
		return nil
	}
	if len(elements) < 1 || len(elements) > most {
		o.Refuse(name, fmt.Sprintf("must have from 1 to %d items", most))
		return nil
	}
	array := jsontext.Pointer("").AppendToken(name)
	objects := make([]*Object, len(elements))
	for i, element := range elements {
		pointer := array.AppendToken(strconv.Itoa(i))
		var members map[string]jsontext.Value
		if err := json.Unmarshal(element, &members); err != nil {
			members = nil
		}
		objects[i] = newObject(pointer, element, members)
		if members == nil {
			objects[i].invalid = []problem.Value{notAnObject(pointer)}
		}
	}
	return objects
}

// Check returns the problem with the object, or nil. The problem lists refused
// members, broken rules, and unknown members: the members that no method took.
func (o *Object) Check(broken []BrokenRule) error {
	return o.check(broken, maps.Keys(o.members), "is an unknown field")
}
