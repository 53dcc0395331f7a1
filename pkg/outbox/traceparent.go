package outbox

import (
	"errors"
	"strings"
)

// Traceparent is a W3C trace context: the trace of a request, the parent span, and the
// flag for a recorded trace. It is always valid, except for the zero value, which means
// that no trace context exists.
//
// https://www.w3.org/TR/trace-context/#traceparent-header
type Traceparent struct{ text string }

var errTraceparent = errors.New("is not a W3C traceparent")

// The positions of the fields in a traceparent: version-traceID-parentID-flags.
const (
	versionEnd  = 2
	traceIDEnd  = versionEnd + 1 + 32
	parentIDEnd = traceIDEnd + 1 + 16
	flagsEnd    = parentIDEnd + 1 + 2
)

// ParseTraceparent parses the value of a traceparent header. For versions later than 00,
// it keeps only the fields of version 00, as the recommendation demands.
func ParseTraceparent(text string) (Traceparent, error) {
	if len(text) < flagsEnd || text[versionEnd] != '-' || text[traceIDEnd] != '-' || text[parentIDEnd] != '-' {
		return Traceparent{}, errTraceparent
	}
	version, rest := text[:versionEnd], text[flagsEnd:]
	t := Traceparent{text: "00" + text[versionEnd:flagsEnd]}
	if version == "ff" || !isHex(version) || !isHex(t.flags()) || !isID(t.TraceID()) || !isID(t.ParentID()) ||
		rest != "" && (version == "00" || rest[0] != '-') {
		return Traceparent{}, errTraceparent
	}
	return t, nil
}

// String returns the header's value in version 00, or an empty string for the zero
// value.
func (t Traceparent) String() string { return t.text }

// IsZero reports whether the trace context is missing.
func (t Traceparent) IsZero() bool { return t.text == "" }

// TraceID returns the id of the trace: 32 hexadecimal digits.
func (t Traceparent) TraceID() string { return t.field(versionEnd+1, traceIDEnd) }

// ParentID returns the id of the parent span: 16 hexadecimal digits.
func (t Traceparent) ParentID() string { return t.field(traceIDEnd+1, parentIDEnd) }

// Sampled reports whether the publisher says that the trace is recorded.
func (t Traceparent) Sampled() bool {
	flags := t.flags()
	return flags != "" && strings.Trim(flags[1:], "13579bdf") == "" // the lowest bit is set
}

func (t Traceparent) flags() string { return t.field(parentIDEnd+1, flagsEnd) }

func (t Traceparent) field(start, end int) string {
	if t.text == "" {
		return ""
	}
	return t.text[start:end]
}

func isHex(text string) bool { return strings.Trim(text, "0123456789abcdef") == "" }

func isID(text string) bool { return isHex(text) && strings.Trim(text, "0") != "" }
