package httpapi

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/users"
)

// maxValueErrors bounds how many wrong values a problem lists.
const maxValueErrors = 20

// findings are what is wrong with a request's values: all that can be found at
// once, not only the first.
type findings struct {
	wrong   []valueError
	refused map[string]bool // by name
	place   func(name, detail string) valueError
}

func (f *findings) refuse(name, detail string) {
	if f.refused == nil {
		f.refused = make(map[string]bool)
	}
	f.refused[name] = true
	f.wrong = append(f.wrong, f.place(name, detail))
}

// brokenRule is a rule of the use cases that a value breaks.
type brokenRule struct {
	name, reason string
}

// userRules are those that a *users.ValidationError tells of.
func userRules(err error) (rules []brokenRule) {
	if invalid, ok := errors.AsType[*users.ValidationError](err); ok {
		for _, field := range invalid.Fields {
			rules = append(rules, brokenRule{field.Field, field.Reason})
		}
	}
	return rules
}

// eventRules are those that an event breaks.
func eventRules(broken []*outbox.ValidationError) (rules []brokenRule) {
	for _, rule := range broken {
		rules = append(rules, brokenRule{rule.Field, rule.Reason})
	}
	return rules
}

// problem returns the findings as a problem, and nil where there are none. It
// adds the rules that are broken, but for values that were refused before and
// had nothing to validate, and the names that nobody knows.
func (f *findings) problem(broken []brokenRule, unknown iter.Seq[string], isUnknown string) error {
	for _, rule := range broken {
		if !f.refused[rule.name] {
			f.refuse(rule.name, rule.reason)
		}
	}
	for _, name := range slices.Sorted(unknown) {
		f.refuse(name, isUnknown)
	}
	if len(f.wrong) == 0 {
		return nil
	}
	return validationProblem(f.wrong...)
}

// validationProblem lists the first of what is wrong.
func validationProblem(wrong ...valueError) error {
	return &problemError{problem: validationFailed, errors: wrong[:min(len(wrong), maxValueErrors)]}
}

// object is the JSON object in a request's body, taken apart member by member.
type object struct {
	findings

	raw     jsontext.Value // of the whole body only
	members map[string]jsontext.Value
}

// readObject reads the body, which must be one JSON object and nothing else:
// I-JSON (RFC 7493), that is in UTF-8, without lone surrogates and without a
// name that comes twice. encoding/json would repair the first two and take the
// last of the third.
func (s *Server) readObject(c echo.Context) (*object, error) {
	if err := checkMediaType(c.Request().Header); err != nil {
		return nil, err
	}
	body, err := s.readBody(c)
	if err != nil {
		return nil, err
	}
	if tooDeep(body) {
		detail := fmt.Sprintf("is nested deeper than %d levels", MaxDepth)
		return nil, &problemError{problem: invalidJSON, errors: []valueError{bodyError("", detail)}}
	}
	var members map[string]jsontext.Value
	err = json.Unmarshal(body, &members)
	if _, ok := errors.AsType[*json.SemanticError](err); ok { // no object, and not looked at further
		err = json.Unmarshal(body, new(jsontext.Value))
	}
	if e, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		return nil, &problemError{problem: invalidJSON, errors: []valueError{syntaxError(body, e)}}
	}
	if err != nil || members == nil {
		return nil, validationProblem(bodyError("", "must be an object"))
	}
	return &object{findings: findings{place: inMember("")}, raw: body, members: members}, nil
}

// MaxDepth bounds how deeply arrays and objects may be nested in a body: what is
// deeper comes to the end of somebody's stack, PostgreSQL's or a consumer's.
const MaxDepth = 500

// tooDeep reports whether the JSON is nested deeper than MaxDepth.
func tooDeep(body []byte) bool {
	depth, inString, escaped := 0, false, false
	for _, b := range body {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped, inString = b == '\\', b != '"'
		case b == '"':
			inString = true
		case b == '[' || b == '{':
			depth++
			if depth > MaxDepth {
				return true
			}
		case b == ']' || b == '}':
			depth--
		}
	}
	return false
}

func checkMediaType(header http.Header) error {
	mediaType, params, err := mime.ParseMediaType(header.Get(echo.HeaderContentType))
	charset := cmp.Or(params["charset"], "utf-8")
	encoding := cmp.Or(header.Get(echo.HeaderContentEncoding), "identity")
	if err != nil || mediaType != echo.MIMEApplicationJSON ||
		!strings.EqualFold(charset, "utf-8") || !strings.EqualFold(encoding, "identity") {
		return &problemError{problem: unsupportedMediaType}
	}
	return nil
}

