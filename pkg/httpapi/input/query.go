package input

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// Query is the query of a request's URL. Its methods remove and return parameters,
// and record the invalid ones for Check.
type Query struct {
	findings

	values url.Values
}

// ReadQuery reads the request's query. The error is a *problem.Error.
func ReadQuery(r *http.Request) (*Query, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, &problem.Error{Kind: problem.MalformedRequest, Detail: "The query is not percent-encoded"}
	}
	place := func(name, detail string) problem.Value {
		// A percent-encoded name can contain bytes that JSON cannot represent.
		name = strings.ToValidUTF8(name, "\uFFFD")
		if len(name) > maxPlaceBytes {
			return problem.InQuery("", fmt.Sprintf("the parameter that begins with %q %s", prefix(name), detail))
		}
		return problem.InQuery(name, detail)
	}
	return &Query{findings: findings{place: place}, values: values}, nil
}

// Text takes a text. It returns an empty text if the parameter is missing. An empty
// parameter is invalid: a client whose variable is empty must not get everything.
func (q *Query) Text(name string) string {
	values := q.values[name]
	delete(q.values, name)
	switch len(values) {
	case 0:
		return ""
	case 1:
		if values[0] == "" {
			q.Refuse(name, "must not be empty")
		}
		return values[0]
	default:
		q.Refuse(name, "must not be given more than once")
		return ""
	}
}

// Integer takes a whole number. It returns fallback if the parameter is missing.
func (q *Query) Integer(name string, fallback int) int {
	text := q.Text(name)
	if text == "" {
		return fallback
	}
	value, err := strconv.Atoi(text)
	if err != nil {
		q.Refuse(name, "must be a whole number")
		return fallback
	}
	return value
}

// Boolean takes true or false. It returns false if the parameter is missing.
func (q *Query) Boolean(name string) bool {
	text := q.Text(name)
	if text != "" && text != "true" && text != "false" {
		q.Refuse(name, "must be true or false")
	}
	return text == "true"
}

// Check returns the problem with the query, or nil. The problem lists refused
// parameters, broken rules, and unknown parameters: the parameters that no method took.
// Without this check, a misspelled filter would select everything.
func (q *Query) Check(broken []BrokenRule) error {
	return q.check(broken, maps.Keys(q.values), "is an unknown parameter")
}
