// Package problem defines the problem details (RFC 9457) of the HTTP API: their
// kinds, the errors that handlers return, and the JSON.
package problem

import "cmp"

// ContentType is the media type of Details.
const ContentType = "application/problem+json"

// typeBase is the beginning of a problem's type. The slug of the kind follows.
const typeBase = "https://github.com/diehard-outbox/diehard/blob/main/docs/errors.md#"

// MaxValues limits the invalid values that a problem lists.
const MaxValues = 20

// Kind is a kind of problem.
type Kind struct {
	// Slug names the kind, and its section in docs/errors.md. A released slug is
	// never changed or reused.
	Slug string
	// Status is the HTTP status of the response.
	Status int
	Title  string
	// Detail is the default for errors that have no detail of their own.
	Detail string
	// RetryAfter is the Retry-After header in seconds; 0 omits the header.
	RetryAfter int
}

// Error is an error that the server sends as a problem.
type Error struct {
	Kind *Kind
	// Detail replaces the kind's detail, unless it is empty.
	Detail string
	// Values are the invalid values, in the order of the response.
	Values []Value
	// Omitted is the number of further invalid values.
	Omitted int
	// RetryAfter replaces the kind's RetryAfter, unless it is 0.
	RetryAfter int
}

// Value is an invalid value in a request.
type Value struct {
	// Pointer is the JSON pointer (RFC 6901) to the value in the body.
	Pointer *string `json:"pointer,omitzero"`
	// Parameter is the name of the query parameter.
	Parameter *string `json:"parameter,omitzero"`
	Detail    string  `json:"detail"`
}

// Invalid returns the ValidationFailed problem with the first MaxValues of the
// values.
func Invalid(values ...Value) *Error {
	e := &Error{Kind: ValidationFailed, Values: values}
	e.Limit(MaxValues)
	return e
}

// Limit keeps only the first n values. Omitted counts the others.
func (e *Error) Limit(n int) {
	if omitted := len(e.Values) - n; omitted > 0 {
		e.Values, e.Omitted = e.Values[:n:n], e.Omitted+omitted
	}
}

// InBody returns a Value at a JSON pointer into the body.
func InBody(pointer, detail string) Value { return Value{Pointer: &pointer, Detail: detail} }

// InQuery returns a Value of a query parameter.
func InQuery(parameter, detail string) Value { return Value{Parameter: &parameter, Detail: detail} }

// Error implements error.
func (e *Error) Error() string { return e.Kind.Slug }

// Details is the JSON of a problem.
type Details struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	// RequestID is empty in the result for an item of a batch.
	RequestID string  `json:"request_id,omitzero"`
	Errors    []Value `json:"errors,omitempty"`
	// ErrorsOmitted is the number of invalid values that Errors does not list.
	ErrorsOmitted int `json:"errors_omitted,omitzero"`
}

// Details returns the JSON of the problem.
func (e *Error) Details(requestID string) Details {
	return Details{
		Type:          typeBase + e.Kind.Slug,
		Title:         e.Kind.Title,
		Status:        e.Kind.Status,
		Detail:        cmp.Or(e.Detail, e.Kind.Detail),
		RequestID:     requestID,
		Errors:        e.Values,
		ErrorsOmitted: e.Omitted,
	}
}