func (s *Server) readBody(c echo.Context) ([]byte, error) {
	r, limit := c.Request(), s.options.MaxBodyBytes
	tooLarge := &problemError{
		problem: bodyTooLarge,
		detail:  fmt.Sprintf("The request's body is larger than %d bytes", limit),
	}
	if r.ContentLength > limit {
		return nil, tooLarge
	}
	// Closes the connection where a body without a length goes over the limit.
	body, err := io.ReadAll(http.MaxBytesReader(c.Response().Writer, r.Body, limit))
	if err == nil {
		return body, nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(context.Cause(r.Context()), errRequestTimeout) {
		return nil, &problemError{problem: requestTimeout}
	}
	return nil, &problemError{problem: malformedRequest, detail: "The request's body ended early or is not framed as HTTP asks"}
}

func syntaxError(body []byte, e *jsontext.SyntacticError) valueError {
	pointer := string(e.JSONPointer)
	switch {
	case len(bytes.TrimSpace(body)) == 0:
		return bodyError(pointer, "the body is empty")
	case errors.Is(e, jsontext.ErrDuplicateName):
		return bodyError(pointer, "the object has this name more than once")
	case errors.Is(e, io.ErrUnexpectedEOF):
		return bodyError(pointer, "the body ends within a value")
	}
	reason := strings.TrimPrefix(e.Err.Error(), "jsontext: ")
	return bodyError(pointer, fmt.Sprintf("%s, at or after byte %d", reason, e.ByteOffset))
}

func bodyError(pointer, detail string) valueError {
	return valueError{Pointer: &pointer, Detail: detail}
}

// take takes the member out of the object; it is nil where it is left out.
func (o *object) take(name string) jsontext.Value {
	value := o.members[name]
	delete(o.members, name)
	return value
}

// require is take for what must not be left out.
func (o *object) require(name string) jsontext.Value {
	value := o.take(name)
	if value == nil {
		o.refuse(name, "is required")
	}
	return value
}

func (o *object) requiredString(name string) string {
	return o.text(name, o.require(name))
}

// optionalString returns the member; it is empty where it is left out. null is
// no string.
func (o *object) optionalString(name string) string {
	return o.text(name, o.take(name))
}

func (o *object) text(name string, value jsontext.Value) (text string) {
	if value == nil {
		return ""
	}
	if value.Kind() != '"' || json.Unmarshal(value, &text) != nil {
		o.refuse(name, "must be a string")
	}
	return text
}

// optionalTime returns the member, a time as in RFC 3339.
func (o *object) optionalTime(name string, fallback time.Time) (value time.Time) {
	text := o.take(name)
	if text == nil {
		return fallback
	}
	if text.Kind() != '"' || json.Unmarshal(text, &value) != nil {
		o.refuse(name, "must be a time as in RFC 3339, such as 2026-01-31T12:00:00Z")
		return fallback
	}
	return value
}

// optionalInteger returns the member, a number without fraction and exponent.
func (o *object) optionalInteger(name string, fallback int64) int64 {
	text := o.take(name)
	if text == nil {
		return fallback
	}
	value, err := strconv.ParseInt(string(text), 10, 64)
	if text.Kind() != '0' || err != nil {
		o.refuse(name, "must be a whole number of at most 64 bits")
		return fallback
	}
	return value
}

// requiredArray returns the member's elements, of which there are 1 to most.
func (o *object) requiredArray(name string, most int) (elements []jsontext.Value) {
	value := o.require(name)
	if value == nil {
		return nil
	}
	if value.Kind() != '[' || json.Unmarshal(value, &elements) != nil {
		o.refuse(name, "must be an array")
		return nil
	}
	if len(elements) < 1 || len(elements) > most {
		o.refuse(name, fmt.Sprintf("must have from 1 to %d items", most))
		return nil
	}
	return elements
}

// check returns the problem with the object, if any: the rules that its values
// break, and members that nobody took.
func (o *object) check(broken []brokenRule) error {
	return o.problem(broken, maps.Keys(o.members), "is not a known field")
}

// inMember is the place of a member of the object at the pointer.
func inMember(object jsontext.Pointer) func(name, detail string) valueError {
	return func(name, detail string) valueError {
		return bodyError(string(object.AppendToken(name)), detail)
	}
}

// query is a request's query, taken apart like a body.
type query struct {
	findings

	values url.Values
}

func readQuery(c echo.Context) (*query, error) {
	values, err := url.ParseQuery(c.Request().URL.RawQuery)
	if err != nil {
		return nil, &problemError{problem: malformedRequest, detail: "The query is not percent-encoded as it has to be"}
	}
	return &query{findings: findings{place: inParameter}, values: values}, nil
}

// text takes the parameter out of the query; it is empty where it is left out.
func (q *query) text(name string) string {
	values := q.values[name]
	delete(q.values, name)
	switch len(values) {
	case 0:
		return ""
	case 1:
		return values[0]
	default:
		q.refuse(name, "must not be given more than once")
		return ""
	}
}

// integer takes the parameter out of the query; it is fallback where it is
// left out or empty.
func (q *query) integer(name string, fallback int) int {
	text := q.text(name)
	if text == "" {
		return fallback
	}
	value, err := strconv.Atoi(text)
	if err != nil {
		q.refuse(name, "must be a whole number")
		return fallback
	}
	return value
}

// boolean takes the parameter out of the query; it is false where it is left out
// or empty.
func (q *query) boolean(name string) bool {
	text := q.text(name)
	if text != "" && text != "true" && text != "false" {
		q.refuse(name, "must be true or false")
	}
	return text == "true"
}

// check returns the problem with the query, if any. A parameter that nobody took
// is one: a filter that is misspelt must not select everything.
func (q *query) check(broken []brokenRule) error {
	return q.problem(broken, maps.Keys(q.values), "is not a known parameter")
}

// withoutQuery is for routes that have no parameters.
func withoutQuery(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if c.Request().URL.RawQuery != "" {
			query, err := readQuery(c)
			if err != nil {
				return err
			}
			if err := query.check(nil); err != nil {
				return err
			}
		}
		return next(c)
	}
}

func inParameter(name, detail string) valueError {
	// Percent-encoding can hide what JSON cannot hold.
	name = strings.ToValidUTF8(name, "\uFFFD")
	return valueError{Parameter: &name, Detail: detail}
}
