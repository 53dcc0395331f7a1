// Package problem has the problem details (RFC 9457) of the HTTP API: their kinds,
// the errors that handlers return for them, and their form on the wire.
package problem

import "cmp"

// ContentType is the media type of Details.
const ContentType = "application/problem+json"

// typeBase and a kind's slug make its type.
const typeBase = "https://github.com/diehard-outbox/diehard/blob/main/docs/errors.md#"

// MaxValues bounds how many invalid values a problem lists.
const MaxValues = 20

// Kind is a kind of problem.
type Kind struct {
	// Slug names the kind: docs/errors.md has a section under each slug. A slug
	// that was released is never changed or reused.
	Slug string
	// Status is the HTTP status of the answer.
	Status int
	Title  string
	// Detail is what a client is told when the error itself has nothing to say.
	Detail string
	// RetryAfter is when the client should try again, in seconds; 0 says nothing.
	RetryAfter int
}

// Error is an error that is answered with a problem.
type Error struct {
	Kind *Kind
	// Detail replaces the kind's detail, unless it is empty.
	Detail string
	// Values are the invalid values, in the order in which they are listed.
	Values []Value
}

// Value is an invalid value in a request.
type Value struct {
	// Pointer is the value's place in the body, as a JSON pointer (RFC 6901).
	Pointer *string `json:"pointer,omitzero"`
	// Parameter is the value's name in the query.
	Parameter *string `json:"parameter,omitzero"`
	Detail    string  `json:"detail"`
}

// Invalid returns the ValidationFailed problem with the first MaxValues of the
// values.
func Invalid(values ...Value) *Error {
	return &Error{Kind: ValidationFailed, Values: values[:min(len(values), MaxValues)]}
}

// InBody returns a Value at a JSON pointer into the body.
func InBody(pointer, detail string) Value { return Value{Pointer: &pointer, Detail: detail} }

// InQuery returns a Value of a parameter of the query.
func InQuery(parameter, detail string) Value { return Value{Parameter: &parameter, Detail: detail} }

// Error implements error.
func (e *Error) Error() string { return e.Kind.Slug }

// Details is a problem on the wire.
type Details struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	// RequestID is empty for a part of a request.
	RequestID string  `json:"request_id,omitzero"`
	Errors    []Value `json:"errors,omitempty"`
}

// Details returns the problem as it is sent.
func (e *Error) Details(requestID string) Details {
	return Details{
		Type:      typeBase + e.Kind.Slug,
		Title:     e.Kind.Title,
		Status:    e.Kind.Status,
		Detail:    cmp.Or(e.Detail, e.Kind.Detail),
		RequestID: requestID,
		Errors:    e.Values,
	}
}
